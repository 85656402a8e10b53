"""What every operator of torch.ops.lt2 promises, by enumeration: an operator without an entry below fails.

Kernels, fakes, autograd and schemas fit together (opcheck); meta tensors give the shapes of real ones; torch.compile
takes the operator in one graph, static and dynamic; wrong arguments are named.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lt2_ext import ops
from lt2_ext.ops import _common
from lt2_ext.testing import gdn_inputs

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass
class Contract:
    samples: Callable[[], list[dict[str, Any]]]  # arguments by name, on the CPU; the last sample has every option
    rejected: dict[str, Any]  # a wrong value of an argument, by its name
    differentiable: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


GDN_OPTIONS = {"scale": 0.2, "use_qk_l2norm": True, "use_beta_sigmoid": True, "allow_neg_eigval": True}


def gdn_samples() -> list[dict[str, Any]]:
    absent = dict.fromkeys(("g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens"))
    off = {"scale": 1.0, "use_qk_l2norm": False, "use_beta_sigmoid": False, "allow_neg_eigval": False}
    x = gdn_inputs(B=2, T=5, HV=4, K=8, V=6)
    plain = {n: x[n] for n in "qkv"} | absent | off | {"state_v_first": False, "delta": False}
    full = gdn_inputs(T=9, HV=4, K=8, V=6, sequences=3, dtype=BF16)
    full["initial_state"] = full["initial_state"].mT.contiguous()
    full |= {"A_log": torch.randn(4), "dt_bias": torch.randn(4), "cu_seqlens": torch.tensor([0, 3, 3, 9])}
    return [plain, plain | full | GDN_OPTIONS | {"state_v_first": True, "delta": True}]


def gdn_fwd() -> list[dict[str, Any]]:
    plain, full = gdn_samples()
    return [
        plain | {"output_final_state": False, "recurrent": True},
        full | {"output_final_state": True, "recurrent": False},
    ]


def gdn_bwd() -> list[dict[str, Any]]:
    plain, full = gdn_samples()
    dout = [torch.randn_like(s["v"]) for s in (plain, full)]
    return [
        {"dout": dout[0], "dfinal_state": None} | plain | {"recurrent": True},
        {"dout": dout[1], "dfinal_state": torch.randn_like(full["initial_state"])} | full | {"recurrent": False},
    ]


def gdn_step() -> list[dict[str, Any]]:
    x = gdn_inputs(B=2, T=2, HV=4, K=8, V=6)
    a, b = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    sample = {"state": x["initial_state"], "q": x["q"], "k": x["k"], "v": x["v"], "a": a, "b": b,
              "A_log": torch.randn(4), "dt_bias": torch.randn(4), "slots": None, "scale": 0.2, "use_qk_l2norm": True,
              "use_beta_sigmoid": False, "allow_neg_eigval": False, "state_v_first": False,
              "delta": False}  # fmt: skip
    pool = torch.randn(5, 3, 4, 6, 8)[:, 1]
    low = {n: x[n].to(BF16) for n in "qkv"}
    options = {"slots": torch.tensor([3, -1]), "use_beta_sigmoid": True, "allow_neg_eigval": True,
               "state_v_first": True, "delta": True}  # fmt: skip
    return [sample, sample | low | options | {"state": pool}]


def with_channel_decays(sample: dict[str, Any]) -> dict[str, Any]:
    """Arguments of kda_fwd and kda_bwd out of gdn's."""
    B, T, HV = sample["v"].shape[:3]
    raw = {} if sample["dt_bias"] is None else {"dt_bias": torch.randn(HV * 8)}
    return sample | {"g": -torch.rand(B, T, HV, 8)} | raw


def kda_fwd() -> list[dict[str, Any]]:
    return [with_channel_decays(s) for s in gdn_fwd()]


def kda_bwd() -> list[dict[str, Any]]:
    return [with_channel_decays(s) for s in gdn_bwd()]


