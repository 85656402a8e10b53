"""A block for a few rows, as in decoding: each projection with what is before and after it in one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lt2_ext import ops

from .mixers._mixer import Shared, State, StepWeights

if TYPE_CHECKING:
    from .loop_state import Tokens
    from .lt2 import Block


def step_weights(block: Block, h: Tensor, tokens: Tokens, state: State, shared: Shared | None) -> StepWeights | None:
    """None: :func:`step` cannot do without the modules."""
    wide = h.is_cuda and (h.element_size() > 2 or block.hidden_size % 8 or block.mlp.down_proj.in_features % 8)
    mixer, mlp, layers = block.mixer, block.mlp, block.mixer.step_layers(tokens, state, shared)
    if layers is None or wide or block.sandwich or torch.is_autocast_enabled(h.device.type):
        return None
    modules = [*layers, *_children(mixer, "o_proj"), *_children(mlp, "gate_proj", "up_proj", "down_proj")]
    norms = block.mixer_norm.weight, block.mlp_norm.weight
    weights = [w for m in modules if (w := _weight(m, h.dtype)) is not None]
    if len(weights) < len(modules) or norms[0].dtype != h.dtype:
        return None
    floats = sum(m in layers for m in _children(mixer, *mixer.float_layers))
    first, output, *rest = weights[:-4], *weights[-4:]
    return StepWeights(first, floats, norms[0], [output, norms[1], *rest], block.eps)


def _children(m: nn.Module, *names: str) -> list[nn.Module | None]:
    """Read where they are: this happens for every token, and ``m.name`` takes a module several times as long."""
    return [m._modules[name] for name in names]


def _weight(m: nn.Module | None, dtype: torch.dtype) -> Tensor | None:
    """Of a module that multiplies by it and does nothing else."""
    if type(m) is not nn.Linear or m._forward_hooks or m._forward_pre_hooks or m._parameters["bias"] is not None:
        return None
    w = m._parameters["weight"]
    return w if w is not None and w.dtype == dtype and w.is_contiguous() else None


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
    if (whole := block.mixer.block_step(h, weights, tokens, state)) is not None:
        return whole, None
    first, floats, norm, rest, eps = weights
    projected = ops.linear_step(h, first, norm_weight=norm, eps=eps, settled=True, floats=floats)
    o, shared = block.mixer.step(projected, tokens, window, state, shared)
    return ops.mlp_step(o, h, rest, eps=eps), shared
