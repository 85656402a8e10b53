"""The gated delta rule as equations: token by token, by chunks, and one decode step. Differentiable.

Everything is computed in the dtype of q, at least float32. The arguments are those of ``lt2_ext.ops.gdn``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .causal_conv1d import convolve

# (q, k [T, K], v [T, V], g [T] or [T, K], beta [T], scale, S [K, V], delta), tensors with leading axes [B, HV]
# -> (o [.., T, V], S [.., K, V])
Rule = Callable[..., tuple[Tensor, Tensor]]


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, S: Tensor, delta: bool = True
) -> tuple[Tensor, Tensor]:
    g, o = g if g.dim() == k.dim() else g[..., None], []
    for q_t, k_t, v_t, g_t, beta_t in zip(*(x.unbind(2) for x in (q, k, v, g, beta)), strict=True):
        S = g_t.exp()[..., None] * S
        u = beta_t[..., None] * (v_t - torch.einsum("bhk,bhkv->bhv", k_t, S) if delta else v_t)
        S = S + k_t[..., :, None] * u[..., None, :]
        o.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, S))
    return torch.stack(o, 2) if o else v, S


def chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    S: Tensor,
    delta: bool = True,
    length: int = 64,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """With ``E[i, j] = exp(g[j+1] + ... + g[i])`` for ``j <= i`` and ``gamma[i] = exp(g[0] + ... + g[i])``, the rows
    that a chunk writes are ``U = (I + diag(beta) strict(E * K K^T))^-1 diag(beta) (V - gamma K S)``, and without the
    delta rule ``diag(beta) V``.

    ``operands`` rounds what is multiplied to a narrower dtype; the triangular solve never is.
    """

    mm = product(operands)
    o = [v[:, :, :0]]
    for Q, K, V, G, b in zip(*(x.split(length, 2) if x.shape[2] else () for x in (q, k, v, g, beta)), strict=True):
        E = decay_between_tokens(G)
        gamma = G.cumsum(-1).exp()[..., None]
        U = b[..., None] * V
        if delta:
            A = b[..., None] * (E * mm(K, K.mT)).tril(-1)
            Y = b[..., None] * (V - gamma * mm(K, S))
            U = torch.linalg.solve_triangular(A, Y, upper=False, unitriangular=True)
        o.append(scale * (gamma * mm(Q, S) + mm(E * mm(Q, K.mT), U)))
        S = gamma[..., -1:, :] * S + mm(K.mT, E[..., -1, :, None] * U)
    return torch.cat(o, 2), S


def product(operands: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
    """``a @ b`` of matrices that are rounded to a dtype first."""
    return lambda a, b: a @ b if operands is None else a.to(operands).to(a.dtype) @ b.to(operands).to(b.dtype)


def decay_between_tokens(g: Tensor) -> Tensor:
    """``E[i, j] = exp(sum of g over j < t <= i)`` for ``j <= i``, else 0: sums, not differences of sums, so that strong
    gates cancel nothing and ``-inf`` resets."""
    L = g.shape[-1]
    lower = torch.ones(L, L, dtype=torch.bool, device=g.device).tril()
    steps = g[..., :, None].expand(*g.shape, L).masked_fill(~lower.tril(-1), 0)
    return steps.cumsum(-2).masked_fill(~lower, float("-inf")).exp()


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    rule: Rule = recurrence,
    delta: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``o`` in the dtype of v and the final state (or None) of :func:`lt2_ext.ops.gdn.chunk_gated_delta_rule`; without
    ``delta``, of the same rule that erases nothing: :func:`lt2_ext.ops.chunk_simple_gla` with more options."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    out_dtype = v.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    g = q.new_zeros(B, T, HV) if g is None else g.to(dtype)
    if use_gate_in_kernel:
        assert A_log is not None
        g = log_decay(g, A_log, dt_bias)
    beta = q.new_ones(B, T, HV) if beta is None else beta.to(dtype)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    scale = K**-0.5 if scale is None else scale

    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    S = q.new_zeros(N, HV, K, V) if initial_state is None else initial_state.to(dtype)
    S = S.mT if initial_state is not None and state_v_first else S
    q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g, beta))
    if cu_seqlens is None:
        o, S = rule(q, k, v, g, beta, scale, S, delta)
    else:
        ends = cu_seqlens.tolist()
        pieces, states = [v.new_zeros(1, HV, ends[0], V)], []
        for n in range(N):
            tokens = slice(ends[n], ends[n + 1])
            piece, state = rule(*(x[:, :, tokens] for x in (q, k, v, g, beta)), scale, S[n : n + 1], delta)
            pieces.append(piece)
            states.append(state)
        o = torch.cat([*pieces, v.new_zeros(1, HV, T - ends[-1], V)], 2)
        S = torch.cat(states) if states else S
    o = o.transpose(1, 2).to(out_dtype)
    return o, (S.mT if state_v_first else S) if output_final_state else None


def gated_delta_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """``o`` and the pool of states after :func:`lt2_ext.ops.gdn.gated_delta_step_`; ``state`` is not modified."""
    live, rows = live_rows(slots, len(q), state)
    o, S = gated_delta_rule(
        q[live], k[live], v[live], a[live], b[live], scale, state[rows], True, use_qk_l2norm_in_kernel, True,
        A_log, dt_bias, True, allow_neg_eigval, state_v_first,
    )  # fmt: skip
    assert S is not None
    return torch.zeros_like(v).index_put((live,), o), state.index_put((rows,), S.to(state.dtype))


def decode_fused(
    state: Tensor,
    conv_state: Tensor,
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    conv_bias: Tensor | None = None,
    slots: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    use_qk_l2norm_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``o`` and both pools after :func:`lt2_ext.ops.gdn.gdn_decode_fused_`; ``state`` and ``conv_state`` are not
    modified."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    K, V = state.shape[-2:][:: -1 if state_v_first else 1]
    values = state.shape[1] * V
    sizes = ((qkv.shape[-1] - values) // 2, (qkv.shape[-1] - values) // 2, values)
    live, rows = live_rows(slots, len(qkv), state)
    channels, window = convolve(qkv[live].to(dtype), conv_weight, conv_bias, conv_state[rows], "silu")
    q, k, v = (t.unflatten(-1, (-1, D)) for t, D in zip(channels.split(sizes, -1), (K, K, V), strict=True))
    o, S = gated_delta_step(
        state[rows], q, k, v, a[live], b[live], A_log, dt_bias, scale=scale, state_v_first=state_v_first,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, allow_neg_eigval=allow_neg_eigval,
    )  # fmt: skip
    o = F.rms_norm(o, (V,), norm_weight.to(dtype), eps) * F.silu(z[live].to(dtype))
    return (
        torch.zeros_like(z).index_put((live,), o.to(z.dtype)),
        state.index_put((rows,), S.to(state.dtype)),
        conv_state.index_put((rows,), window.to(conv_state.dtype)),
    )


def live_rows(slots: Tensor | None, rows: int, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the rows have a slot in the pool, and the slots of those."""
    slots = torch.arange(rows, device=pool.device) if slots is None else slots
    live = (slots >= 0) & (slots < len(pool))
    return live, slots[live]


def l2norm(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    """``-exp(A_log) softplus(a + dt_bias)``, in the dtype of a."""
    bias = 0 if dt_bias is None else dt_bias.to(a.dtype)
    return -A_log.to(a.dtype).exp() * F.softplus(a + bias)
