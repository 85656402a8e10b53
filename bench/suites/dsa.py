"""Sparse attention by selection: the lightning indexer, attention over what it selects, and its loss."""

from __future__ import annotations

from collections.abc import Callable

import flex
import peers
import torch
from torch import Tensor

from lt2_ext import ops
from lt2_ext.reference import dsa as reference

from . import NAMES, Case, Forward, Tensors, cast, generator, oracle, timed
from .dsa_torch import dense_torch, gather_torch, indexer_torch, loss_torch, step_torch

F32, BF16 = torch.float32, torch.bfloat16


# T, HI, DI, topk, whether quick
CUDA = [
    (32768, 8, 64, 512, True),
    (4096, 8, 64, 512, True),
    (8192, 8, 64, 512, False),
    (131072, 8, 64, 512, False),
    (32768, 4, 64, 512, False),
    (32768, 16, 64, 512, False),
    (32768, 8, 128, 512, False),
    (32768, 8, 64, 64, False),
    (32768, 8, 64, 2048, False),
]
# T, HI, DI, topk, pool, whether quick
CUDA_POOLED = [(32768, 8, 64, 512, 64, True), (131072, 8, 64, 512, 64, False), (131072, 8, 64, 512, 128, False)]
# B, S, topk, whether quick: one query that sees S keys
CUDA_STEPS = [(8, 32768, 512, True), (1, 32768, 2048, False), (8, 131072, 2048, False), (64, 32768, 2048, False)]
# T, HQ, H, D, topk, what neighbouring queries have in common (SELECTIONS), whether quick
CUDA_ATTENTION = [
    (4096, 16, 4, 128, 512, "random", True),
    (8192, 16, 4, 128, 512, "random", True),
    (8192, 16, 16, 128, 512, "random", False),
    (4096, 16, 4, 64, 512, "random", True),
    (4096, 16, 4, 128, 2048, "random", False),
    (32768, 16, 4, 128, 512, "random", False),
    (32768, 16, 4, 128, 512, "clustered", True),
    (32768, 16, 4, 128, 512, "local", False),
    (32768, 16, 16, 128, 512, "clustered", False),
    (131072, 16, 4, 128, 512, "clustered", False),
]
# B, S, HQ, H, topk, whether quick: one query
CUDA_READS = [(8, 32768, 16, 4, 2048, True), (8, 32768, 16, 16, 2048, False), (8, 131072, 16, 4, 2048, True)]
CUDA_DECODES = [(8, 32768, 16, 4, 512, True), (8, 32768, 16, 4, 2048, False), (8, 131072, 16, 4, 2048, True)]
# T, HQ, H, D, HI, DI, topk, whether quick
CUDA_LOSSES = [
    (4096, 16, 4, 128, 4, 64, 256, True),
    (4096, 16, 16, 128, 16, 64, 2048, True),
    (8192, 16, 4, 128, 8, 64, 512, False),
]


def cases(device: torch.device, quick: bool) -> list[Case]:
    if device.type == "cuda":
        decode = [step_case(B, S, 8, 64, topk, BF16, device) for B, S, topk, fast in CUDA_STEPS if fast or not quick]
        steps = [attention_step_case(*shape, BF16, device) for *shape, fast in CUDA_READS if fast or not quick]
        steps += [decode_case(*shape, 8, 64, BF16, device) for *shape, fast in CUDA_DECODES if fast or not quick]
        attention = [
            attention_case(T, HQ, H, D, topk, BF16, backward, True, device, kind)
            for T, HQ, H, D, topk, kind, fast in CUDA_ATTENTION
            if fast or not quick
            for backward in (False, True)
        ]
        indexer = [indexer_case(*shape, BF16, device) for *shape, fast in CUDA if fast or not quick]
        indexer += [indexer_case(*x, BF16, device, pool) for *x, pool, fast in CUDA_POOLED if fast or not quick]
        losses = [loss_case(*shape, BF16, device) for *shape, fast in CUDA_LOSSES if fast or not quick]
        return indexer + decode + attention + steps + losses
    lengths = [4096] if quick else [2048, 4096, 8192]
    selection = [indexer_case(T, 4, 64, 256, dtype, device) for T in lengths for dtype in (F32, BF16)]
    selection += [
        indexer_case(T, 4, 64, 256, dtype, device, pool=64)
        for T in ([4096] if quick else [4096, 16384])
        for dtype in (F32, BF16)
    ]
    # A gather in torch takes seconds, its backward more.
    shapes = [(T, True, "random") for T in lengths] + [(1024 if quick else 4096, False, "random")]
    shapes += [(4096, True, selection) for selection in SELECTIONS if selection != "random"]
    losses = [loss_case(1024 if quick else 4096, 16, 4, 128, 4, 64, 256, dtype, device) for dtype in (F32, BF16)]
    return (
        selection
        + losses
        + [
            attention_case(T, 16, 4, 128, 256, dtype, backward, dense, device, selection)
            for T, dense, selection in shapes
            for dtype in (F32, BF16)
            for backward in (False, True)
        ]
    )


