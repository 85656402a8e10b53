"""What surrounds the mixers in a block: residual with norm, SwiGLU, gated norm, rotary positions into the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lt2_ext import ops
from lt2_ext.reference.block_ops import rotate

from . import NAMES, Call, Case, Forward, Tensors, generator, oracle, timed

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6


def cases(device: torch.device, quick: bool) -> list[Case]:
    rows = 8 * 4096 if device.type == "cuda" else 2048
    dtypes = (BF16,) if quick else (F32, BF16)
    shapes = {"add_rmsnorm": (rows, 2048), "swiglu": (rows, 5632), "gated_rmsnorm": (rows, 16, 128)}
    rowwise = [
        rowwise_case(name, shape, dtype, backward, device)
        for name, shape in shapes.items()
        for dtype in dtypes
        for backward in (False, True)
    ]
    steps = [linear_case(rows, name, BF16, device) for rows in ([1] if quick else [1, 8]) for name in PROJECTIONS]
    return rowwise + steps + [rope_case(B, 4096, 16, 4, 128, BF16, device) for B in ([8] if quick else [1, 8, 64])]


def ours_add(x: Tensors) -> Tensors:
    return dict(zip(("h", "normed"), ops.add_rmsnorm(x["x"], x["residual"], x["weight"], EPS), strict=True))


def torch_add(x: Tensors) -> Tensors:
    h = x["residual"] + x["x"]
    return {"h": h, "normed": F.rms_norm(h, h.shape[-1:], x["weight"].to(h.dtype), EPS)}


def torch_gated(x: Tensors) -> Tensors:
    o, z = (x[n].float() if x[n].dtype == BF16 else x[n] for n in ("o", "z"))
    normed = F.rms_norm(o, o.shape[-1:], x["weight"].to(o.dtype), EPS)
    return {"o": (normed * F.silu(z)).to(x["o"].dtype)}


# inputs but for the weight, outputs, ours, torch; every input and output is moved once, in the backward also their
# gradients, without the outputs that it does not read
ROWWISE: dict[str, tuple[tuple[str, ...], tuple[str, ...], Forward, Forward]] = {
    "add_rmsnorm": (("x", "residual"), ("h", "normed"), ours_add, torch_add),
    "swiglu": (
        ("gate", "up"),
        ("o",),
        lambda x: {"o": ops.swiglu(x["gate"], x["up"])},
        lambda x: {"o": F.silu(x["gate"]) * x["up"]},
    ),
    "gated_rmsnorm": (
        ("o", "z"),
        ("o",),
        lambda x: {"o": ops.gated_rmsnorm(x["o"], x["z"], x["weight"], EPS)},
        torch_gated,
    ),
}
FORWARD_MOVED = {"add_rmsnorm": 4, "swiglu": 3, "gated_rmsnorm": 3}
BACKWARD_MOVED = {"add_rmsnorm": 4, "swiglu": 5, "gated_rmsnorm": 5}


def rowwise_case(name: str, shape: tuple[int, ...], dtype: torch.dtype, backward: bool, device: torch.device) -> Case:
    arguments, outputs, ours, plain = ROWWISE[name]
    weighted = name != "swiglu"

    def inputs() -> Tensors:
        randn = generator(device)
        x = {n: randn(*shape).to(dtype) for n in (*arguments, *(f"grad_{o}" for o in outputs))}
        return x | {"weight": randn(shape[-1])} if weighted else x

    trained = (*arguments, *(("weight",) if weighted else ())) if backward else ()
    return Case(
        op=f"{name} {'fwd+bwd' if backward else 'fwd'}",
        shape=f"{list(shape)} {NAMES[dtype]}",
        dtype=dtype,
        flops=0,
        moved=(FORWARD_MOVED[name] + backward * BACKWARD_MOVED[name]) * torch.Size(shape).numel() * dtype.itemsize,
        inputs=inputs,
        ours=timed(ours, trained),
        torch=timed(plain, trained),
        oracle=oracle(plain, trained),
    )


# K, outputs, options of the projections of a decode step, as in a block of 1.3B parameters and 21 layers.
PROJECTIONS: dict[str, tuple[int, tuple[int, ...], tuple[str, ...]]] = {
    "norm, qkv, z, a, b": (2048, (6144, 3072, 16, 16), ("norm_weight",)),
    "o + residual": (3072, (2048,), ("residual",)),
    "norm, swiglu": (2048, (5632, 5632), ("norm_weight", "swiglu")),
    "down + residual": (5632, (2048,), ("residual",)),
}
LAYERS = 8  # of them one after the other: no cache holds all weights


def linear_case(rows: int, name: str, dtype: torch.dtype, device: torch.device) -> Case:
    K, outputs, options = PROJECTIONS[name]

    def inputs() -> Tensors:
        randn = generator(device)
        x = {"x": randn(rows, K), "norm_weight": randn(K), "residual": randn(rows, outputs[0])}
        weights = {f"w{i}": randn(LAYERS, n, K) * K**-0.5 for i, n in enumerate(outputs)}
        return {n: t.to(dtype) for n, t in (x | weights).items()}

    def arguments(x: Tensors, layer: int) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        given: dict[str, Any] = {n: x.get(n, True) for n in options}
        return x["x"], [x[f"w{i}"][layer] for i in range(len(outputs))], given | {"eps": EPS}

    def named(results: list[Tensor]) -> Tensors:
        return {f"o{i}": t for i, t in enumerate(results)}

    def ours(x: Tensors) -> Call:
        layers = [arguments(x, layer) for layer in range(LAYERS)]
        return torch.no_grad()(lambda: [named(ops.linear_step(a, w, **given)) for a, w, given in layers][-1])

    def plain(a: Tensor, weights: list[Tensor], given: dict[str, Any]) -> Tensors:
        if "norm_weight" in given:
            a = F.rms_norm(a, (K,), given["norm_weight"], EPS)
        results = [F.linear(a, w) for w in weights]
        if "swiglu" in given:
            results = [F.silu(results[0]) * results[1]]
        return named([r + given["residual"] if "residual" in given else r for r in results])

    def torch_(x: Tensors) -> Call:
        layers = [arguments(x, layer) for layer in range(LAYERS)]
        return torch.no_grad()(lambda: [plain(*layer) for layer in layers][-1])

    return Case(
        op=f"linear_step: {name}",
        shape=f"B={rows} K={K} {NAMES[dtype]}, {LAYERS} layers",
        dtype=dtype,
        flops=2 * LAYERS * rows * K * sum(outputs),
        moved=LAYERS * K * sum(outputs) * dtype.itemsize,
        inputs=inputs,
        ours=ours,
        torch=torch_,
        oracle=lambda x: torch_({n: t.double() for n, t in x.items()})(),
        graph=True,
    )


def rope_case(B: int, context: int, HQ: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    def inputs() -> Tensors:
        randn = generator(device)
        shapes = {"q": (B, 1, HQ, D), "k": (B, 1, H, D), "v": (B, 1, H, D)}
        shapes |= {"k_cache": (B, context, H, D), "v_cache": (B, context, H, D)}
        x = {n: randn(*shape).to(dtype) for n, shape in shapes.items()}
        angles = randn(B, 1, D // 2) * 10
        return x | {"cos": angles.cos(), "sin": angles.sin(), "places": torch.full((B, 1), context - 1, device=device)}

    def ours(x: Tensors) -> Call:
        caches = {n: x[n].clone() for n in ("k_cache", "v_cache")}
        return torch.no_grad()(lambda: {"q": ops.rope_cache_(**x | caches), **caches})

    def plain(x: Tensors) -> Call:
        caches = {n: x[n].clone() for n in ("k_cache", "v_cache")}
        rows = torch.arange(B, device=x["q"].device)[:, None]

        def call() -> Tensors:
            new = {"k_cache": rotate(x["k"], x["cos"], x["sin"]), "v_cache": x["v"]}
            for n, cache in caches.items():
                cache[rows, x["places"]] = new[n]
            return {"q": rotate(x["q"], x["cos"], x["sin"]), **caches}

        return torch.no_grad()(call)

    return Case(
        op="rope_cache_",
        shape=f"B={B} H={HQ}/{H} D={D} {NAMES[dtype]}",
        dtype=dtype,
        flops=0,
        moved=2 * B * (HQ + 2 * H) * D * dtype.itemsize,
        inputs=inputs,
        ours=ours,
        torch=plain,
        oracle=lambda x: plain({n: t.double() if t.is_floating_point() else t for n, t in x.items()})(),
        graph=True,
    )