def kda_step() -> list[dict[str, Any]]:
    plain, full = ({n: v for n, v in s.items() if n not in ("a", "b")} for s in gdn_step())
    plain |= {"g": -torch.rand(2, 2, 4, 8), "beta": None, "A_log": None, "dt_bias": None}
    return [plain, full | {"g": torch.randn(2, 2, 4, 8), "beta": torch.randn(2, 2, 4), "dt_bias": torch.randn(32)}]


def gdn_fused() -> list[dict[str, Any]]:
    sample = {"state": torch.randn(2, 4, 8, 12), "conv_state": torch.randn(2, 80, 4), "qkv": torch.randn(2, 3, 80),
              "z": torch.randn(2, 3, 4, 12), "a": torch.randn(2, 3, 4), "b": torch.randn(2, 3, 4),
              "conv_weight": torch.randn(80, 4), "conv_bias": None, "A_log": torch.randn(4),
              "dt_bias": torch.randn(4), "norm_weight": torch.randn(12), "slots": None, "scale": 0.2, "eps": 1e-6,
              "use_qk_l2norm": True, "allow_neg_eigval": False, "state_v_first": False}  # fmt: skip
    low = {n: sample[n].to(BF16) for n in ("qkv", "z", "a", "b")}
    pools = {"state": torch.randn(5, 3, 4, 12, 8)[:, 1], "conv_state": torch.randn(4, 5, 80).to(BF16).permute(1, 2, 0)}
    options = {"slots": torch.tensor([3, -1]), "conv_bias": torch.randn(80), "allow_neg_eigval": True}
    return [sample, sample | low | pools | options | {"state_v_first": True}]


def conv_samples() -> list[dict[str, Any]]:
    plain = {"x": torch.randn(2, 5, 6), "weight": torch.randn(6, 4), "bias": None, "initial_state": None,
             "cu_seqlens": None, "silu": False}  # fmt: skip
    full = {"x": torch.randn(1, 9, 6).to(BF16), "bias": torch.randn(6), "initial_state": torch.randn(3, 6, 4).to(BF16),
            "cu_seqlens": torch.tensor([0, 3, 3, 9], dtype=torch.int32), "silu": True}  # fmt: skip
    return [plain, plain | full]


def conv_fwd() -> list[dict[str, Any]]:
    plain, full = conv_samples()
    return [plain | {"output_final_state": False}, full | {"output_final_state": True}]


def conv_bwd() -> list[dict[str, Any]]:
    plain, full = conv_samples()
    return [
        {"dy": torch.randn_like(plain["x"]), "dfinal_state": None} | plain,
        {"dy": torch.randn_like(full["x"]), "dfinal_state": torch.randn_like(full["initial_state"])} | full,
    ]


def conv_step() -> list[dict[str, Any]]:
    sample = {"state": torch.randn(2, 6, 4), "x": torch.randn(2, 3, 6), "weight": torch.randn(6, 4), "bias": None,
              "slots": None, "silu": False}  # fmt: skip
    options = {"bias": torch.randn(6), "slots": torch.tensor([3, -1]), "silu": True}
    return [sample, sample | options | {"state": torch.randn(5, 2, 6, 4)[:, 1]}]


def indexer_samples() -> list[dict[str, Any]]:
    plain = {"q_idx": torch.randn(2, 5, 3, 8), "k_idx": torch.randn(2, 7, 8), "w_idx": None, "cu_seqlens": None,
             "cu_seqlens_k": None, "q_offset": None, "topk": 4, "scale": 0.3, "relu": False, "pool": 0,
             "blocks": 0}  # fmt: skip
    full = {"q_idx": torch.randn(1, 9, 2, 8).to(BF16), "k_idx": torch.randn(1, 12, 8).to(BF16),
            "w_idx": torch.randn(1, 9, 2), "cu_seqlens": torch.tensor([0, 3, 3, 9]),
            "cu_seqlens_k": torch.tensor([1, 5, 5, 12]), "q_offset": torch.tensor([1, 0, -2]),
            "relu": True}  # fmt: skip
    return [plain, plain | full, plain | {"pool": 64, "blocks": 1}]