def indexer_case(
    T: int, HI: int, DI: int, topk: int, dtype: torch.dtype, device: torch.device, pool: int | None = None
) -> Case:
    """With a pool the check is on as many tokens as have blocks to choose from."""
    pairs, checked = T * (T + 1) // 2, 1024
    if pool is not None:
        blocks = torch.arange(T) // pool
        eligible = torch.arange(1, T + 1).clamp(max=-(-4 * topk // pool) * pool + pool)
        pairs, checked = int((blocks + eligible).sum()), 6 * topk

    def inputs(T: int = T) -> Tensors:
        randn = generator(device)
        return {"q": randn(1, T, HI, DI).to(dtype), "k": randn(1, T, DI).to(dtype), "w": randn(1, T, HI)}

    return Case(
        op="lightning_indexer",
        shape=f"T={T} HI={HI} DI={DI} topk={topk} {'' if pool is None else f'pool={pool} '}{NAMES[dtype]}",
        dtype=dtype,
        flops=2 * pairs * HI * DI,
        moved=T * (HI + 1) * DI * dtype.itemsize + T * (HI + topk) * 4,
        inputs=inputs,
        ours=timed(lambda x: {"indices": ops.lightning_indexer(x["q"], x["k"], x["w"], topk=topk, pool=pool)}),
        torch=timed(lambda x: {"indices": indexer_torch(x["q"], x["k"], x["w"], topk)})
        if pool is None
        else peers.unsupported("finds all, as in the row without a pool"),
        oracle=lambda x: exact_indices(x, topk, pool),
        compared=selected_scores,
        checked=lambda: inputs(min(T, checked)),
    )


def step_case(B: int, S: int, HI: int, DI: int, topk: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A step of decoding: the last query of each of B sequences."""

    def inputs(S: int = S) -> Tensors:
        randn = generator(device)
        return {"q": randn(B, 1, HI, DI).to(dtype), "k": randn(B, S, DI).to(dtype), "w": randn(B, 1, HI)}

    return Case(
        op="lightning_indexer step",
        shape=f"B={B} S={S} HI={HI} DI={DI} topk={topk} {NAMES[dtype]}",
        dtype=dtype,
        flops=2 * B * S * HI * DI,
        moved=B * S * DI * dtype.itemsize + B * topk * 4,
        inputs=inputs,
        ours=timed(lambda x: {"indices": ops.lightning_indexer(x["q"], x["k"], x["w"], topk=topk)}),
        torch=timed(lambda x: {"indices": indexer_torch(x["q"], x["k"], x["w"], topk)}),
        oracle=lambda x: exact_indices(x, topk),
        compared=selected_scores,
        checked=None if S <= 1024 else lambda: inputs(1024),
        graph=True,
    )


def exact_indices(x: Tensors, topk: int, pool: int | None = None) -> Tensors:
    x = {n: t.cpu() for n, t in cast(x, torch.float64).items()}
    return {"indices": reference.lightning_indexer(x["q"], x["k"], x["w"], topk=topk, pool=pool)}


def selected_scores(x: Tensors, outputs: Tensors) -> Tensors:
    """The sum of the scores that each query selects, in float64: what a rounded score may lose a little of. Not finite
    where a selection is not causal."""
    x, indices = {n: t.cpu() for n, t in cast(x, torch.float64).items()}, outputs["indices"].cpu().long()
    T, S = indices.shape[1], x["k"].shape[1]
    sums = []
    for q, k, w, chosen in zip(x["q"], x["k"], x["w"], indices, strict=True):
        scores = reference.index_scores(q, k, w)
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)
        picked = scores.gather(1, chosen.clamp_min(0))
        sums.append(torch.where(chosen < 0, 0.0, picked).sum(1))
    return {"o": torch.stack(sums)}


def random_selection(randn: Callable[..., Tensor], T: int, topk: int) -> Tensor:
    """int32 ``[1, T, topk]``: every query another one."""
    return ops.lightning_indexer(randn(1, T, 1, 8), randn(1, T, 8), topk=topk)


def clustered_selection(randn: Callable[..., Tensor], T: int, topk: int, cluster: int = 64) -> Tensor:
    """Queries next to each other select nearly the same keys, which lie anywhere."""
    common = randn(1, -(-T // cluster), 1, 8).repeat_interleave(cluster, 1)[:, :T]
    return ops.lightning_indexer(common + 0.1 * randn(1, T, 1, 8), randn(1, T, 8), topk=topk)


def local_selection(randn: Callable[..., Tensor], T: int, topk: int) -> Tensor:
    """The 16 first and the last keys, in order."""
    device = randn(1).device
    positions = torch.arange(T, device=device)[:, None]
    last = positions - torch.arange(topk - 16, device=device).flip(0)
    first = torch.arange(16, device=device).expand(T, 16)
    last, first = last.masked_fill(last < 16, -1), first.masked_fill(first > positions, -1)
    return torch.cat([first, last], 1)[None].int()


SELECTIONS = {"random": random_selection, "clustered": clustered_selection, "local": local_selection}


def attention_case(
    T: int, HQ: int, H: int, D: int, topk: int, dtype: torch.dtype, backward: bool, dense: bool, device: torch.device,
    selection: str = "random",
) -> Case:  # fmt: skip
    """Beside torch that gathers the selected keys, or that attends to all keys: then the check is on so few tokens that
    all are selected."""
    trained = ("q", "k", "v") if backward else ()

    def inputs(T: int = T) -> Tensors:
        randn = generator(device)
        x = {n: randn(1, T, heads, D).to(dtype) for n, heads in {"q": HQ, "k": H, "v": H, "grad_o": HQ}.items()}
        return x | {"indices": SELECTIONS[selection](randn, T, topk)}

    pairs = HQ * (T * topk - topk * (topk - 1) // 2) if topk < T else HQ * T * (T + 1) // 2
    return Case(
        op=f"dsa_attention {'fwd+bwd' if backward else 'fwd'} ({'torch: dense' if dense else 'torch: gathers'})",
        shape=f"T={T} HQ={HQ} H={H} D={D} topk={topk}{'' if selection == 'random' else ' ' + selection} {NAMES[dtype]}",
        dtype=dtype,
        flops=pairs * D * (14 if backward else 4),
        moved=T * (HQ + H) * D * dtype.itemsize * (5 if backward else 2) + T * topk * 4 * (1 + backward),
        inputs=inputs,
        ours=timed(attention_ours, trained),
        torch=timed(dense_torch if dense else gather_torch, trained),
        oracle=lambda x: oracle(attention_exact, trained)({n: t.cpu() for n, t in x.items()}),
        peers={"flex_attention": lambda x: timed(flex.attention(x), trained)(x)},
        checked=lambda: inputs(min(T, topk if dense else 512)),
    )


def attention_step_case(
    B: int, S: int, HQ: int, H: int, topk: int, dtype: torch.dtype, device: torch.device, D: int = 128
) -> Case:
    """A step of decoding, beside attention to all keys."""

    def inputs(S: int = S) -> Tensors:
        randn = generator(device)
        x = {n: randn(B, T, heads, D).to(dtype) for n, T, heads in (("q", 1, HQ), ("k", S, H), ("v", S, H))}
        return x | {"indices": ops.lightning_indexer(randn(B, 1, 1, 8), randn(B, S, 8), topk=topk)}

    return Case(
        op="dsa_attention step (torch: dense)",
        shape=f"B={B} S={S} HQ={HQ} H={H} D={D} topk={topk} {NAMES[dtype]}",
        dtype=dtype,
        flops=4 * B * HQ * topk * D,
        moved=B * topk * (2 * H * D * dtype.itemsize + 4),
        inputs=inputs,
        ours=timed(attention_ours),
        torch=timed(step_torch),
        oracle=lambda x: oracle(attention_exact)({n: t.cpu() for n, t in x.items()}),
        checked=lambda: inputs(min(S, topk)),
        graph=True,
    )


def decode_case(
    B: int, S: int, HQ: int, H: int, topk: int, HI: int, DI: int, dtype: torch.dtype, device: torch.device, D: int = 128
) -> Case:
    """A step of decoding that selects and attends, beside attention to all keys. The check is on as many keys as are
    selected: whether they are the right ones is checked where the indexer's step is timed."""

    def inputs(S: int = S) -> Tensors:
        randn = generator(device)
        shapes = {"q": (1, HQ, D), "k": (S, H, D), "v": (S, H, D), "q_idx": (1, HI, DI), "k_idx": (S, DI)}
        return {n: randn(B, *shape).to(dtype) for n, shape in shapes.items()} | {"w_idx": randn(B, 1, HI)}

    def step(indexer: Callable[..., Tensor], attention: Callable[..., Tensor]) -> Forward:
        def forward(x: Tensors) -> Tensors:
            indices = indexer(x["q_idx"], x["k_idx"], x["w_idx"], topk=topk)
            return {"o": attention(x["q"], x["k"], x["v"], indices)}

        return forward

    return Case(
        op="dsa decode step (torch: dense)",
        shape=f"B={B} S={S} HQ={HQ} H={H} D={D} HI={HI} DI={DI} topk={topk} {NAMES[dtype]}",
        dtype=dtype,
        flops=4 * B * HQ * topk * D + 2 * B * S * HI * DI,
        moved=B * (topk * (2 * H * D * dtype.itemsize + 4) + S * DI * dtype.itemsize),
        inputs=inputs,
        ours=timed(step(ops.lightning_indexer, ops.dsa_attention)),
        torch=timed(step_torch),
        oracle=lambda x: oracle(step(reference.lightning_indexer, reference.dsa_attention))(
            {n: t.cpu() for n, t in x.items()}
        ),
        checked=lambda: inputs(min(S, topk)),
        graph=True,
    )


def attention_ours(x: Tensors) -> Tensors:
    return {"o": ops.dsa_attention(x["q"], x["k"], x["v"], x["indices"])}


def attention_exact(x: Tensors) -> Tensors:
    return {"o": reference.dsa_attention(x["q"], x["k"], x["v"], x["indices"])}


def loss_case(
    T: int, HQ: int, H: int, D: int, HI: int, DI: int, topk: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """The loss and its gradients; torch gathers the selected keys of a chunk of queries at a time."""
    trained = ("q_idx", "k_idx", "w_idx")

    def inputs(T: int = T) -> Tensors:
        randn = generator(device)
        x = {"q": randn(1, T, HQ, D), "k": randn(1, T, H, D), "q_idx": randn(1, T, HI, DI), "k_idx": randn(1, T, DI)}
        x = cast(x, dtype) | {"w_idx": randn(1, T, HI)}
        indices = ops.lightning_indexer(*(x[n] for n in trained), topk=topk)
        _, lse = ops.dsa_attention(x["q"], x["k"], x["k"], indices, return_lse=True)
        return x | {"lse": lse, "indices": indices, "grad_o": torch.ones((), device=device)}

    def loss(op: Callable[..., torch.Tensor]) -> Forward:
        return lambda x: {"o": op(**{n: t for n, t in x.items() if n != "grad_o"})}

    pairs = T * topk - topk * (topk - 1) // 2
    return Case(
        op="indexer_loss fwd+bwd (torch: gathers)",
        shape=f"T={T} HQ={HQ} H={H} D={D} HI={HI} DI={DI} topk={topk} {NAMES[dtype]}",
        dtype=dtype,
        flops=pairs * (HQ * D + 3 * HI * DI) * 2,
        moved=T * ((HQ + H) * D + 2 * (HI + 1) * DI) * dtype.itemsize + T * (HQ + 2 * HI + topk) * 4,
        inputs=inputs,
        ours=timed(loss(ops.indexer_loss), trained),
        torch=timed(loss(loss_torch), trained),
        oracle=lambda x: oracle(loss(reference.indexer_loss), trained)({n: t.cpu() for n, t in x.items()}),
        checked=lambda: inputs(512),
    )
