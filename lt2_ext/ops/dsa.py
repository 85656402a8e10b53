"""Sparse attention by selection: the lightning indexer, attention over selected keys, and the loss that trains one
to foresee the other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._common import autocast, check, check_dtypes, checks_enabled, differentiable, fake, run, wanted

_indexer = torch.ops.lt2.lightning_indexer.default
_fwd = torch.ops.lt2.dsa_attention_fwd.default
_bwd = torch.ops.lt2.dsa_attention_bwd.default
_loss = torch.ops.lt2.indexer_loss_fwd.default
_loss_bwd = torch.ops.lt2.indexer_loss_bwd.default


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
    """The ``topk`` visible keys of each query with the highest ``I[t, s] = sum_j w[t, j] act(scale q[t, j] . k[s])``.

    With ``pool``, of the keys of some blocks only, which are found first, so that the work is linear in T but for one
    score per query and block. A block is ``pool`` keys, counted from the first of the document. Each query takes the
    newest block that it sees, and of the older ones the ``ceil(oversample * topk / pool)`` whose mean key has the best
    scores (of equals the older one; NaN counts as -inf). While these are all blocks, as up to ``topk`` visible keys,
    the result is the same as without.

    Query t stands at position ``q_offset + t`` and sees the keys up to and including it. Scores accumulate in float32
    and are selected from exactly: of equal ones (-0 equals 0) the smaller index wins, -inf comes last, NaN is never
    selected. They are never all in memory: it takes O(T topk), beside a float32 copy of the keys on the CPU and
    64 MB on CUDA (one score per key, if that is more). Inference only: a selection has no gradient. Under
    autocast q_idx and k_idx are cast to the autocast dtype.

    Args:
        q_idx: ``[B, T, HI, DI]`` float32 or bfloat16 (on CUDA also float16), DI a multiple of 8; any strides.
        k_idx: ``[B, S, DI]`` in the dtype of q_idx.
        w_idx: ``[B, T, HI]`` of any float dtype and sign, used in float32; None: ones.
        topk: width of the result, at least 1.
        scale: None: ``DI ** -0.5``.
        activation: ``"relu"``, or None for a score that is linear in the keys.
        cu_seqlens: ``[N + 1]`` int32 or int64 on the device of q_idx, ascending offsets of the documents in the only
            row (``B == 1``). Queries of no document select nothing. On CUDA the values are not checked; wrong ones are
            memory-safe.
        cu_seqlens_k: the same for the keys; None: those of the queries.
        q_offset: position of the first query among the keys of its document: an int, or an int tensor ``[B]`` (``[N]``
            with ``cu_seqlens``). None: the last query stands at the last key.
        pool: None, or a multiple of 32 (64 or 128, as a rule).
        oversample: with ``pool``, at least 1: more finds more of what the whole search finds, and takes longer.

    Returns:
        int32 ``[B, T, topk]``: ascending, unique, counted from the first key of the document, ``-1`` where fewer keys
        can be selected. The same with and without gradients, on each run and with any number of threads, and however a
        sequence is split into calls. The CPU, the Hopper kernels (2-byte dtypes, DI 64 or 128, HI up to 16, a positive
        scale, rows of multiples of 16 bytes) and the other CUDA kernels sum a score in different orders: between them,
        keys within rounding of the threshold may be swapped, and blocks (on CUDA means have the dtype of the keys).

    Raises:
        ValueError: a wrong dtype, activation, pool or oversample.
        RuntimeError: a wrong shape; on the CPU, offsets that do not ascend within the tokens.
    """
    op = "lightning_indexer"
    q_idx, k_idx = autocast(q_idx, q_idx, k_idx)
    check(activation in ("relu", None), op, "activation", 'be "relu" or None', repr(activation))
    check_dtypes(op, q_idx=q_idx, k_idx=k_idx)
    if w_idx is not None:
        check(w_idx.is_floating_point(), op, "w_idx", "have a float dtype", w_idx.dtype)
        w_idx = w_idx.detach().float()
    check(pool is None or (pool > 0 and pool % 32 == 0), op, "pool", "be None or a multiple of 32", pool)
    check(oversample >= 1, op, "oversample", "be at least 1", oversample)
    offset = _positions(op, q_idx, cu_seqlens, q_offset)
    scale = (q_idx.shape[-1] or 1) ** -0.5 if scale is None else scale
    blocks = 0 if pool is None else -(-oversample * topk // pool)
    return _indexer(q_idx.detach(), k_idx.detach(), w_idx, cu_seqlens, cu_seqlens_k, offset, topk, scale,
                    activation is not None, pool or 0, blocks)  # fmt: skip


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
    """Softmax attention of each query over the keys that it selects, for all its heads the same.

    Query head h reads key head ``h // (HQ // H)``. Softmax and sums are float32. Under autocast q, k, v are cast to the
    autocast dtype.

    Args:
        q: ``[B, T, HQ, D]`` float32 or bfloat16 (on CUDA also float16), D a multiple of 8; any strides. HQ is a
            multiple of H.
        k, v: ``[B, S, H, D]`` and ``[B, S, H, DV]`` in the dtype of q, DV a multiple of 8.
        indices: ``[B, T, topk]`` int32 in any order, counted from the first key of the document. Those of keys that the
            query does not see are ignored, whatever their value (-1 is customary). A key that is named twice counts
            twice; ``lt2_ext.set_checks(True)`` makes it an error.
        scale: of ``q . k``; None: ``D ** -0.5``.
        cu_seqlens, cu_seqlens_k, q_offset: who sees whom, as in :func:`lightning_indexer`.
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        ``o`` ``[B, T, HQ, DV]`` in the dtype of q, and if wanted ``lse`` ``[B, T, HQ]`` float32 (natural logarithm). A
        query without a key gives ``o = 0``, ``lse = -inf`` and has no gradient. Differentiable in q, k, v, also through
        lse; gradients do not depend on the number of threads, nor on scheduling.

    Raises:
        ValueError: a wrong dtype; with checks on, a visible key named twice by one query.
        RuntimeError: a shape that the operator rejects; offsets that do not ascend within the tokens (on CUDA they are
            clamped to them); on CUDA, D or DV above 256.
    """
    op = "dsa_attention"
    q, k, v = autocast(q, q, k, v)
    check_dtypes(op, q=q, k=k, v=v)
    offset = _positions(op, q, cu_seqlens, q_offset)
    _check_unique(op, indices, k, cu_seqlens, cu_seqlens_k, offset)
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    o, lse = run(_fwd, q, k, v, indices.contiguous(), cu_seqlens, cu_seqlens_k, offset, scale, 0)
    return (o, lse) if return_lse else o


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: Tensor | int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query to the newest ``window`` of the keys that it sees, in time ``O(T window)``.

    Args:
        window: at least 1; None: all keys that the query sees.
        q, k, v, scale, cu_seqlens, cu_seqlens_k, q_offset, return_lse: as in :func:`dsa_attention`.

    Returns:
        What :func:`dsa_attention` gives, with its errors; but on Hopper (2-byte dtypes, D = DV = 64 or 128) NaN in a
        key or value may reach queries up to 127 places outside of the window.
    """
    op = "window_attention"
    q, k, v = autocast(q, q, k, v)
    check_dtypes(op, q=q, k=k, v=v)
    check(window is None or window >= 1, op, "window", "be None or at least 1", window)
    offset = _positions(op, q, cu_seqlens, q_offset)
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    width = max(k.shape[1], 1) if window is None else window
    o, lse = run(_fwd, q, k, v, None, cu_seqlens, cu_seqlens_k, offset, scale, width)
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
    """How far the indexer's scores are from the attention weights: the mean of ``KL(p[t] || softmax(I[t]))`` over the
    queries that see a key.

    ``I`` is the score of :func:`lightning_indexer` (with ReLU), ``p[t, s]`` the mean over heads of ``exp(attn_scale
    q[t] . k[s] - lse[t])``; both over the keys of ``indices``, in float32. Differentiable in q_idx, k_idx and w_idx
    only: the attention is the teacher. Two numbers per query are kept for backward, which computes weights and scores
    again; nothing of size T x S is. Under autocast q_idx, k_idx, q and k are cast to the autocast dtype.

    Args:
        q_idx, k_idx, w_idx: as in :func:`lightning_indexer`; any strides.
        q, k: ``[B, T, HQ, D]`` and ``[B, S, H, D]`` as in :func:`dsa_attention`, in the dtype of q_idx.
        lse: ``[B, T, HQ]`` float32, what :func:`dsa_attention` returns for the same keys.
        indices: ``[B, T, topk]`` int32 as for :func:`dsa_attention`. None: all keys that the query sees (the dense
            warm-up of an indexer).
        index_scale, attn_scale: None: ``DI ** -0.5`` and ``D ** -0.5``.
        cu_seqlens: documents in the only row, as in :func:`lightning_indexer`; the keys are cut as the queries.

    Returns:
        float32 scalar, 0 if no query sees a key. It and its gradients are the same bits on every run.

    Raises:
        ValueError: dtypes that do not go together; with checks on, a visible key named twice by one query.
        RuntimeError: a shape, dtype or offsets that the operator rejects; on CUDA D or DI above 256, or heads that do
            not fit into shared memory.
    """
    op = "indexer_loss"
    q_idx, k_idx, q, k = autocast(q_idx, q_idx, k_idx, q, k)
    check_dtypes(op, q_idx=q_idx, k_idx=k_idx, q=q, k=k)
    if w_idx is not None:
        check(w_idx.is_floating_point(), op, "w_idx", "have a float dtype", w_idx.dtype)
        w_idx = w_idx.float()
    if indices is not None:
        _check_unique(op, indices, k, cu_seqlens, None, None)
        indices = indices.contiguous()
    index_scale = (q_idx.shape[-1] or 1) ** -0.5 if index_scale is None else index_scale
    attn_scale = (q.shape[-1] or 1) ** -0.5 if attn_scale is None else attn_scale
    constants = q.detach(), k.detach(), lse.detach().contiguous(), indices, cu_seqlens, index_scale, attn_scale
    return run(_loss, q_idx, k_idx, w_idx, *constants)[0]


