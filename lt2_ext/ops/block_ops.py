"""What surrounds the token mixers in a block: SwiGLU, gated RMSNorm, rotary positions and the write into a cache; the
projections of a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import autocast, check_float, differentiable, fake, inference_only, run, wanted

_swiglu = torch.ops.lt2.swiglu_fwd.default
_swiglu_bwd = torch.ops.lt2.swiglu_bwd.default
_gated_rmsnorm = torch.ops.lt2.gated_rmsnorm_fwd.default
_gated_rmsnorm_bwd = torch.ops.lt2.gated_rmsnorm_bwd.default
_rope_cache = torch.ops.lt2.rope_cache_.default
_linear_step = torch.ops.lt2.linear_step.default
_mlp_step = torch.ops.lt2.mlp_step.default
_gdn_block = torch.ops.lt2.gdn_block_step_.default
_attention_block = torch.ops.lt2.attention_block_step_.default


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in float32, rounded once. Under autocast both are cast to the autocast dtype.

    Args:
        gate: ``[.., D]`` float32 or bfloat16 (on CUDA also float16). The two halves of one projection need no copy:
            ``swiglu(*x.chunk(2, -1))``.
        up: in the shape and dtype of gate.

    Returns:
        In the shape and dtype of gate. Differentiable in both.

    Raises:
        RuntimeError: a wrong shape or dtype.
    """
    return run(_swiglu, *autocast(gate, gate, up))