def attention_samples() -> list[dict[str, Any]]:
    plain = {"q": torch.randn(2, 5, 4, 8), "k": torch.randn(2, 7, 2, 8), "v": torch.randn(2, 7, 2, 16),
             "indices": torch.randint(-2, 8, (2, 5, 3), dtype=torch.int32), "cu_seqlens": None, "cu_seqlens_k": None,
             "q_offset": None, "scale": 0.3, "window": 0}  # fmt: skip
    full = {"q": torch.randn(1, 9, 4, 8).to(BF16), "k": torch.randn(1, 12, 2, 8).to(BF16),
            "v": torch.randn(1, 12, 2, 16).to(BF16), "indices": torch.randint(-2, 8, (1, 9, 5), dtype=torch.int32),
            "cu_seqlens": torch.tensor([0, 3, 3, 9]), "cu_seqlens_k": torch.tensor([1, 5, 5, 12]),
            "q_offset": torch.tensor([1, 0, -2])}  # fmt: skip
    return [plain, plain | full, plain | {"indices": None, "window": 3}]


def attention_bwd() -> list[dict[str, Any]]:
    samples = []
    for s, with_lse in zip(attention_samples(), (False, True, False), strict=True):
        o, lse = torch.ops.lt2.dsa_attention_fwd(**s)
        dlse = torch.randn_like(lse) if with_lse else None
        samples.append(s | {"dout": torch.randn_like(o), "dlse": dlse, "o": o, "lse": lse})
    return samples


def loss_samples() -> list[dict[str, Any]]:
    plain = {"q_idx": torch.randn(2, 5, 3, 8), "k_idx": torch.randn(2, 7, 8), "w_idx": None,
             "q": torch.randn(2, 5, 4, 16), "k": torch.randn(2, 7, 2, 16), "lse": torch.randn(2, 5, 4),
             "indices": None, "cu_seqlens": None, "index_scale": 0.3, "attn_scale": 0.2}  # fmt: skip
    full = {n: plain[n][:1].to(BF16) for n in ("q_idx", "k_idx", "q", "k")}
    full |= {"w_idx": torch.randn(1, 5, 3), "lse": torch.randn(1, 5, 4), "cu_seqlens": torch.tensor([0, 3, 3, 4]),
             "indices": torch.randint(-2, 4, (1, 5, 3), dtype=torch.int32)}  # fmt: skip
    return [plain, plain | full]


def loss_bwd() -> list[dict[str, Any]]:
    samples = []
    for s in loss_samples():
        loss, statistics = torch.ops.lt2.indexer_loss_fwd(**s)
        samples.append(s | {"dloss": torch.randn_like(loss), "statistics": statistics})
    return samples


def residual_samples() -> list[dict[str, Any]]:
    plain = {"h": torch.randn(2, 3, 6), "h_in": torch.randn(2, 3, 6), "rho": torch.randn(6)}
    strided = torch.randn(5, 2, 8).to(BF16).transpose(0, 1)
    return [plain, {"h": strided, "h_in": torch.randn_like(strided), "rho": torch.randn(8)}]


def residual_bwd() -> list[dict[str, Any]]:
    return [{"dout": s["h"], "h_in": s["h_in"], "rho": s["rho"]} for s in residual_samples()]


def residual_rmsnorm() -> list[dict[str, Any]]:
    return [s | {"weight": torch.randn_like(s["rho"]), "eps": 1e-5} for s in residual_samples()]


