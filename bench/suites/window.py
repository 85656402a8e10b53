"""Attention to the newest keys."""

from __future__ import annotations

import flex
import torch
from torch import Tensor
from torch.nn import functional as F

from lt2_ext import ops
from lt2_ext.reference import dsa as reference

from . import NAMES, Case, Tensors, generator, oracle, timed

BF16 = torch.bfloat16
# T, HQ, H, D, window, whether quick
CUDA = [
    (4096, 16, 4, 128, 512, True),
    (8192, 16, 4, 128, 512, True),
    (8192, 16, 4, 128, 2048, False),
    (8192, 16, 16, 128, 512, False),
    (32768, 16, 4, 128, 512, True),
    (32768, 16, 4, 128, 2048, False),
    (32768, 16, 4, 64, 512, True),
]
CPU = [(4096, 16, 4, 128, 512, True)]


def cases(device: torch.device, quick: bool) -> list[Case]:
    shapes = CUDA if device.type == "cuda" else CPU
    return [case(*x, backward, device) for *x, fast in shapes if fast or not quick for backward in (False, True)]


def case(T: int, HQ: int, H: int, D: int, window: int, backward: bool, device: torch.device) -> Case:
    trained = ("q", "k", "v") if backward else ()

    def inputs(T: int = T) -> Tensors:
        randn = generator(device)
        return {n: randn(1, T, heads, D).to(BF16) for n, heads in {"q": HQ, "k": H, "v": H, "grad_o": HQ}.items()}

    def exact(x: Tensors) -> Tensors:
        newest = torch.arange(x["q"].shape[1])[:, None] - torch.arange(window)
        return {"o": reference.dsa_attention(x["q"], x["k"], x["v"], newest.clamp_min(-1).int()[None])}

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q - k < window)

    def masked(x: Tensors) -> Tensors:
        at = torch.arange(x["q"].shape[1], device=device)
        q, k, v = (x[n].transpose(1, 2) for n in "qkv")
        mask = seen(at, at, at[:, None], at)
        return {"o": F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)}

    pairs = HQ * (T * window - window * (window - 1) // 2)
    return Case(
        op=f"window_attention {'fwd+bwd' if backward else 'fwd'}",
        shape=f"T={T} HQ={HQ} H={H} D={D} window={window} {NAMES[BF16]}",
        dtype=BF16,
        flops=pairs * D * (14 if backward else 4),
        moved=T * (HQ + H) * D * BF16.itemsize * (5 if backward else 2),
        inputs=inputs,
        ours=timed(lambda x: {"o": ops.window_attention(x["q"], x["k"], x["v"], window=window)}, trained),
        torch=timed(masked, trained),
        oracle=lambda x: oracle(exact, trained)({n: t.cpu() for n, t in x.items()}),
        peers={"flex_attention": lambda x: timed(flex.attention(x, seen), trained)(x)},
        checked=lambda: inputs(min(T, window + 200)),
    )