def gated_rmsnorm(o: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``o * rsqrt(mean(o^2) + eps) * weight * silu(z)`` over the last axis in float32, rounded once.

    Args:
        o: ``[.., D]`` float32 or bfloat16 (on CUDA also float16, and D <= 8192). Not affected by autocast.
        z: the gate, in the shape and dtype of o.
        weight: ``[D]`` of any float dtype; used in float32.
        eps: added to the mean square.

    Returns:
        In the shape and dtype of o. Differentiable in o, z and weight; the sum over rows in the gradient of weight does
        not depend on the number of threads.

    Raises:
        ValueError: a weight that is not floating-point.
        RuntimeError: a wrong shape or dtype.
    """
    check_float("gated_rmsnorm", weight=weight)
    return run(_gated_rmsnorm, o, z, weight.float(), eps)[0]


def rope_cache_(
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    places: Tensor,
    *,
    slots: Tensor | None = None,
) -> Tensor:
    """Rotary embedding of new queries and keys; the keys and the values go into the caches of their slots.

    Halves are paired: with ``x1, x2 = x.chunk(2, -1)`` x becomes ``(x1 cos - x2 sin, x2 cos + x1 sin)``. Inference
    only: there is no derivative, so inputs that require one are an error in grad mode. Not affected by autocast.

    Args:
        k_cache, v_cache: ``[slots, S, H, D]`` and ``[slots, S, H, DV]`` in the dtype of q, any strides but a contiguous
            last axis; written in place.
        q: ``[B, t, HQ, D]`` float32 or bfloat16 (on CUDA also float16), D even.
        k, v: ``[B, t, H, D]`` and ``[B, t, H, DV]`` in the dtype of q, DV even.
        cos, sin: ``[B, t, D / 2]`` or ``[1, t, D / 2]`` float32.
        places: ``[B, t]`` int64: where in its slot a token goes, each place of a slot once. A token whose place or slot
            is not in the caches (-1) is not written.
        slots: ``[B]`` int64. None: row b writes to slot b.

    Returns:
        The rotated q, ``[B, t, HQ, D]``.

    Raises:
        RuntimeError: a wrong shape or dtype; inputs that require a gradient.
    """
    inference_only("rope_cache_", k_cache, v_cache, q, k, v)
    return _rope_cache(k_cache, v_cache, q, k, v, cos, sin, places, slots)


def linear_step(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    swiglu: bool = False,
    settled: bool = False,
    floats: int = 0,
) -> list[Tensor]:
    """``x W^T`` for a few rows and each of some weights that share them, which are read once: the projections of a
    decode step, with what comes before and after them.

    Inference only: there is no derivative, so inputs that require one are an error in grad mode. Not affected by
    autocast. Products and sums are float32, rounded once per output (on CUDA also x after the norm).

    Args:
        x: ``[.., K]`` with up to 16 rows, on the CPU float32 or bfloat16, on CUDA bfloat16 or float16 and K a multiple
            of 8.
        weights: 1 to 8 tensors ``[N, K]`` in the dtype of x, contiguous.
        norm_weight: ``[K]`` float32 or in the dtype of x: x is ``rmsnorm(x) * norm_weight``.
        residual: ``[.., N]`` in the dtype of x, added to the only output.
        eps: added to the mean square by the norm.
        swiglu: of two weights of one shape the output is ``silu(x W_0^T) * (x W_1^T)``.
        settled: the operation right before this one on its stream wrote neither a weight (of the norm, too) nor the
            residual: on CUDA they are then read while it still runs.
        floats: the last so many outputs are float32, not rounded; 0 with swiglu or a residual.

    Returns:
        For each weight ``[.., N]`` in the dtype of x, or float32; with swiglu one.

    Raises:
        RuntimeError: a wrong shape, dtype or number of rows; inputs that require a gradient.
    """
    inference_only("linear_step", x, *weights, norm_weight, residual)
    return run(_linear_step, x, weights, norm_weight, residual, eps, swiglu, settled, floats)


def mlp_step(o: Tensor, residual: Tensor, weights: Sequence[Tensor], *, eps: float = 1e-6) -> Tensor:
    """What a block does after its mixer, for a few rows: three times :func:`linear_step` in one operator, ::

        h = residual + o output^T
        h + (silu(x gate^T) * (x up^T)) down^T   with x = rmsnorm(h) * norm_weight

    Inference only, dtypes and rows as there. The operation right before it must not have written a weight or the
    residual (``settled``).

    Args:
        o: ``[.., M]``, the output of the mixer.
        residual: ``[.., K]``, the input of the block.
        weights: output ``[K, M]``, norm_weight ``[K]``, gate and up ``[N, K]``, down ``[K, N]``.
        eps: added to the mean square by the norm.

    Returns:
        ``[.., K]`` in the dtype of o.

    Raises:
        RuntimeError: as :func:`linear_step`.
    """
    inference_only("mlp_step", o, residual, *weights)
    return run(_mlp_step, o, residual, *weights, eps)


def gdn_block_step_(
    h: Tensor, state: Tensor, conv_state: Tensor, norm_weight: Tensor, projections: Sequence[Tensor],
    small: Sequence[Tensor], rest: Sequence[Tensor], *, slots: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """A block around Gated DeltaNet in one operator, from the residual stream to the residual stream::

        qkv, z, a, b = linear_step(h, projections, norm_weight=norm_weight)
        o = gdn_decode_fused_(state, conv_state, qkv, z, a, b, *small)
        mlp_step(o, h, rest)

    It launches what the three do: what it saves is time of the host, which is a good part of a small model's step on a
    CPU. Inference only. Arguments and errors are those of the three; states are updated in place.

    Args:
        h: ``[B, t, hidden]``.
        small: float32 conv_weight, A_log, dt_bias and the weight of the norm over each head.
        rest: of :func:`mlp_step`.
        slots, eps: of all that take them.

    Returns:
        ``[B, t, hidden]``.

    Raises:
        RuntimeError: as in the three operators.
    """
    inference_only("gdn_block_step_", h, state, norm_weight, *projections, *rest)
    return run(_gdn_block, h, state, conv_state, norm_weight, projections, *small, rest, slots, eps)


def attention_block_step_(
    h: Tensor, k_cache: Tensor, v_cache: Tensor, norm_weight: Tensor, projections: Sequence[Tensor],
    where: Sequence[Tensor], rest: Sequence[Tensor], *, index: Sequence[Tensor] = (), topk: int = 1,
    index_scale: float = 1.0, slots: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """A block around softmax attention with rotary positions, as :func:`gdn_block_step_` is one::

        q, k, v = linear_step(h, projections, norm_weight=norm_weight)      # each as heads of the caches' dimensions
        q = rope_cache_(k_cache, v_cache, q, k, v, cos, sin, places)
        o = loop_decode_attention(q, k_cache, v_cache, lengths)
        mlp_step(o, h, rest)

    With ``index`` attention is to the keys that an index selects; it has the last three projections::

        q, k, v, q_idx, k_idx, w_idx = linear_step(h, projections, norm_weight=norm_weight, floats=1)
        q_idx = rope_cache_(cache, no_values, q_idx, k_idx, no_values, *angles, places)
        indices = lightning_indexer(q_idx, cache[slots], w_idx, topk, index_scale, q_offset=offsets)

    For one token a row on Hopper this and the ``rope_cache_`` of q, k, v are one launch.

    Args:
        h: ``[B, t, hidden]``.
        where: cos, sin, places, lengths.
        rest: of :func:`mlp_step`.
        index: its cache ``[slots, S, DI]``, cos, sin, and the place of the first token of each row, int64 ``[B]``.
        slots, eps: of all that take them.

    Returns:
        ``[B, t, hidden]``.

    Raises:
        RuntimeError: as in the operators that it is made of.
    """
    inference_only("attention_block_step_", h, k_cache, v_cache, norm_weight, *projections, *rest)
    (cache, *angles), options = index or (None,), (slots, topk, index_scale, eps)
    caches = k_cache, v_cache, cache
    return run(_attention_block, h, *caches, norm_weight, projections, *where, angles, rest, *options)


fake("mlp_step")(lambda o, residual, *_: residual.new_empty(residual.shape))
fake("gdn_block_step_")(lambda h, *_: h.new_empty(h.shape))
fake("attention_block_step_")(lambda h, *_: h.new_empty(h.shape))
fake("swiglu_fwd")(lambda gate, up: gate.new_empty(gate.shape))
fake("swiglu_bwd")(lambda dout, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)))
fake("rope_cache_")(lambda k_cache, v_cache, q, *_: q.new_empty(q.shape))


@fake("linear_step")
def _(
    x: Tensor, weights: list[Tensor], norm_weight: Tensor | None, residual: Tensor | None, eps: float, swiglu: bool,
    settled: bool, floats: int,
) -> list[Tensor]:  # fmt: skip
    outputs = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in (weights[:1] if swiglu else weights)]
    kept = len(outputs) - floats
    return [o if i < kept else torch.empty_like(o, dtype=torch.float32) for i, o in enumerate(outputs)]


@fake("gated_rmsnorm_fwd")
def _(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), o.new_empty((o.shape[:-1].numel(),), dtype=torch.float32)


@fake("gated_rmsnorm_bwd")
def _(dout: Tensor, o: Tensor, z: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return o.new_empty(o.shape), o.new_empty(o.shape), weight.new_empty(weight.shape)


def _swiglu_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return wanted(ctx, *run(_swiglu_bwd, dout, *ctx.saved_tensors))


def _gated_rmsnorm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1], inputs[2])


def _gated_rmsnorm_backward(ctx: Any, dout: Tensor, drstd: Tensor) -> tuple[Tensor | None, ...]:
    return wanted(ctx, *run(_gated_rmsnorm_bwd, dout, *ctx.saved_tensors))


differentiable("swiglu_fwd", lambda ctx, inputs, output: ctx.save_for_backward(*inputs), _swiglu_backward)
differentiable("gated_rmsnorm_fwd", _gated_rmsnorm_setup, _gated_rmsnorm_backward)
