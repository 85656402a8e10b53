"""Loop residual, RMSNorm, decode attention and slot copies as equations, in the dtype of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def loop_residual(h: Tensor, h_in: Tensor, rho: Tensor) -> Tensor:
    """As :func:`lt2_ext.ops.loop_residual`."""
    return h + rho.to(h.dtype) * h_in


def loop_residual_rmsnorm(
    h: Tensor, h_in: Tensor, rho: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As :func:`lt2_ext.ops.loop_residual_rmsnorm`."""
    h_out = loop_residual(h, h_in, rho)
    return h_out, h_out * (h_out.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(h.dtype)


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """As :func:`lt2_ext.ops.add_rmsnorm`."""
    return loop_residual_rmsnorm(residual, x, torch.ones_like(weight), weight, eps)


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
    """As :func:`lt2_ext.ops.loop_decode_attention`, row by row."""
    B, t, HQ, D = q.shape
    H = k_cache.shape[-2]
    o = q.new_zeros(B, t, HQ, v_cache.shape[-1])
    for b in range(B):
        slot = b if slots is None else int(slots[b])
        loop = 0 if loop_map is None else int(loop_map[b])
        loops = 1 if loop_map is None else k_cache.shape[0]
        if not (0 <= slot < k_cache.shape[-4] and 0 <= loop < loops):
            continue
        k, v = (c[slot] if loop_map is None else c[loop, slot] for c in (k_cache, v_cache))
        length = min(max(int(lengths[b]), 0), k.shape[0])
        for i in range(t):
            seen = torch.arange(max(length - t + i + 1, 0), device=k.device)
            if indices is not None:
                seen = torch.tensor([j for j in indices[b, i].tolist() if 0 <= j < len(seen)], device=k.device).long()
            if len(seen) == 0:
                continue
            K, V = (x[seen].repeat_interleave(HQ // H, 1) for x in (k, v))  # [S, HQ, ..]
            scores = torch.einsum("hd,shd->hs", q[b, i], K) * (D**-0.5 if scale is None else scale)
            o[b, i] = torch.einsum("hs,shv->hv", scores.softmax(-1), V)
    return o


def loop_state_copy(state: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    """What :func:`lt2_ext.ops.loop_state_copy_` leaves in ``state``, as a new tensor."""
    after = state.clone()
    for s, d in zip(src.tolist(), dst.tolist(), strict=True):
        if 0 <= s < state.shape[0] and 0 <= d < state.shape[0]:
            after[d] = state[s]
    return after
