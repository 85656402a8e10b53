"""Sparse attention by selection as equations, in the dtype of q: indexer, attention, loss. Differentiable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Document(NamedTuple):
    """Tokens of one sequence in batch row ``row``, and the positions of its queries among its keys."""

    row: int
    queries: slice
    keys: slice
    positions: Tensor  # [queries]

    def visible(self, keys: int) -> Tensor:
        """``[queries, keys]``"""
        return torch.arange(keys) <= self.positions[:, None]


def documents(
    B: int,
    T: int,
    S: int,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: Tensor | int | None = None,
) -> Iterator[Document]:
    """Who sees whom, as in :func:`lt2_ext.ops.lightning_indexer`."""
    if cu_seqlens is None:
        spans = [(b, (0, T), (0, S)) for b in range(B)]
    else:
        keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        spans = [(0, q, k) for q, k in zip(pairwise(cu_seqlens.tolist()), pairwise(keys.tolist()), strict=True)]
    offsets = q_offset.tolist() if isinstance(q_offset, Tensor) else [q_offset] * len(spans)
    for (row, q, k), offset in zip(spans, offsets, strict=True):
        count = q[1] - q[0]
        first = k[1] - k[0] - count if offset is None else offset
        yield Document(row, slice(*q), slice(*k), first + torch.arange(count))


def index_scores(
    q_idx: Tensor, k_idx: Tensor, w_idx: Tensor | None, scale: float | None = None, activation: str | None = "relu"
) -> Tensor:
    """``I[t, s] = sum_j w[t, j] act(scale q[t, j] . k[s])`` of one sequence: q ``[T, HI, DI]``, k ``[S, DI]``."""
    scale = q_idx.shape[-1] ** -0.5 if scale is None else scale
    dots = scale * torch.einsum("thd,sd->ths", q_idx, k_idx)
    dots = dots if activation is None else dots.relu()
    return (dots if w_idx is None else dots * w_idx[..., None].to(dots.dtype)).sum(1)


def select(scores: Tensor, visible: Tensor, topk: int, empty: int = -1) -> Tensor:
    """int32 ``[T, topk]``, ascending, then ``empty``: the best visible scores, of equal ones the first, never NaN."""
    T, S = scores.shape
    eligible = visible & ~scores.isnan()
    order = torch.where(eligible, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~eligible).gather(1, order).to(torch.int8).argsort(dim=1, stable=True))[:, :topk]
    chosen = order.masked_fill(~eligible.gather(1, order), S).sort(1).values
    indices = torch.full((T, topk), empty, dtype=torch.int32)
    indices[:, : chosen.shape[1]] = chosen.masked_fill(chosen == S, empty)
    return indices


def pooled(
    q_idx: Tensor,
    k_idx: Tensor,
    w_idx: Tensor | None,
    visible: Tensor,
    blocks: int,
    pool: int,
    scale: float | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """bool ``[T, S]``: the keys of the newest block of ``pool`` keys that each query of a sequence sees, and of those
    ``blocks`` older ones whose mean keys have the best scores; NaN counts as -inf."""
    full, newest = len(k_idx) // pool, (visible.sum(1, keepdim=True) - 1).clamp_min(0) // pool
    means = k_idx[: full * pool].unflatten(0, (full, pool)).mean(1)
    scores = index_scores(q_idx, means, w_idx, scale, activation)
    older = select(scores.masked_fill(scores.isnan(), -torch.inf), torch.arange(full) < newest, blocks)
    chosen = torch.zeros(len(q_idx), full + 2, dtype=torch.bool)
    chosen.scatter_(1, torch.cat([newest, older.long().masked_fill(older < 0, full + 1)], 1), value=True)
    return chosen[:, : full + 1].repeat_interleave(pool, 1)[:, : len(k_idx)]


def lightning_indexer(
    q_idx: Tensor,
    k_idx: Tensor,
    w_idx: Tensor | None = None,
    *,
    topk: int,
    scale: float | None = None,
    activation: str | None = "relu",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: Tensor | int | None = None,
    pool: int | None = None,
    oversample: int = 4,
) -> Tensor:
    """As :func:`lt2_ext.ops.lightning_indexer`."""
    (B, T), S = q_idx.shape[:2], k_idx.shape[1]
    indices = torch.full((B, T, topk), -1, dtype=torch.int32)
    for d in documents(B, T, S, cu_seqlens, cu_seqlens_k, q_offset):
        q, k = q_idx[d.row, d.queries], k_idx[d.row, d.keys]
        w, eligible = None if w_idx is None else w_idx[d.row, d.queries], d.visible(len(k))
        if pool is not None:
            eligible &= pooled(q, k, w, eligible, math.ceil(oversample * topk / pool), pool, scale, activation)
        indices[d.row, d.queries] = select(index_scores(q, k, w, scale, activation), eligible, topk)
    return indices


def released_indexer(q_idx: Tensor, k_idx: Tensor, topk: int) -> Tensor:
    """The selection of the code released with LT2, for comparison only: a linear score without head weights, and rows
    with fewer than ``topk`` visible keys filled with index 0, which its attention then counts as so many more keys."""
    (B, T), S = q_idx.shape[:2], k_idx.shape[1]
    rows = [
        select(index_scores(q_idx[d.row], k_idx[d.row], None, 1 / q_idx.shape[2], None), d.visible(S), topk, empty=0)
        for d in documents(B, T, S)
    ]
    return torch.stack(rows).sort(-1).values


def multiplicities(indices: Tensor, visible: Tensor) -> Tensor:
    """``[T, S]``: how often each key is among the indices of a query; all but visible keys are ignored."""
    S = visible.shape[1]
    inside = (indices >= 0) & (indices < S)
    counts = torch.zeros(len(indices), S + 1, dtype=torch.int64)
    counts.scatter_add_(1, indices.long().masked_fill(~inside, S), torch.ones_like(indices, dtype=torch.int64))
    return counts[:, :S] * visible


def attend(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of q ``[T, HQ, D]`` over k, v ``[S, H, D]`` with each key counted so often; o and lse."""
    G = q.shape[1] // k.shape[1]
    logits = scale * torch.einsum("thd,shd->hts", q, k.repeat_interleave(G, 1))
    weights = torch.where(counts > 0, counts.to(logits.dtype).log(), -torch.inf)
    dead = (counts == 0).all(1)
    logits = torch.where(dead[:, None], 0.0, torch.where(counts > 0, logits, 0.0) + weights)
    if not logits.shape[-1]:
        return q.new_zeros(*q.shape[:2], v.shape[-1]) + 0 * q.sum(), q.new_full(q.shape[:2], -torch.inf)
    o = torch.einsum("hts,shd->thd", logits.softmax(-1), v.repeat_interleave(G, 1))
    lse = logits.logsumexp(-1).T
    return torch.where(dead[:, None, None], 0.0, o), torch.where(dead[:, None], -torch.inf, lse)


def dsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: Tensor | int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q ``[B, T, HQ, D]`` over the selected keys of k ``[B, S, H, D]``, v ``[B, S, H, DV]``.

    Query head h reads key head ``h // (HQ // H)``. Indices outside of the visible keys of the document are ignored; a
    row with none left gives ``o = 0`` and ``lse = -inf``.
    """
    (B, T, HQ, D), S = q.shape, k.shape[1]
    scale = D**-0.5 if scale is None else scale
    covered = torch.zeros(B, T, dtype=torch.bool)
    o, lse = q.new_zeros(B, T, HQ, v.shape[-1]), q.new_full((B, T, HQ), -torch.inf)
    for d in documents(B, T, S, cu_seqlens, cu_seqlens_k, q_offset):
        keys, values = k[d.row, d.keys], v[d.row, d.keys]
        counts = multiplicities(indices[d.row, d.queries], d.visible(len(keys)))
        part, part_lse = attend(q[d.row, d.queries], keys, values, counts, scale)
        at = torch.zeros_like(covered)
        at[d.row, d.queries] = True
        o = o.masked_scatter(at[:, :, None, None], part)
        lse = lse.masked_scatter(at[:, :, None], part_lse)
    return (o, lse) if return_lse else o


def indexer_loss(
    q_idx: Tensor,
    k_idx: Tensor,
    w_idx: Tensor | None,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    indices: Tensor | None = None,
    *,
    index_scale: float | None = None,
    attn_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Mean over the rows that see something of ``KL(p || softmax(I))`` over the selection (None: all visible keys), in
    which a key that is named twice counts twice.

    ``p[t, :]`` is the mean over heads of ``exp(attn_scale q.k - lse)``, a constant: gradients reach q_idx, k_idx and
    w_idx only.
    """
    q, k, lse = q.detach(), k.detach(), lse.detach()
    (B, T, HQ, D), S = q.shape, k.shape[1]
    attn_scale = D**-0.5 if attn_scale is None else attn_scale
    total, rows = q_idx.sum() * 0, 0
    for d in documents(B, T, S, cu_seqlens):
        at, keys = (d.row, d.queries), k[d.row, d.keys]
        seen = d.visible(len(keys))
        counts = (seen if indices is None else multiplicities(indices[at], seen)).to(q.dtype)
        alive = counts.any(1)
        logits = attn_scale * torch.einsum("thd,shd->hts", q[at], keys.repeat_interleave(HQ // k.shape[2], 1))
        p = (logits - lse[at].T[..., None]).exp().mean(0)
        p, counts = p[alive].masked_fill(counts[alive] == 0, 0), counts[alive]
        scores = index_scores(q_idx[at], k_idx[d.row, d.keys], None if w_idx is None else w_idx[at], index_scale)
        scores = scores[alive].masked_fill(counts == 0, -torch.inf)
        log_model = (scores - (scores + counts.log()).logsumexp(-1, keepdim=True)).masked_fill(counts == 0, 0)
        total = total + (counts * (torch.xlogy(p, p) - p * log_model)).sum()
        rows += int(alive.sum())
    return total / max(rows, 1)