def residual_rmsnorm_bwd() -> list[dict[str, Any]]:
    samples = []
    for s in residual_rmsnorm():
        h = s.pop("h")
        del s["eps"]
        rstd = h.float().square().mean(-1).add(1e-5).rsqrt().flatten()
        samples.append({"dh_out": torch.randn_like(h), "dnormed": torch.randn_like(h), "h_out": h, "rstd": rstd} | s)
    return samples


def swiglu_samples() -> list[dict[str, Any]]:
    gate, up = torch.randn(3, 2, 16).to(BF16).transpose(0, 1).chunk(2, -1)
    return [{"gate": torch.randn(2, 3, 6), "up": torch.randn(2, 3, 6)}, {"gate": gate, "up": up}]


def swiglu_bwd() -> list[dict[str, Any]]:
    return [{"dout": torch.randn_like(s["gate"])} | s for s in swiglu_samples()]


def gated_rmsnorm_samples() -> list[dict[str, Any]]:
    plain, full = ({"o": s["gate"], "z": s["up"], "eps": 1e-5} for s in swiglu_samples())
    return [plain | {"weight": torch.randn(6)}, full | {"weight": torch.randn(8)}]


def gated_rmsnorm_bwd() -> list[dict[str, Any]]:
    samples = gated_rmsnorm_samples()
    for s in samples:
        rstd = s["o"].float().square().mean(-1).add(s.pop("eps")).rsqrt().flatten()
        s |= {"dout": torch.randn_like(s["o"]), "rstd": rstd}
    return samples


def rope_cache() -> list[dict[str, Any]]:
    plain = {"k_cache": torch.randn(2, 7, 2, 8), "v_cache": torch.randn(2, 7, 2, 6), "q": torch.randn(2, 3, 4, 8),
             "k": torch.randn(2, 3, 2, 8), "v": torch.randn(2, 3, 2, 6), "cos": torch.randn(1, 3, 4),
             "sin": torch.randn(1, 3, 4), "places": torch.tensor([[0, 1, 2], [6, 0, 1]]), "slots": None}  # fmt: skip
    low = {n: plain[n].to(BF16) for n in ("q", "k", "v")}
    full = {n: torch.randn(5, 3, *plain[n].shape[1:]).to(BF16)[:, 1] for n in ("k_cache", "v_cache")}
    full |= {"cos": torch.randn(2, 3, 4), "sin": torch.randn(2, 3, 4), "slots": torch.tensor([4, -1])}
    return [plain, plain | low | full]


def linear_step() -> list[dict[str, Any]]:
    absent = {"norm_weight": None, "residual": None, "eps": 1e-5, "swiglu": False, "settled": False, "floats": 1}
    plain = {"x": torch.randn(2, 1, 24).to(BF16), "weights": [torch.randn(n, 24).to(BF16) for n in (5, 32)]} | absent
    full = {"x": torch.randn(1, 3, 24).to(BF16), "weights": [torch.randn(20, 24).to(BF16) for _ in range(2)]}
    return [plain, full | {"norm_weight": torch.randn(24), "residual": torch.randn(1, 3, 20).to(BF16), "eps": 1e-5,
                           "swiglu": True, "settled": True, "floats": 0}]  # fmt: skip


def mlp_step() -> list[dict[str, Any]]:
    shapes = {"o": (2, 1, 24), "residual": (2, 1, 40), "output": (40, 24), "norm_weight": (40,), "gate": (56, 40),
              "up": (56, 40), "down": (40, 56)}  # fmt: skip
    plain = {n: torch.randn(shape).to(BF16) for n, shape in shapes.items()} | {"eps": 1e-5}
    return [plain, plain | {"norm_weight": torch.randn(40), "eps": 1e-6}]


def block_weights(mixed: int, *projected: int) -> dict[str, Any]:
    """hidden 24, SwiGLU of 40; outputs of the projections, and input of the mixer's output."""
    rest = [torch.randn(s).to(BF16) for s in ((24, mixed), (24,), (40, 24), (40, 24), (24, 40))]
    projections = [torch.randn(n, 24).to(BF16) for n in projected]
    return {"norm_weight": torch.randn(24).to(BF16), "projections": projections, "rest": rest, "eps": 1e-5}


