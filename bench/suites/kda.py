"""Recurrences with a decay per key channel: KDA and GLA, prefill and training shapes, and the decode step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import peers
import torch
from torch import Tensor
from torch.nn import functional as F

from lt2_ext import ops
from lt2_ext.reference import kda as reference

from . import NAMES, Call, Case, Tensors, generator, oracle, timed
from .gdn import WIDE, Shape

F32, BF16 = torch.float32, torch.bfloat16
TRAINED = ("q", "k", "v", "g", "beta")
MAIN = Shape()
CPU = [  # (shape, dtype, with gradients, with the delta rule, part of --quick)
    (MAIN, F32, False, True, True),
    (MAIN, F32, True, True, False),
    (MAIN, BF16, False, True, True),
    (MAIN, BF16, True, True, False),
    (MAIN, F32, False, False, True),
    (MAIN, BF16, False, False, False),
    (MAIN, BF16, True, False, False),
    (WIDE, F32, False, True, False),
    (WIDE, BF16, False, True, False),
    (WIDE, F32, False, False, False),
    (WIDE, BF16, False, False, False),
]
LONG = Shape(T=8192, H=16, HV=16)
CHECKED = 1024  # tokens of a longer sequence that float64 is run on
CUDA = [
    (shape, BF16, backward, delta, delta)
    for shape in (LONG, replace(LONG, T=32768), replace(LONG, B=8, T=4096), replace(LONG, B=4))
    for backward in (False, True)
    for delta in (True, False)
]
FORWARD = replace(LONG, T=131072), replace(LONG, T=32768, HV=64)  # forward only
CUDA += [(shape, BF16, False, delta, False) for shape in FORWARD for delta in (True, False)]
CPU_STEPS = [(8, 32, F32), (8, 32, BF16)]
CUDA_STEPS = [(B, 32, BF16) for B in (1, 8, 32, 128)]


def cases(device: torch.device, quick: bool) -> list[Case]:
    rows, steps = (CUDA, CUDA_STEPS) if device.type == "cuda" else (CPU, CPU_STEPS)
    chunked = [chunk_case(s, dtype, back, delta, device) for s, dtype, back, delta, fast in rows if fast or not quick]
    return chunked + [step_case(B, H, 128, dtype, device) for B, H, dtype in steps]


def chunk_case(s: Shape, dtype: torch.dtype, backward: bool, delta: bool, device: torch.device) -> Case:
    trained = tuple(n for n in TRAINED if delta or n != "beta") if backward else ()
    products = 5 if delta else 3  # of [C, K] or [C, C] by [K, V] for a token, as in gdn's suite

    def inputs(T: int = s.T) -> Tensors:
        randn = generator(device)
        x = {n: randn(s.B, T, s.H, s.K) for n in ("q", "k")}
        x |= {n: randn(s.B, T, s.HV, s.V).to(dtype) for n in ("v", "grad_o")}
        x |= {n: F.normalize(x[n], dim=-1).to(dtype) for n in ("q", "k")}
        g = F.logsigmoid(randn(s.B, T, s.HV, s.K) + 2)
        return x | {"g": g} | ({"beta": randn(s.B, T, s.HV).sigmoid()} if delta else {})

    rows = s.B * s.T * s.HV
    moved = rows * (dtype.itemsize * (2 * s.K + 2 * s.V) + 4 * s.K) * (3 if backward else 1)
    name = "kda" if delta else "gla"
    return Case(
        op=f"{name} fwd+bwd" if backward else f"{name} fwd",
        shape=f"{s} {NAMES[dtype]}",
        dtype=dtype,
        flops=rows * 2 * products * s.K * s.V * (3 if backward else 1),
        moved=moved,
        inputs=inputs,
        checked=(lambda: inputs(CHECKED)) if s.T > CHECKED else None,
        ours=timed(ours, trained),
        torch=timed(partial(plain, delta), trained),
        oracle=oracle(partial(plain, delta), trained),
        peers={"fla": timed(peers.fla_kda, trained)},
        headline=s == MAIN,
    )


def ours(x: Tensors) -> Tensors:
    if "beta" in x:
        return {"o": ops.chunk_kda(x["q"], x["k"], x["v"], x["g"], x["beta"])[0]}
    return {"o": ops.chunk_gla(x["q"], x["k"], x["v"], x["g"])[0]}


def plain(delta: bool, x: Tensors) -> Tensors:
    tensors = (x["q"], x["k"], x["v"], x["g"], x.get("beta"))
    return {"o": reference.kda(*tensors, delta=delta, rule=reference.chunks)[0]}


def step_case(B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    def inputs() -> Tensors:
        randn = generator(device)
        x = {n: randn(B, 1, H, D) for n in ("q", "k", "v")}
        x |= {n: F.normalize(x[n], dim=-1) for n in ("q", "k")}
        x = {n: t.to(dtype) for n, t in x.items()}
        return x | {"g": F.logsigmoid(randn(B, 1, H, D)), "beta": randn(B, 1, H).sigmoid(), "state": randn(B, H, D, D)}

    return Case(
        op="kda decode step",
        shape=f"B={B} H={H} K=V={D} {NAMES[dtype]}",
        dtype=dtype,
        flops=B * H * 6 * D * D,
        moved=B * H * (2 * D * D * 4 + D * (4 * dtype.itemsize + 4)),
        inputs=inputs,
        ours=step_ours,
        torch=step_torch,
        oracle=oracle(lambda x: dict(zip(("o", "state"), reference.kda_step(**x), strict=True))),
        graph=True,
    )


def step_ours(x: Tensors) -> Call:
    state, args = x["state"].clone(), [x[n] for n in TRAINED]
    return lambda: {"o": ops.kda_step_(state, *args), "state": state}


def step_torch(x: Tensors) -> Call:
    """In place."""
    S = x["state"].clone()

    def rows(t: Tensor) -> Tensor:  # [B, 1, H, D] -> [B, H, 1, D]
        return t.float().transpose(1, 2)

    def call() -> Tensors:
        q, k, v = rows(x["q"]), rows(x["k"]), rows(x["v"])
        S.mul_(rows(x["g"]).exp().mT)
        S.add_(k.mT * (x["beta"].transpose(1, 2)[..., None] * (v - k @ S)))
        return {"o": (q.shape[-1] ** -0.5 * (q @ S)).transpose(1, 2).to(x["v"].dtype), "state": S}

    return torch.no_grad()(call)
