"""A block for a few rows, as in decoding: each projection with what is before and after it in one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lt2_ext import ops

if TYPE_CHECKING:
    from .loop_state import Tokens
    from .lt2 import Block
    from .mixers import Shared, State


class StepWeights(NamedTuple):
    """Of the mixer's projections, the last ``floats`` of them wanted in float32, its output, gate and up, down."""

    first: list[Tensor]
    floats: int
    output: list[Tensor]
    up: list[Tensor]
    down: list[Tensor]


def step_weights(block: Block, h: Tensor, tokens: Tokens, state: State, shared: Shared | None) -> StepWeights | None:
    """None: :func:`step` cannot do without the modules."""
    wide = h.is_cuda and (h.element_size() > 2 or block.hidden_size % 8 or block.mlp.down_proj.in_features % 8)
    mixer, mlp, layers = block.mixer, block.mlp, block.mixer.step_layers(tokens, state, shared)
    if layers is None or wide or block.sandwich or torch.is_autocast_enabled(h.device.type):
        return None
    last = mixer.get_submodule("o_proj")
    groups: list[list[nn.Module]] = [layers, [last], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    weights = [[w for m in group if (w := _weight(m, h.dtype)) is not None] for group in groups]
    if any(len(found) < len(group) for found, group in zip(weights, groups, strict=True)):
        return None
    floats = sum(m is mixer.get_submodule(name) for name in mixer.float_layers for m in layers)
    return StepWeights(weights[0], floats, *weights[1:])


def _weight(m: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Of a module that multiplies by it and does nothing else."""
    if type(m) is not nn.Linear or m.bias is not None or m._forward_hooks or m._forward_pre_hooks:
        return None
    return m.weight if m.weight.dtype == dtype and m.weight.is_contiguous() else None


def step(
    block: Block,
    weights: StepWeights,
    h: Tensor,
    tokens: Tokens,
    window: int | None,
    state: State,
    shared: Shared | None,
) -> tuple[Tensor, Shared | None]:
    """What the block's forward gives."""
    first, floats, output, up, down = weights
    norms, eps = (block.mixer_norm.weight, block.mlp_norm.weight), block.eps
    projected = ops.linear_step(h, first, norm_weight=norms[0], eps=eps, settled=True, floats=floats)
    o, shared = block.mixer.step(projected, tokens, window, state, shared)
    (h,) = ops.linear_step(o, output, residual=h, settled=True)
    (x,) = ops.linear_step(h, up, norm_weight=norms[1], eps=eps, swiglu=True, settled=True)
    (h,) = ops.linear_step(x, down, residual=h, settled=True)
    return h, shared