def gdn_block() -> list[dict[str, Any]]:
    names = "state", "conv_weight", "A_log", "dt_bias"
    fused = gdn_fused()[0]
    plain = {n: fused[n] for n in names} | {"head_norm_weight": fused["norm_weight"], "slots": None}
    plain |= {"h": torch.randn(2, 3, 24).to(BF16), "conv_state": fused["conv_state"].to(BF16)}
    plain |= block_weights(48, 80, 48, 4, 4)
    return [plain, plain | {"norm_weight": torch.randn(24), "slots": torch.tensor([1, -1])}]


def attention_block() -> list[dict[str, Any]]:
    h, weights, samples = torch.randn(2, 3, 24).to(BF16), block_weights(24, 32, 16, 12), []
    weights |= {"index_cache": None, "index_where": [], "topk": 1, "index_scale": 1.0}
    for x in rope_cache():
        caches = {n: x[n].to(BF16) for n in ("k_cache", "v_cache")}
        where = {n: x[n] for n in ("cos", "sin", "places", "slots")} | {"lengths": torch.tensor([3, 7])}
        samples.append({"h": h} | caches | where | weights)
        angles = [torch.randn(2, 3, 4) for _ in ("cos", "sin")]
        index = {"index_cache": torch.randn(len(x["k_cache"]), 7, 8).to(BF16), "topk": 4, "index_scale": 0.3}
        index |= block_weights(24, 32, 16, 12, 16, 8, 2) | {"index_where": [*angles, torch.tensor([0, 4])]}
        samples.append(samples[-1] | index)
    return samples


def decode_attention() -> list[dict[str, Any]]:
    plain = {"q": torch.randn(2, 1, 4, 8), "k_cache": torch.randn(2, 7, 2, 8), "v_cache": torch.randn(2, 7, 2, 6),
             "lengths": torch.tensor([3, 7]), "slots": None, "indices": None, "loop_map": None,
             "scale": 0.3}  # fmt: skip
    full = {"q": torch.randn(2, 3, 4, 8).to(BF16), "k_cache": torch.randn(3, 5, 7, 2, 8).to(BF16),
            "v_cache": torch.randn(3, 5, 7, 2, 6).to(BF16), "lengths": torch.tensor([3, 7], dtype=torch.int32),
            "slots": torch.tensor([4, -1]), "loop_map": torch.tensor([2, 0]),
            "indices": torch.randint(-2, 8, (2, 3, 4), dtype=torch.int32)}  # fmt: skip
    return [plain, plain | full]


def zero_slots() -> list[dict[str, Any]]:
    pool = torch.randn(3, 5, 4, 6).transpose(0, 1)
    return [
        {"state": torch.randn(4, 6), "slots": torch.tensor([2, 0])},
        {"state": pool.to(BF16), "slots": torch.tensor([4, -1, 1])},
    ]


def copy_slots() -> list[dict[str, Any]]:
    return [{"state": s["state"], "src": s["slots"], "dst": s["slots"].flip(0)} for s in zero_slots()]