def _check_unique(
    op: str, indices: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, offset: Tensor | None
) -> None:
    if checks_enabled() and not torch.compiler.is_compiling():
        limits = _visible(indices, k, cu_seqlens, cu_seqlens_k, offset)
        seen = indices.masked_fill((indices < 0) | (indices >= limits), -1).sort(-1).values
        twice = seen[..., 1:][(seen[..., 1:] == seen[..., :-1]) & (seen[..., 1:] >= 0)]
        check(not twice.numel(), op, "indices", "name no visible key twice", twice[:10].tolist())


def _visible(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, offset: Tensor | None
) -> Tensor:
    """``[B, T, 1]``: how many keys each query sees. Reads the offsets."""
    B, T, S = *q.shape[:2], k.shape[1]
    if cu_seqlens is None:
        first = S - T if offset is None else offset.clamp(-T, S)[:, None]
        limits = (first + torch.arange(1, T + 1, device=q.device)).clamp(0, S)
        return limits.expand(B, T)[..., None]
    limits = torch.zeros(1, T, dtype=torch.int64, device=q.device)
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for n, ((begin, end), (first_k, last_k)) in enumerate(
        zip(pairwise(cu_seqlens.tolist()), pairwise(keys.tolist()), strict=True)
    ):
        count, length = end - begin, last_k - first_k
        first = length - count if offset is None else max(-count, min(length, int(offset[n])))
        limits[0, begin:end] = (first + torch.arange(1, count + 1, device=q.device)).clamp(0, length)
    return limits[..., None]


