"""Recurrences with a decay per key channel as equations: token by token, by chunks, and one decode step.

With the delta rule KDA, without it GLA. Differentiable. Everything is computed in the dtype of q, at least float32. The
arguments are those of ``lt2_ext.ops.kda``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import gdn
from .gdn import Rule, decay_between_tokens, product, recurrence


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
    """With ``D[i, j] = exp(g[j+1] + ... + g[i])`` per channel, ``A[i, j] = sum(k[i] D[i, j] k[j])`` below the diagonal
    and ``head[i] = exp(g[0] + ... + g[i])``, the rows that a chunk writes are
    ``U = (I + diag(beta) A)^-1 diag(beta) (V - (head K) S)``; without the delta rule ``diag(beta) V``.

    ``operands`` rounds what is multiplied to a narrower dtype; the triangular solve never is.
    """

    mm = product(operands)
    o = [v[:, :, :0]]
    for Q, K, V, G, b in zip(*(x.split(length, 2) if x.shape[2] else () for x in (q, k, v, g, beta)), strict=True):
        head, tail = G.cumsum(-2).exp(), sum_behind(G).exp()
        P = scores(Q, K, G, mm)
        U = b[..., None] * V
        if delta:
            A = b[..., None] * scores(K, K, G, mm).tril(-1)
            U = b[..., None] * (V - mm(head * K, S))
            U = torch.linalg.solve_triangular(A, U, upper=False, unitriangular=True)
        o.append(scale * (mm(head * Q, S) + mm(P, U)))
        S = head[..., -1, :, None] * S + mm((tail * K).mT, U)
    return torch.cat(o, 2), S


def scores(a: Tensor, b: Tensor, g: Tensor, mm: Callable[[Tensor, Tensor], Tensor], block: int = 16) -> Tensor:
    """``sum_c a[i, c] D[i, j, c] b[j, c]`` for ``j <= i``, else 0: by channel within blocks of tokens, as products of
    what decays before and behind the border between them. No exponent is positive."""
    rows: list[Tensor] = []
    for i in range(0, g.shape[-2], block):
        a_i, b_i, g_i = (x[..., i : i + block, :] for x in (a, b, g))
        own = torch.einsum("...ic,...jc,...cij->...ij", a_i, b_i, decay_between_tokens(g_i.mT))
        before = mm(a_i * g_i.cumsum(-2).exp(), (b[..., :i, :] * sum_behind(g[..., :i, :]).exp()).mT)
        rows.append(torch.cat([before, own, own.new_zeros(*own.shape[:-1], g.shape[-2] - i - own.shape[-1])], -1))
    return torch.cat(rows, -2)


def sum_behind(g: Tensor) -> Tensor:
    """``g[j+1] + ... + g[-1]``: sums, not differences of sums."""
    later = torch.cat([g[..., 1:, :], torch.zeros_like(g[..., :1, :])], -2)[..., : g.shape[-2], :]
    return later.flip(-2).cumsum(-2).flip(-2)


def log_decay(g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    """``-exp(A_log) softplus(g + dt_bias)`` of g ``[.., HV, K]``."""
    return gdn.log_decay(g, A_log[:, None], None if dt_bias is None else dt_bias.view(g.shape[-2:]))


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
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
    delta: bool = True,
    rule: Rule = recurrence,
) -> tuple[Tensor, Tensor | None]:
    """``o`` in the dtype of v and the final state (or None) of :func:`lt2_ext.ops.kda.chunk_kda`, without ``delta`` of
    :func:`lt2_ext.ops.kda.chunk_gla`."""
    g = g.to(torch.promote_types(q.dtype, torch.float32))
    if use_gate_in_kernel:
        assert A_log is not None
        g = log_decay(g, A_log, dt_bias)
    return gdn.gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, False, None, None,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens, rule=rule, delta=delta,
    )  # fmt: skip


def kda_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """``o`` and the pool of states after :func:`lt2_ext.ops.kda.kda_step_`; ``state`` is not modified."""
    live, rows = gdn.live_rows(slots, len(q), state)
    # mypy cannot see the types of what is handed on by name
    o, S = kda(
        q[live], k[live], v[live], g[live], None if beta is None else beta[live], initial_state=state[rows],
        output_final_state=True, A_log=A_log, dt_bias=dt_bias, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    assert S is not None
    return torch.zeros_like(v).index_put((live,), o), state.index_put((rows,), S.to(state.dtype))