CONTRACTS = {
    "gdn_fwd": Contract(gdn_fwd, {"k": torch.zeros(2, 5, 2, 7), "beta": torch.zeros(2, 5, 3)}, differentiable=True),
    "gdn_bwd": Contract(gdn_bwd, {"dout": torch.zeros(2, 5, 4, 7), "v": torch.zeros(2, 5, 3, 6)}),
    "gdn_step_": Contract(gdn_step, {"state": torch.zeros(2, 4, 8, 7), "slots": torch.zeros(3, dtype=torch.int64)}),
    "gdn_decode_fused_": Contract(gdn_fused, {"z": torch.zeros(2, 3, 4, 8), "norm_weight": torch.zeros(8)}),
    "kda_fwd": Contract(kda_fwd, {"g": torch.zeros(2, 5, 4, 7), "k": torch.zeros(2, 5, 2, 7)}, differentiable=True),
    "kda_bwd": Contract(kda_bwd, {"dout": torch.zeros(2, 5, 4, 7), "g": torch.zeros(2, 5, 4)}),
    "kda_step_": Contract(kda_step, {"state": torch.zeros(2, 4, 8, 7), "slots": torch.zeros(3, dtype=torch.int64)}),
    "causal_conv1d_fwd": Contract(conv_fwd, {"weight": torch.zeros(7, 4)}, differentiable=True),
    "causal_conv1d_bwd": Contract(conv_bwd, {"dy": torch.zeros(2, 5, 7)}),
    "causal_conv1d_step_": Contract(conv_step, {"state": torch.zeros(2, 6, 3)}),
    "lightning_indexer": Contract(
        indexer_samples,
        {"k_idx": torch.zeros(2, 7, 16), "w_idx": torch.zeros(2, 5, 2), "topk": 0, "pool": 48},
    ),
    "dsa_attention_fwd": Contract(
        attention_samples,
        {"k": torch.zeros(2, 7, 2, 16), "v": torch.zeros(2, 6, 2, 8), "indices": torch.zeros(2, 5, 3)},
        differentiable=True,
    ),
    "dsa_attention_bwd": Contract(attention_bwd, {"dout": torch.zeros(2, 5, 4, 8)}),
    "indexer_loss_fwd": Contract(
        loss_samples,
        {
            "k_idx": torch.zeros(2, 7, 16),
            "q": torch.zeros(2, 6, 4, 16),
            "k": torch.zeros(2, 6, 2, 16),
            "lse": torch.zeros(2, 5, 3),
            "w_idx": torch.zeros(2, 5, 2),
            "indices": torch.zeros(2, 5, 3),
        },
        differentiable=True,
    ),
    "indexer_loss_bwd": Contract(loss_bwd, {"dloss": torch.zeros(1), "statistics": torch.zeros(20)}),
    "swiglu_fwd": Contract(swiglu_samples, {"up": torch.zeros(2, 3, 7)}, differentiable=True),
    "swiglu_bwd": Contract(swiglu_bwd, {"dout": torch.zeros(2, 3, 7), "up": torch.zeros(2, 3, 7)}),
    "gated_rmsnorm_fwd": Contract(
        gated_rmsnorm_samples, {"z": torch.zeros(2, 3, 7), "weight": torch.zeros(7)}, differentiable=True
    ),
    "gated_rmsnorm_bwd": Contract(gated_rmsnorm_bwd, {"dout": torch.zeros(2, 3, 7), "rstd": torch.zeros(7)}),
    "rope_cache_": Contract(
        rope_cache,
        {
            "v_cache": torch.zeros(2, 6, 2, 6),
            "q": torch.zeros(2, 3, 4, 7),
            "k": torch.zeros(2, 3, 1, 8),
            "v": torch.zeros(2, 3, 2, 8),
            "cos": torch.zeros(2, 3, 8),
            "sin": torch.zeros(1, 3, 3),
            "places": torch.zeros(2, 2, dtype=torch.int64),
            "slots": torch.zeros(2),
        },
    ),
    "linear_step": Contract(
        linear_step,
        {
            "x": torch.zeros(17, 24, dtype=BF16),
            "weights": [],
            "norm_weight": torch.zeros(7),
            "residual": torch.zeros(5),
        },
    ),
    "mlp_step": Contract(
        mlp_step,
        dict.fromkeys(("residual", "output", "norm_weight", "gate", "up"), torch.zeros(7))
        | {"o": torch.zeros(17, 24), "down": torch.zeros(41, 56)},
    ),
    "gdn_block_step_": Contract(gdn_block, {"state": torch.zeros(2, 4, 8), "projections": [], "rest": []}),
    "attention_block_step_": Contract(
        attention_block,
        {"h": torch.zeros(2, 24), "k_cache": torch.zeros(2, 7, 2), "projections": [], "rest": []},
    ),
    "loop_residual_fwd": Contract(residual_samples, {"h_in": torch.zeros(2, 3, 7)}, differentiable=True),
    "loop_residual_bwd": Contract(residual_bwd, {"rho": torch.zeros(7)}),
    "loop_residual_rmsnorm_fwd": Contract(residual_rmsnorm, {"weight": torch.zeros(7)}, differentiable=True),
    "loop_residual_rmsnorm_bwd": Contract(residual_rmsnorm_bwd, {"rstd": torch.zeros(7)}),
    "loop_decode_attention": Contract(
        decode_attention,
        {"v_cache": torch.zeros(2, 6, 2, 6), "lengths": torch.zeros(2), "indices": torch.zeros(2, 1, 3)},
    ),
    "loop_state_zero_": Contract(zero_slots, {"slots": torch.zeros(2)}),
    "loop_state_copy_": Contract(copy_slots, {"dst": torch.zeros(3, dtype=torch.int64)}),
}


