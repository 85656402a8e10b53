"""Operators between the loops of a model, and decode attention over cached keys."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from lt2_ext import ops

from . import NAMES, Case, Tensors, generator, oracle, timed

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6


def cases(device: torch.device, quick: bool) -> list[Case]:
    shape = (8, 4096, 2048) if device.type == "cuda" else (1, 2048, 2048)
    dtypes, contexts = ((BF16,), (1024, 4096, 16384)) if quick else ((F32, BF16), (1024, 2048, 4096, 8192, 16384))
    rows = [(norm, dtype, backward) for norm in (False, True) for dtype in dtypes for backward in (False, True)]
    residual = [residual_case(*shape, norm, dtype, backward, device) for norm, dtype, backward in rows]
    decode = [decode_case(1, context, 16, 4, 128, dtype, device) for dtype in dtypes for context in contexts]
    if device.type == "cuda":
        decode += [decode_case(B, 32768, 16, H, 128, BF16, device) for B in (1, 8) for H in (4, 16)]
    return residual + decode + [selected_case(1, 16384, 2048, 16, 4, 128, dtype, device) for dtype in dtypes]


def residual_case(B: int, T: int, D: int, norm: bool, dtype: torch.dtype, backward: bool, device: torch.device) -> Case:
    def inputs() -> Tensors:
        randn = generator(device)
        x = {n: randn(B, T, D).to(dtype) for n in ("h", "h_in", "grad_h_out", "grad_normed")}
        return x | {"rho": randn(D), "weight": randn(D)}

    trained = ("h", "h_in", "rho", "weight")[: 4 if norm else 3] if backward else ()
    # h h_in -> h_out (normed); dh_out h_in -> dh_in; dh_out dnormed h_out h_in -> dh dh_in
    moved = (4 + 6 * backward) if norm else (3 + 3 * backward)
    ours, plain = (norm_ours, norm_torch) if norm else (residual_ours, residual_torch)
    return Case(
        op=f"loop_residual{'_rmsnorm' if norm else ''} {'fwd+bwd' if backward else 'fwd'}",
        shape=f"[{B}, {T}, {D}] {NAMES[dtype]}",
        dtype=dtype,
        flops=0,
        moved=moved * B * T * D * dtype.itemsize,
        inputs=inputs,
        ours=timed(ours, trained),
        torch=timed(plain, trained),
        oracle=oracle(plain, trained),
    )


def residual_ours(x: Tensors) -> Tensors:
    return {"h_out": ops.loop_residual(x["h"], x["h_in"], x["rho"])}


def residual_torch(x: Tensors) -> Tensors:
    return {"h_out": x["h"] + x["rho"].to(x["h"].dtype) * x["h_in"]}


def norm_ours(x: Tensors) -> Tensors:
    h_out, normed = ops.loop_residual_rmsnorm(x["h"], x["h_in"], x["rho"], x["weight"], EPS)
    return {"h_out": h_out, "normed": normed}


def norm_torch(x: Tensors) -> Tensors:
    h_out = residual_torch(x)["h_out"]
    return {"h_out": h_out, "normed": F.rms_norm(h_out, h_out.shape[-1:], x["weight"].to(h_out.dtype), EPS)}


def decode_case(B: int, context: int, HQ: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    def inputs() -> Tensors:
        randn = generator(device)
        x = {n: randn(B, context, H, D).to(dtype) for n in ("k", "v")}
        return x | {"q": randn(B, 1, HQ, D).to(dtype), "lengths": torch.full((B,), context, device=device)}

    return Case(
        op="loop_decode_attention",
        shape=f"B={B} context={context} H={HQ}/{H} D={D} {NAMES[dtype]}",
        dtype=dtype,
        flops=4 * B * context * HQ * D,
        moved=2 * B * context * H * D * dtype.itemsize,
        inputs=inputs,
        ours=timed(lambda x: {"o": ops.loop_decode_attention(x["q"], x["k"], x["v"], x["lengths"])}),
        torch=timed(decode_torch),
        oracle=oracle(decode_torch),
        graph=True,
    )


def selected_case(
    B: int, context: int, topk: int, HQ: int, H: int, D: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """Decode of the keys that an indexer has selected."""
    dense = decode_case(B, context, HQ, H, D, dtype, device)

    def inputs() -> Tensors:
        x, order = dense.inputs(), torch.Generator(device).manual_seed(1)
        rows = [torch.randperm(context, generator=order, device=device)[:topk].sort().values for _ in range(B)]
        return x | {"indices": torch.stack(rows).int()[:, None]}

    def ours(x: Tensors) -> Tensors:
        return {"o": ops.loop_decode_attention(x["q"], x["k"], x["v"], x["lengths"], indices=x["indices"])}

    def plain(x: Tensors) -> Tensors:
        rows = torch.arange(B, device=device)[:, None]
        return decode_torch(x | {n: x[n][rows, x["indices"][:, 0].long()] for n in ("k", "v")})

    return replace(
        dense,
        op="loop_decode_attention, indices",
        shape=f"{dense.shape} topk={topk}",
        flops=dense.flops * topk / context,
        moved=dense.moved * topk / context,
        inputs=inputs,
        ours=timed(ours),
        torch=timed(plain),
        oracle=oracle(plain),
    )


def decode_torch(x: Tensors) -> Tensors:
    q, k, v = (t.transpose(-3, -2) for t in (x["q"], x["k"], x["v"]))
    return {"o": F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)}
