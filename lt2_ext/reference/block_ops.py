"""SwiGLU, gated RMSNorm and rotary cache write as equations, in the dtype of their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As :func:`lt2_ext.ops.swiglu`."""
    return F.silu(gate) * up


def gated_rmsnorm(o: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """As :func:`lt2_ext.ops.gated_rmsnorm`."""
    return o * (o.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(o.dtype) * F.silu(z)


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
    """As :func:`lt2_ext.ops.linear_step`."""
    if norm_weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * norm_weight.to(x.dtype)
    outputs = [F.linear(x, w) for w in weights]
    if swiglu:
        outputs = [F.silu(outputs[0]) * outputs[1]]
    if residual is not None:
        return [outputs[0] + residual]
    kept = len(outputs) - floats
    return [o if i < kept or o.dtype == torch.float64 else o.float() for i, o in enumerate(outputs)]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x ``[B, t, H, D]`` by the angles ``[B or 1, t, D / 2]``, halves paired."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = (a[:, :, None].to(x.dtype) for a in (cos, sin))
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def rope_cache(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`lt2_ext.ops.rope_cache_` returns, and what it leaves in the caches, as new tensors."""
    k_cache, v_cache, k = k_cache.clone(), v_cache.clone(), rotate(k, cos, sin)
    for b, i in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        slot, place = b if slots is None else int(slots[b]), int(places[b, i])
        if 0 <= slot < k_cache.shape[0] and 0 <= place < k_cache.shape[1]:
            k_cache[slot, place], v_cache[slot, place] = k[b, i], v[b, i]
    return rotate(q, cos, sin), k_cache, v_cache
