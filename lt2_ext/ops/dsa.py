"""Sparse attention by selection: the lightning indexer."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import autocast, check

_indexer = torch.ops.lt2.lightning_indexer.default


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
) -> Tensor:
    """The ``topk`` visible keys of each query with the highest ``I[t, s] = sum_j w[t, j] act(scale q[t, j] . k[s])``.

    Query t stands at position ``q_offset + t`` and sees the keys up to and including it. Scores accumulate in float32
    and are selected from exactly: of equal ones (-0 equals 0) the smaller index wins, -inf comes last, NaN is never
    selected. They are never all in memory: it takes O(T topk), beside a float32 copy of the keys. Inference only: a
    selection has no gradient. Under autocast q_idx and k_idx are cast to the autocast dtype.

    Args:
        q_idx: ``[B, T, HI, DI]`` float32 or bfloat16, DI a multiple of 8; any strides.
        k_idx: ``[B, S, DI]`` in the dtype of q_idx.
        w_idx: ``[B, T, HI]`` of any float dtype and sign, used in float32; None: ones.
        topk: width of the result, at least 1.
        scale: None: ``DI ** -0.5``.
        activation: ``"relu"``, or None for a score that is linear in the keys.
        cu_seqlens: ``[N + 1]`` int32 or int64, ascending offsets of the documents in the only row (``B == 1``).
            Queries of no document select nothing.
        cu_seqlens_k: the same for the keys; None: those of the queries.
        q_offset: position of the first query among the keys of its document: an int, or an int tensor ``[B]`` (``[N]``
            with ``cu_seqlens``). None: the last query stands at the last key.

    Returns:
        int32 ``[B, T, topk]``: ascending, unique, counted from the first key of the document, ``-1`` where fewer keys
        can be selected. Does not depend on the number of threads, nor on how a sequence is split into calls.

    Raises:
        ValueError: a wrong shape, dtype or activation.
        RuntimeError: offsets that do not ascend within the tokens; a CUDA tensor (not supported on CUDA).
    """
    op = "lightning_indexer"
    q_idx, k_idx = autocast(q_idx, q_idx, k_idx)
    check(activation in ("relu", None), op, "activation", 'be "relu" or None', repr(activation))
    check(q_idx.dtype in (torch.float32, torch.bfloat16), op, "q_idx", "be float32 or bfloat16", q_idx.dtype)
    check(q_idx.dim() == 4, op, "q_idx", "have shape [B, T, HI, DI]", list(q_idx.shape))
    B, T, HI, DI = q_idx.shape
    check(HI >= 1 and DI >= 8 and DI % 8 == 0, op, "q_idx", "have HI >= 1 and DI a multiple of 8", list(q_idx.shape))
    check(k_idx.dim() == 3 and k_idx.shape[0] == B and k_idx.shape[2] == DI, op, "k_idx",
          f"have shape [B, S, DI] = [{B}, S, {DI}]", list(k_idx.shape))  # fmt: skip
    check(k_idx.dtype == q_idx.dtype, op, "k_idx", f"have the dtype of q_idx ({q_idx.dtype})", k_idx.dtype)
    if w_idx is not None:
        check(list(w_idx.shape) == [B, T, HI], op, "w_idx", f"have shape [B, T, HI] = [{B}, {T}, {HI}]",
              list(w_idx.shape))  # fmt: skip
        check(w_idx.is_floating_point(), op, "w_idx", "have a float dtype", w_idx.dtype)
        w_idx = w_idx.detach().float()
    check(topk >= 1, op, "topk", "be at least 1", topk)
    offset = _positions(op, "q_idx", q_idx, cu_seqlens, cu_seqlens_k, q_offset)
    scale = DI**-0.5 if scale is None else scale
    return _indexer(q_idx.detach(), k_idx.detach(), w_idx, cu_seqlens, cu_seqlens_k, offset, topk, scale,
                    activation is not None)  # fmt: skip


def _positions(
    op: str, argument: str, q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    q_offset: Tensor | int | None,
) -> Tensor | None:
    """Check who sees whom; ``q_offset`` as int64, one for each sequence."""
    sequences = q.shape[0]
    check(cu_seqlens is not None or cu_seqlens_k is None, op, "cu_seqlens_k", "come with cu_seqlens", "it alone")
    if cu_seqlens is not None:
        check(q.shape[0] == 1, op, argument, "have B = 1 with cu_seqlens", list(q.shape))
        for name, offsets in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
            if offsets is None:
                continue
            check(offsets.dim() == 1 and offsets.shape[0] > 0, op, name, "have shape [N + 1]", list(offsets.shape))
            check(offsets.dtype in (torch.int32, torch.int64), op, name, "be int32 or int64", offsets.dtype)
            check(offsets.shape == cu_seqlens.shape, op, name, f"have the shape of cu_seqlens {list(cu_seqlens.shape)}",
                  list(offsets.shape))  # fmt: skip
        sequences = cu_seqlens.shape[0] - 1
    if q_offset is None:
        return None
    if not isinstance(q_offset, Tensor):
        return torch.full((sequences,), q_offset, dtype=torch.int64, device=q.device)
    check(list(q_offset.shape) == [sequences], op, "q_offset", f"have one position for each of {sequences} sequences",
          list(q_offset.shape))  # fmt: skip
    check(q_offset.dtype in (torch.int32, torch.int64), op, "q_offset", "be int32 or int64", q_offset.dtype)
    return q_offset.to(torch.int64).contiguous()


@torch.library.register_fake("lt2::lightning_indexer")
def _(
    q_idx: Tensor, k_idx: Tensor, w_idx: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    q_offset: Tensor | None, topk: int, scale: float, relu: bool,
) -> Tensor:  # fmt: skip
    return q_idx.new_empty((q_idx.shape[0], q_idx.shape[1], topk), dtype=torch.int32)
