#!/usr/bin/env python
"""Errors of every operator against the float64 oracle on the same rounded inputs, beside plain PyTorch in that dtype.

    python bench/numerics.py                           # print the table
    python bench/numerics.py --write docs/numerics.md  # and replace the one in the page
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lt2_ext
from lt2_ext import ops
from lt2_ext.reference import causal_conv1d as conv
from lt2_ext.reference import dsa, gdn, kda
from lt2_ext.reference import loop_state as loop
from lt2_ext.testing import TOLERANCE, gate_values, gdn_inputs, gradient_kind, rel_err

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]  # outputs by name
BEGIN, END = "<!-- bench/numerics.py -->", "<!-- end -->"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    op: str
    regime: str
    dtype: torch.dtype
    inputs: Callable[[], Tensors]
    ours: Function
    plain: Function
    oracle: Function
    trained: tuple[str, ...] = ()  # inputs whose gradients are measured
    hard: bool = False


@dataclass(frozen=True)
class Error:
    """Of one output: the largest over what a column of the table holds."""

    name: str
    ours: float
    plain: float
    tolerance: float


def run(f: Function, x: Tensors, trained: tuple[str, ...], cotangents: Tensors) -> Tensors:
    if not trained:
        with torch.no_grad():
            return f(x)
    leaves = {n: x[n].detach().clone().requires_grad_() for n in trained}
    out = f(x | leaves)
    grads = torch.autograd.grad([t for n, t in out.items() if n in cotangents], list(leaves.values()),
                                [cotangents[n].to(t.dtype) for n, t in out.items() if n in cotangents])  # fmt: skip
    return {n: t.detach() for n, t in out.items()} | {f"d{n}": g for n, g in zip(trained, grads, strict=True)}


def double(x: Tensors) -> Tensors:
    return {n: t.double() if t.is_floating_point() else t.clone() for n, t in x.items()}


def measure(case: Case) -> list[Error]:
    """The output that is nearest to its tolerance, of outputs, of gradients and of gradients of gates."""
    torch.manual_seed(0)
    x = case.inputs()
    with torch.no_grad():
        outputs = case.oracle(double(x))
    cotangents = {n: torch.randn_like(t).to(case.dtype) for n, t in outputs.items()}
    want = run(case.oracle, double(x), case.trained, cotangents)
    plain = run(case.plain, {n: t.clone() for n, t in x.items()}, case.trained, cotangents)
    got = run(case.ours, {n: t.clone() for n, t in x.items()}, case.trained, cotangents)
    columns: dict[str, list[Error]] = {"out": [], "grad": [], "gate_grad": []}
    for name, w in want.items():
        kind = "out" if name in outputs else gradient_kind(name) if "g" in case.trained else "grad"
        tolerance = TOLERANCE[case.dtype][kind][case.hard]
        columns[kind].append(Error(name, rel_err(got[name], w), rel_err(plain[name], w), tolerance))
    return [max(errors, key=lambda e: e.ours) for errors in columns.values() if errors]


def rule(f: Callable[..., tuple[Tensor, Tensor | None]], x: Tensors, **options: object) -> Tensors:
    return dict(zip(("o", "state"), f(**x, output_final_state=True, **options), strict=True))  # type: ignore[arg-type]


def plain_rule(formulation: Callable[..., tuple[Tensor, Tensor]], x: Tensors) -> Tensors:
    return rule(gdn.gated_delta_rule, x, rule=formulation)


def gdn_cases(dtype: torch.dtype) -> list[Case]:
    regimes = {
        "usual": {},
        "equal keys": {"keys": "equal", "beta": "0.835", "gate": "small"},
        "strong gates": {"gate": "strong16"},
    }
    sizes = {"T": 200, "H": 2, "HV": 4, "K": 64, "V": 96, "dtype": dtype}
    trained = ("q", "k", "v", "g", "beta", "initial_state")
    cases = []
    for regime, options in regimes.items():
        for op, formulation in (
            (ops.chunk_gated_delta_rule, partial(gdn.chunks, operands=None if dtype == torch.float32 else dtype)),
            (ops.fused_recurrent_gated_delta_rule, gdn.recurrence),
        ):
            plain = partial(plain_rule, formulation)
            inputs = partial(gdn_inputs, **sizes, **options)
            oracle = partial(plain_rule, gdn.recurrence)
            cases.append(
                Case(op.__name__, regime, dtype, inputs, partial(rule, op), plain, oracle, trained, regime != "usual")
            )
    return cases


def kda_inputs(op: Callable[..., object], **options: Any) -> Tensors:
    x = gdn_inputs(T=200, H=2, HV=4, K=64, V=96, **options)
    x["g"] = gate_values(options.get("gate", "logsigmoid"), (1, 200, 4, 64))
    return x if op is ops.chunk_kda else {n: t for n, t in x.items() if n != "beta"}


def kda_cases(dtype: torch.dtype) -> list[Case]:
    regimes = {"usual": {}, "strong gates": {"gate": "strong16"}}
    chunks = partial(kda.chunks, operands=None if dtype == torch.float32 else dtype)
    cases = []
    for (regime, options), op in product(regimes.items(), (ops.chunk_kda, ops.chunk_gla)):
        delta = op is ops.chunk_kda
        plain, oracle = (partial(rule, partial(kda.kda, delta=delta, rule=r)) for r in (chunks, kda.recurrence))
        trained = ("q", "k", "v", "g", *(["beta"] if delta else []), "initial_state")
        inputs = partial(kda_inputs, op, dtype=dtype, **options)
        cases.append(
            Case(op.__name__, regime, dtype, inputs, partial(rule, op), plain, oracle, trained, regime != "usual")
        )
    return cases


def step_inputs(dtype: torch.dtype) -> Tensors:
    x = gdn_inputs(B=4, T=2, H=2, HV=4, K=64, V=96, dtype=dtype)
    x["state"] = x.pop("initial_state")
    del x["g"], x["beta"]
    a, b = torch.randn(2, 4, 2, 4)
    return x | {"a": a.to(dtype), "b": b.to(dtype), "A_log": torch.randn(4) / 4, "dt_bias": torch.randn(4)}


def step_plain(x: Tensors) -> Tensors:
    return dict(zip(("o", "state"), gdn.gated_delta_step(**x), strict=True))


def step_ours(x: Tensors) -> Tensors:
    state = x["state"].clone()
    return {"o": ops.gated_delta_step_(**x | {"state": state}), "state": state}


def fused_inputs(dtype: torch.dtype) -> Tensors:
    x = step_inputs(dtype)
    qkv = torch.cat([x.pop(n).flatten(2) for n in ("q", "k", "v")], -1)
    D = qkv.shape[-1]
    return x | {"qkv": qkv, "z": torch.randn(4, 2, 4, 96).to(dtype), "conv_state": torch.randn(4, D, 4).to(dtype),
                "conv_weight": torch.randn(D, 4) / 2, "norm_weight": torch.randn(96)}  # fmt: skip


def fused_plain(x: Tensors) -> Tensors:
    return dict(zip(("o", "state", "conv_state"), gdn.decode_fused(**x), strict=True))


def fused_ours(x: Tensors) -> Tensors:
    states = {n: x[n].clone() for n in ("state", "conv_state")}
    return {"o": ops.gdn_decode_fused_(**x | states)} | states


def conv_inputs(dtype: torch.dtype) -> Tensors:
    return {"x": torch.randn(2, 200, 96).to(dtype), "weight": torch.randn(96, 4), "bias": torch.randn(96),
            "initial_state": torch.randn(2, 96, 4).to(dtype)}  # fmt: skip


def residual_inputs(dtype: torch.dtype) -> Tensors:
    h, h_in = torch.randn(2, 4, 64, 96).to(dtype)
    return {"h": h, "h_in": h_in, "rho": torch.randn(96), "weight": torch.randn(96)}


def attention_inputs(dtype: torch.dtype) -> Tensors:
    k, v = torch.randn(2, 4, 600, 2, 64).to(dtype)
    return {"q": torch.randn(4, 2, 8, 64).to(dtype), "k_cache": k, "v_cache": v,
            "lengths": torch.tensor([600, 2, 37, 300])}  # fmt: skip


def sparse_inputs(dtype: torch.dtype) -> Tensors:
    k, v = torch.randn(2, 2, 200, 2, 64).to(dtype)
    indices = torch.rand(2, 200, 200).argsort(-1)[..., :50].int()
    return {"q": torch.randn(2, 200, 8, 64).to(dtype), "k": k, "v": v, "indices": indices}


def residual(f: Callable[..., Tensor], x: Tensors) -> Tensors:
    return {"out": f(x["h"], x["h_in"], x["rho"])}


def residual_norm(f: Callable[..., tuple[Tensor, Tensor]], x: Tensors) -> Tensors:
    return dict(zip(("h_out", "normed"), f(x["h"], x["h_in"], x["rho"], x["weight"], 1e-6), strict=True))


def convolution(f: Callable[..., tuple[Tensor, Tensor]], x: Tensors) -> Tensors:
    return {"y": f(**x)[0]}


def attention(f: Callable[..., Tensor], x: Tensors) -> Tensors:
    return {"o": f(**x)}


def other_cases(dtype: torch.dtype) -> list[Case]:
    def case(op: Callable[..., object], inputs: Callable[[torch.dtype], Tensors], ours: Function, plain: Function,
             trained: tuple[str, ...] = ()) -> Case:  # fmt: skip
        return Case(op.__name__, "usual", dtype, partial(inputs, dtype), ours, plain, plain, trained)

    return [
        case(ops.gated_delta_step_, step_inputs, step_ours, step_plain),
        case(ops.gdn_decode_fused_, fused_inputs, fused_ours, fused_plain),
        case(ops.causal_conv1d, conv_inputs, partial(convolution, ops.causal_conv1d),
             partial(convolution, conv.causal_conv1d), ("x", "weight", "bias", "initial_state")),
        case(ops.dsa_attention, sparse_inputs, partial(attention, ops.dsa_attention),
             partial(attention, dsa.dsa_attention), ("q", "k", "v")),
        case(ops.loop_residual, residual_inputs, partial(residual, ops.loop_residual),
             partial(residual, loop.loop_residual), ("h", "h_in", "rho")),
        case(ops.loop_residual_rmsnorm, residual_inputs, partial(residual_norm, ops.loop_residual_rmsnorm),
             partial(residual_norm, loop.loop_residual_rmsnorm), ("h", "h_in", "rho", "weight")),
        case(ops.loop_decode_attention, attention_inputs, partial(attention, ops.loop_decode_attention),
             partial(attention, loop.loop_decode_attention)),
    ]  # fmt: skip


def cases() -> list[Case]:
    families = (gdn_cases, kda_cases, other_cases)
    return [case for dtype in (torch.float32, torch.bfloat16) for family in families for case in family(dtype)]


def cell(error: Error) -> str:
    return f"{error.ours:.1e} ({error.name}; plain {error.plain:.1e}, limit {error.tolerance:.0e})"


def table() -> list[str]:
    lines = ["| operator | inputs | dtype | outputs | gradients | gradients of gates |", "|---|---|---|---|---|---|"]
    for case in cases():
        cells = [cell(e) for e in measure(case)]
        cells += [""] * (3 - len(cells))
        lines.append(f"| `{case.op}` | {case.regime} | {NAMES[case.dtype]} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help=f"replace what is between {BEGIN} and {END}")
    options = parser.parse_args(arguments)
    info = lt2_ext.build_info()
    text = "\n".join([f"CPU kernels `{info['cpu_isa']}`, torch {info['torch']}.", "", *table()])
    print(text)
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        _, found, after = rest.partition(END)
        if not found:
            raise SystemExit(f"{options.write} has no {BEGIN} .. {END}")
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
