"""State across the loops of a looped model and across decode steps: residual connections with their norms, attention to
the cached keys of a slot and loop, reset and copy of slots."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._common import autocasts, check_float, differentiable, fake, inference_only, run, wanted

_residual = torch.ops.lt2.loop_residual_fwd.default
_residual_bwd = torch.ops.lt2.loop_residual_bwd.default
_residual_rmsnorm = torch.ops.lt2.loop_residual_rmsnorm_fwd.default
_residual_rmsnorm_bwd = torch.ops.lt2.loop_residual_rmsnorm_bwd.default
_decode = torch.ops.lt2.loop_decode_attention.default
_zero = torch.ops.lt2.loop_state_zero_.default
_copy = torch.ops.lt2.loop_state_copy_.default


def loop_residual(h: Tensor, h_in: Tensor, rho: Tensor) -> Tensor:
    """End of a loop: ``h + rho * h_in`` in float32, rounded once.

    Args:
        h: ``[.., D]`` float32 or bfloat16 (on CUDA also float16, and D <= 8192), the output of the blocks. Not affected
            by autocast.
        h_in: the input of the loop, in the shape and dtype of h.
        rho: ``[D]`` of any float dtype; used in float32.

    Returns:
        ``[.., D]`` in the dtype of h. Differentiable in all three; the sum over tokens in the gradient of rho does
        not depend on the number of threads.

    Raises:
        ValueError: a vector that is not floating-point.
        RuntimeError: a wrong shape or dtype.
    """
    check_float("loop_residual", rho=rho)
    return run(_residual, h, h_in, rho.float())


def loop_residual_rmsnorm(
    h: Tensor, h_in: Tensor, rho: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`loop_residual` and RMSNorm of its result in one pass.

    ``h_out = h + rho * h_in``, rounded to the dtype of h; ``normed = h_out * rsqrt(mean(h_out^2) + eps) * weight``.

    Args:
        h, h_in, rho: as in :func:`loop_residual`.
        weight: ``[D]`` of any float dtype; used in float32.
        eps: added to the mean square.

    Returns:
        ``(h_out, normed)``, each ``[.., D]`` in the dtype of h. Differentiable in h, h_in, rho and weight through
        both, independently of the number of threads.

    Raises:
        ValueError: a vector that is not floating-point.
        RuntimeError: a wrong shape or dtype.
    """
    check_float("loop_residual_rmsnorm", rho=rho, weight=weight)
    h_out, normed, _ = run(_residual_rmsnorm, h, h_in, rho.float(), weight.float(), eps)
    return h_out, normed


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The residual connection around a sub-block and the norm before the next one, in one pass.

    ``h = residual + x``, rounded to the dtype of the residual; ``normed = h * rsqrt(mean(h^2) + eps) * weight``.

    Args:
        x: ``[.., D]``, the output of the sub-block, cast to the dtype of the residual.
        residual: ``[.., D]`` float32 or bfloat16 (on CUDA also float16, and D <= 8192). Not affected by autocast.
        weight: ``[D]`` of any float dtype; used in float32.
        eps: added to the mean square.

    Returns:
        ``(h, normed)``, each ``[.., D]`` in the dtype of the residual. Differentiable in x, residual and weight through
        both, independently of the number of threads.

    Raises:
        ValueError: a weight that is not floating-point.
        RuntimeError: a wrong shape or dtype.
    """
    check_float("add_rmsnorm", weight=weight)
    h, normed, _ = run(_residual_rmsnorm, residual, x.to(residual.dtype), None, weight.float(), eps)
    return h, normed


def loop_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    slots: Tensor | None = None,
    indices: Tensor | None = None,
    loop_map: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the newest t tokens of each row to the keys cached for its slot, ``softmax(scale q K^T) V``.

    The keys and values of the new tokens are already in the caches. Query i of row b sees the keys
    ``0 .. lengths[b] - t + i``. Inference only: there is no derivative, so inputs that require one are an error in
    grad mode. Under autocast q is cast to the dtype of the caches.

    Args:
        q: ``[B, t, HQ, D]`` float32 or bfloat16 (on CUDA also float16).
        k_cache: ``[slots, S, H, D]`` in the dtype of q, or ``[loop_count, slots, S, H, D]`` with ``loop_map``. Any
            strides, but a contiguous last axis. HQ is a multiple of H: query head h uses key head ``h // (HQ // H)``.
        v_cache: as k_cache, with DV instead of D.
        lengths: ``[B]`` int32 or int64: valid keys of each row, the t new ones included. Clamped to ``0 .. S``.
        slots: ``[B]`` int64, the slot of each row. None: row b uses slot b.
        indices: ``[B, t, topk]`` int32: each query sees only those of its keys that its list names, in any order;
            other entries (-1) are ignored, a key named twice counts twice. As in :func:`lt2_ext.ops.dsa_attention`.
        loop_map: ``[B]`` int64, the loop whose keys each row reads; required by, and only with, a loop axis.
        scale: of the scores. None: ``D ** -0.5``.

    Returns:
        ``[B, t, HQ, DV]`` in the dtype of q. 0 for a query that sees no key, and for a row whose slot is -1 or whose
        slot or loop is not in the caches.

    Raises:
        RuntimeError: a wrong shape or dtype; inputs that require a gradient; an unsupported device.
    """
    inference_only("loop_decode_attention", q, k_cache, v_cache)
    if autocasts(q.device.type):
        q = q.to(k_cache.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _decode(q, k_cache, v_cache, lengths, slots, indices, loop_map, scale)


def loop_state_zero_(state: Tensor, slots: Tensor) -> None:
    """Zero the named slots of a pool of states, in place. No autograd.

    Args:
        state: ``[slots, ..]`` of any dtype. The slot axis may have any stride; inside a slot one strided axis may come
            before contiguous ones (so the transposed ``[loop_count, slots, ..]`` is a pool, too).
        slots: ``[n]`` int64; ids that are not in the pool (-1) are skipped.

    Raises:
        RuntimeError: a wrong shape or dtype; strides inside a slot that are not supported.
    """
    inference_only("loop_state_zero_", state)
    _zero(state, slots)


def loop_state_copy_(state: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy slots of a pool of states, in place: ``state[dst[i]] = state[src[i]]``. No autograd.

    Every source is read before the first write, so slots can be swapped and rotated. A destination that is named twice
    gets the last of its sources.

    Args:
        state: as in :func:`loop_state_zero_`.
        src, dst: ``[n]`` int64; pairs of which one is not in the pool (-1) are skipped.

    Raises:
        RuntimeError: a wrong shape or dtype; strides inside a slot that are not supported.
    """
    inference_only("loop_state_copy_", state)
    _copy(state, src, dst)


@fake("loop_residual_rmsnorm_fwd")
def _(h: Tensor, h_in: Tensor, rho: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = math.prod(h.shape[:-1])
    return h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty((rows,), dtype=torch.float32)


@fake("loop_residual_rmsnorm_bwd")
def _(
    dh_out: Tensor, dnormed: Tensor, h_out: Tensor, rstd: Tensor, h_in: Tensor | None, rho: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dh_in, drho = (h_out.shape, weight.shape) if rho is not None else ((0,), (0,))
    return h_out.new_empty(h_out.shape), h_out.new_empty(dh_in), weight.new_empty(drho), weight.new_empty(weight.shape)


fake("loop_residual_fwd")(lambda h, h_in, rho: h.new_empty(h.shape))
fake("loop_residual_bwd")(lambda dout, h_in, rho: (h_in.new_empty(h_in.shape), rho.new_empty(rho.shape)))
fake("loop_decode_attention")(lambda q, k_cache, v_cache, *_: q.new_empty((*q.shape[:3], v_cache.shape[-1])))
fake("loop_state_zero_")(lambda state, slots: None)
fake("loop_state_copy_")(lambda state, src, dst: None)


def _residual_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return wanted(ctx, dout, *run(_residual_bwd, dout, *ctx.saved_tensors))


def _residual_rmsnorm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, h_in, rho, weight, _ = inputs
    ctx.save_for_backward(output[0], output[2], None if rho is None else h_in, rho, weight)


def _residual_rmsnorm_backward(ctx: Any, dh_out: Tensor, dnormed: Tensor, drstd: Tensor) -> tuple[Tensor | None, ...]:
    h_out, rstd, h_in, rho, weight = ctx.saved_tensors  # once: a checkpointed block gives them only once
    dh, dh_in, drho, dweight = run(_residual_rmsnorm_bwd, dh_out, dnormed, h_out, rstd, h_in, rho, weight)
    return wanted(ctx, dh, dh, None, dweight) if rho is None else wanted(ctx, dh, dh_in, drho, dweight)


differentiable("loop_residual_fwd", lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]), _residual_backward)
differentiable("loop_residual_rmsnorm_fwd", _residual_rmsnorm_setup, _residual_rmsnorm_backward)
