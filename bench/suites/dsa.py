"""Sparse attention by selection: the lightning indexer."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lt2_ext import ops
from lt2_ext.reference import dsa as reference

from . import NAMES, Case, Tensors, cast, generator, timed

F32, BF16 = torch.float32, torch.bfloat16


def cases(device: torch.device, quick: bool) -> list[Case]:
    if device.type == "cuda":
        return []
    lengths = [4096] if quick else [2048, 4096, 8192]
    return [indexer_case(T, 4, 64, 256, dtype, device) for T in lengths for dtype in (F32, BF16)]


def indexer_case(T: int, HI: int, DI: int, topk: int, dtype: torch.dtype, device: torch.device) -> Case:
    def inputs(T: int = T) -> Tensors:
        randn = generator(device)
        return {"q": randn(1, T, HI, DI).to(dtype), "k": randn(1, T, DI).to(dtype), "w": randn(1, T, HI)}

    def ours(x: Tensors) -> Tensors:
        return {"indices": ops.lightning_indexer(x["q"], x["k"], x["w"], topk=topk)}

    def plain(x: Tensors) -> Tensors:
        return {"indices": indexer_torch(x["q"], x["k"], x["w"], topk)}

    def oracle(x: Tensors) -> Tensors:
        x = cast(x, torch.float64)
        return {"indices": reference.lightning_indexer(x["q"], x["k"], x["w"], topk=topk)}

    return Case(
        op="lightning_indexer",
        shape=f"T={T} HI={HI} DI={DI} topk={topk} {NAMES[dtype]}",
        dtype=dtype,
        flops=T * (T + 1) * HI * DI,
        moved=T * (HI + 1) * DI * dtype.itemsize + T * (HI + topk) * 4,
        inputs=inputs,
        ours=timed(ours),
        torch=timed(plain),
        oracle=oracle,
        compared=selected_scores,
        checked=None if T <= 1024 else lambda: inputs(1024),
    )


def selected_scores(x: Tensors, outputs: Tensors) -> Tensors:
    """The sum of the scores that each query selects, in float64: what a rounded score may lose a little of. Not finite
    where a selection is not causal."""
    indices, T = outputs["indices"][0].long(), outputs["indices"].shape[1]
    scores = reference.index_scores(x["q"][0].double(), x["k"][0].double(), x["w"][0].double())
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    picked = scores.gather(1, indices.clamp_min(0))
    return {"o": torch.where(indices < 0, 0.0, picked).sum(1)}


def indexer_torch(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, topk: int, chunk: int = 512) -> torch.Tensor:
    """A chunk of queries at a time, so that the scores of all never are in memory."""
    selected = []
    for begin in range(0, q.shape[1], chunk):
        end = min(begin + chunk, q.shape[1])
        dots = torch.einsum("bqhd,bkd->bqhk", q[:, begin:end], k[:, :end]).relu_()
        scores = torch.einsum("bqhk,bqh->bqk", dots.float(), w[:, begin:end])
        future = torch.arange(end) > torch.arange(begin, end)[:, None]
        values, indices = scores.masked_fill_(future, -torch.inf).topk(min(topk, end), -1)
        indices = indices.masked_fill(values == -torch.inf, -1)
        selected.append(F.pad(indices, (0, topk - indices.shape[-1]), value=-1).int())
    return torch.cat(selected, 1)