def _positions(op: str, q: Tensor, cu_seqlens: Tensor | None, q_offset: Tensor | int | None) -> Tensor | None:
    """``q_offset`` as int64, one for each sequence."""
    if isinstance(q_offset, int):
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return torch.full((sequences,), q_offset, dtype=torch.int64, device=q.device)
    if q_offset is None:
        return None
    check(q_offset.dtype in (torch.int32, torch.int64), op, "q_offset", "be int32 or int64", q_offset.dtype)
    return q_offset.to(torch.int64).contiguous()


@fake("lightning_indexer")
def _(
    q_idx: Tensor, k_idx: Tensor, w_idx: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None, topk: int, scale: float, relu: bool, pool: int, blocks: int,
) -> Tensor:  # fmt: skip
    return q_idx.new_empty((q_idx.shape[0], q_idx.shape[1], topk), dtype=torch.int32)


@fake("dsa_attention_fwd")
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


fake("dsa_attention_bwd")(lambda dout, dlse, *rest: tuple(t.new_empty(t.shape) for t in rest[:3]))


@fake("indexer_loss_fwd")
def _(q_idx: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    loss = q_idx.new_empty((), dtype=torch.float32)
    return loss, loss.new_empty(2 * q_idx.shape[0] * q_idx.shape[1] + 1)


@fake("indexer_loss_bwd")
def _(dloss: Tensor, q_idx: Tensor, k_idx: Tensor, w_idx: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    dw = dloss.new_empty((0,) if w_idx is None else w_idx.shape)
    return q_idx.new_empty(q_idx.shape), k_idx.new_empty(k_idx.shape), dw


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, *positions, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, indices, *output, *positions)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a checkpoint unpacks them only once
    q, _, v = saved[:3]
    dout = q.new_zeros((*q.shape[:3], v.shape[3])) if dout is None else dout
    return wanted(ctx, *run(_bwd, dout, dlse, *saved, ctx.scale, ctx.window))


differentiable("dsa_attention_fwd", _setup_context, _backward)


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, cu_seqlens, index_scale, attn_scale = inputs
    ctx.save_for_backward(*operands, output[1], cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.scales = index_scale, attn_scale


def _loss_backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dq, dk, dw = run(_loss_bwd, dloss, *saved, *ctx.scales)
    return wanted(ctx, dq, dk, None if saved[2] is None else dw)


differentiable("indexer_loss_fwd", _loss_setup, _loss_backward)