def registered() -> list[str]:
    return sorted(s.name.removeprefix("lt2::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("lt2::"))


def operator(name: str) -> Any:
    return getattr(torch.ops.lt2, name).default


def arguments(name: str, sample: dict[str, Any], device: str = "cpu") -> tuple[Any, ...]:
    """In the order of the schema, all of them, on ``device``."""
    names = [a.name for a in operator(name)._schema.arguments]
    assert set(names) == set(sample), f"{name}: samples must have exactly the arguments of the schema"
    return tuple(on_device(sample[n], device) for n in names)


def on_device(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [on_device(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def require_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or ())


@pytest.fixture(params=CONTRACTS)
def name(request, device):
    if device not in CONTRACTS[request.param].devices:
        pytest.skip(f"lt2::{request.param} has no {device} kernel")
    return request.param


@pytest.fixture(params=[0, 1], ids=["plain", "full"])
def case(request, name, device):
    """An operator and its arguments, without and with options."""
    contract = CONTRACTS[name]
    return operator(name), arguments(name, contract.samples()[request.param], device), contract


def test_every_operator_has_a_contract():
    assert registered() == sorted(CONTRACTS)


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_operator_has_its_kernels(name):
    for device in CONTRACTS[name].devices:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lt2::{name}", device.upper())


def test_opcheck(case):
    op, args, contract = case
    torch.library.opcheck(op, args)
    if contract.differentiable:
        torch.library.opcheck(op, require_gradients(args))


def test_meta_tensors_give_the_shapes_of_real_ones(case):
    op, args, _ = case
    meta = on_device(list(args), "meta")
    for fake, real in zip(tensors(op(*meta)), tensors(op(*args)), strict=True):
        assert fake.is_meta
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(case, dynamic, backend):
    op, args, contract = case
    torch.compiler.reset()

    def f(*args):
        result = op(*args)
        return [t + 1 for t in tensors(result)], [a for a in args if isinstance(a, Tensor)]

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)
    assert_same(compiled(*copy.deepcopy(args)), f(*copy.deepcopy(args)))
    if contract.differentiable:
        assert_same(gradients(compiled, args), gradients(f, args))


def gradients(f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    args = require_gradients(args)
    outputs, _ = f(*args)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    outputs = [o for o in outputs if o.numel() and o.requires_grad]
    return torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs], allow_unused=True)


def test_what_public_functions_run_has_the_derivative_of_the_operator(case):
    """Nothing compiles here, so they run an autograd.Function."""
    op, args, contract = case
    refuses = op._schema.name.endswith("_bwd")  # a second derivative
    assert (op in _common._functions) == (contract.differentiable or refuses)

    def through(f):
        return gradients(lambda *args: (tensors(f(*args)), []), args)

    if contract.differentiable:
        assert_same(through(functools.partial(_common.run, op)), through(op))


def test_transforms_of_functions(device):
    """torch.func.grad is the gradient, vmap a loop; forward mode, which would drop tangents, is an error."""
    x = gdn_inputs(T=9, K=16, V=16, device=device)

    def loss(q):
        return ops.chunk_gated_delta_rule(**x | {"q": q})[0].square().sum()

    q = x["q"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(q), q)
    assert_same(torch.func.grad(loss)(x["q"]), expected)
    many = torch.stack([x["q"], 2 * x["q"]])
    assert_same(torch.vmap(loss)(many), torch.stack([loss(q) for q in many]))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (x["q"],), (x["q"],))


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name, argument", [(n, a) for n, c in CONTRACTS.items() for a in c.rejected])
def test_errors_name_the_operator_and_the_argument(name, argument, device):
    contract = CONTRACTS[name]
    if device not in contract.devices:
        pytest.skip(f"lt2::{name} has no {device} kernel")
    sample = contract.samples()[0] | {argument: contract.rejected[argument]}
    with pytest.raises(RuntimeError) as error:
        operator(name)(*arguments(name, sample, device))
    message = re.search(r"lt2::(\w+): (\w+) must .*, got ", str(error.value))
    assert message, error.value
    family, named = message.groups()
    assert name.startswith(family), error.value
    assert named == argument, error.value


@pytest.mark.parametrize("name", [n for n in CONTRACTS if n.endswith("_bwd")])
def test_double_backward_is_an_error(name):
    args = require_gradients(arguments(name, CONTRACTS[name].samples()[1]))
    outputs = [t for t in tensors(operator(name)(*args)) if t.requires_grad]
    with pytest.raises(RuntimeError, match=f"lt2::{name}: double backward is not supported"):
        outputs[0].float().sum().backward()


def test_what_cannot_be_allocated_is_said(device):
    """In the words of torch, which callers look for; afterwards a smaller call is as before."""
    row = torch.randn(1, 20, 1, 16, device=device)
    want = ops.chunk_gated_delta_rule(row, row, row)[0]
    vast = row.expand(2**38, -1, -1, -1)
    said = r"(?s)cannot allocate a tensor \[274877906944, .*(can't allocate memory|out of memory)"
    for op in (ops.chunk_gated_delta_rule, ops.window_attention, ops.swiglu):
        with pytest.raises(RuntimeError, match=said):
            op(*[vast] * (2 if op is ops.swiglu else 3))
    assert torch.equal(ops.chunk_gated_delta_rule(row, row, row)[0], want)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages here")
def test_a_large_output_on_the_cpu_is_in_huge_pages():
    """New pages of 4 KiB cost as much as what is written to them."""
    o, _ = ops.causal_conv1d(torch.ones(1, 8192, 1024), torch.ones(1024, 4))  # 32 MiB
    mapping, flags = "", {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mapping = line.split()[0]
        elif line.startswith("VmFlags:"):
            flags[mapping] = line.split()[1:]
    [found] = [m for m in flags if int(m.split("-")[0], 16) <= o.data_ptr() < int(m.split("-")[1], 16)]
    assert "hg" in flags[found]
    assert (o[0, 3:] == torch.nn.functional.silu(torch.tensor(4.0))).all()


@pytest.mark.parametrize("name", ops.__all__)
def test_docstrings_name_every_argument_and_the_result(name):
    """Or the operator that has the same ones."""
    function = getattr(ops, name)
    doc = inspect.getdoc(function)
    same = ":func:" in doc and "Args:" not in doc
    for argument in inspect.signature(function).parameters:
        assert same or re.search(rf"\b{argument}\b", doc), argument
    assert same or "Returns:" in doc or inspect.signature(function).return_annotation == "None"
