"""The short causal depthwise convolution with SiLU: sequences, and the decode step."""

from __future__ import annotations

import peers
import torch
from torch.nn import functional as F

from lt2_ext import ops

from . import NAMES, Call, Case, Tensors, generator, oracle, timed

F32, BF16 = torch.float32, torch.bfloat16


def cases(device: torch.device, quick: bool) -> list[Case]:
    shape = (4, 8192, 4096) if device.type == "cuda" else (1, 2048, 2048)
    rows = [conv_case(*shape, 4, dtype, backward, device) for dtype in (F32, BF16) for backward in (False, True)]
    batches = ([8] if quick else [1, 8, 64]) + ([512] if device.type == "cuda" else [])
    return rows + [step_case(B, shape[2], 4, BF16, device) for B in batches]


def conv_case(B: int, T: int, D: int, W: int, dtype: torch.dtype, backward: bool, device: torch.device) -> Case:
    trained = ("x", "weight") if backward else ()

    def inputs() -> Tensors:
        randn = generator(device)
        x = {n: randn(B, T, D).to(dtype) for n in ("x", "grad_o")}
        return x | {"weight": (randn(D, W) / 2).to(dtype)}

    return Case(
        op="causal_conv1d fwd+bwd" if backward else "causal_conv1d fwd",
        shape=f"[{B}, {T}, {D}] W={W} {NAMES[dtype]}",
        dtype=dtype,
        flops=B * T * D * W * (6 if backward else 2),
        moved=B * T * D * dtype.itemsize * (5 if backward else 2),  # x -> y; x dy -> dx
        inputs=inputs,
        ours=timed(lambda x: {"o": ops.causal_conv1d(x["x"], x["weight"])[0]}, trained),
        torch=timed(conv_torch, trained),
        oracle=oracle(conv_torch, trained),
        peers={"causal_conv1d": timed(peers.causal_conv1d_forward, trained)},
    )


def conv_torch(x: Tensors) -> Tensors:
    D, W = x["weight"].shape
    y = F.conv1d(F.pad(x["x"].transpose(1, 2), (W - 1, 0)), x["weight"][:, None], groups=D)
    return {"o": F.silu(y).transpose(1, 2)}


def step_case(B: int, D: int, W: int, dtype: torch.dtype, device: torch.device) -> Case:
    def inputs() -> Tensors:
        randn = generator(device)
        return {n: randn(*size).to(dtype) for n, size in {"x": (B, D), "weight": (D, W), "state": (B, D, W)}.items()}

    return Case(
        op="causal_conv1d step",
        shape=f"[{B}, {D}] W={W} {NAMES[dtype]}",
        dtype=dtype,
        flops=B * D * W * 2,
        moved=(2 * B * D * W + D * W + 2 * B * D) * dtype.itemsize,
        inputs=inputs,
        ours=step_ours,
        torch=step_torch,
        oracle=lambda x: step_torch({n: t.double() for n, t in x.items()})(),
        graph=True,
    )


def step_ours(x: Tensors) -> Call:
    state = x["state"].clone()
    return lambda: {"o": ops.causal_conv1d_step_(state, x["x"], x["weight"]), "state": state}


def step_torch(x: Tensors) -> Call:
    state = x["state"].clone()

    def call() -> Tensors:
        state.copy_(torch.cat([state[..., 1:], x["x"][..., None]], -1))
        return {"o": F.silu((state * x["weight"]).sum(-1)), "state": state}

    return torch.no_grad()(call)
