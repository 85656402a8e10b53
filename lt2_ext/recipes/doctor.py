"""``lt2 doctor``: facts about this installation and a test of every operator against the float64 oracles."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from lt2_ext import __version__, build_info, ops
from lt2_ext.reference import block_ops as block_reference
from lt2_ext.reference import causal_conv1d as conv_reference
from lt2_ext.reference import dsa as dsa_reference
from lt2_ext.reference import gdn as gdn_reference
from lt2_ext.reference import kda as kda_reference
from lt2_ext.reference import loop_state as loop_reference
from lt2_ext.testing import TOLERANCE, gdn_inputs, rel_err

LIMIT = TOLERANCE[torch.float32]["out"][0]
REINSTALL = "pip install --force-reinstall --no-deps . (in the source tree)"
OPTIONAL = {  # package: (what for, what pip installs)
    "transformers": ("Hugging Face models, a peer in bench/", "transformers>=5.17"),
    "tqdm": ("progress bars of the recipes", "tqdm"),
    "pyyaml": ("settings of lt2 train", "pyyaml"),
    "tokenizers": ("BPE in the recipes", "tokenizers"),
    "matplotlib": ("plots of lt2 demo, lt2 train and bench/", "matplotlib"),
    "pytest": ("tests", "pytest pytest-timeout hypothesis"),
}
Tensors = dict[str, Tensor]
Pairs = Iterable[tuple[Tensor, Tensor]]  # (the operator's, the oracle's)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lt2 doctor",
        description="One line per fact, then OK (exit 0) or the problems with their fixes (exit 1).",
        epilog="example: LT2_CPU_ISA=avx2 lt2 doctor",
    )
    parser.parse_args(argv)
    problems: list[str] = []  # each: what is wrong. Fix: what to do
    fact("lt2_ext", f"{__version__}, Python {platform.python_version()}, {platform.machine()}")
    fact("torch", str(torch.__version__))
    info = build_info()
    chosen = "by LT2_CPU_ISA out" if os.environ.get("LT2_CPU_ISA") else "out"
    built = info["cpu_isas"].replace(";", ", ")
    fact("CPU", f"{info['cpu_isa']} ({chosen} of {built}), {torch.get_num_threads()} threads")
    fact("CUDA kernels", describe_archs(info["cuda_archs"]) if info["cuda_archs"] else "not built")
    devices = ["cpu"] + (["cuda"] if check_gpu(info["cuda_archs"], problems) else [])
    for device in devices:
        for name in ops.__all__:
            test_operator(name, device, problems)
    for package, (purpose, requirement) in OPTIONAL.items():
        try:
            fact(f"optional {package}", metadata.version(package))
        except metadata.PackageNotFoundError:
            fact(f"optional {package}", f"not installed ({purpose}): pip install '{requirement}'")
    if not problems:
        print("OK")
        return 0
    print(f"{len(problems)} problem{'s' * (len(problems) > 1)}:", "\n  ".join(problems))
    return 1


def fact(name: str, text: str) -> None:
    print(f"{name:<43} {text}", flush=True)


def describe_archs(archs: str) -> str:
    """``"90a-real;80-virtual"`` in CUDA's words: ``"sm_90a, compute_80"``."""
    names = []
    for arch in archs.split(";"):
        number, _, kind = arch.partition("-")
        names.append(f"compute_{number}" if kind == "virtual" else f"sm_{number}")
    return ", ".join(names)


def check_gpu(archs: str, problems: list[str]) -> bool:
    """Report the GPU; whether the operators can run on it."""
    if not torch.cuda.is_available():
        built = "this torch is a CPU build" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda}"
        fact("GPU", f"none that torch can use ({built})")
        return False
    capability = torch.cuda.get_device_capability()
    fact("GPU", f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}")
    if not archs:
        problems.append(f"the GPU is not used: lt2_ext was built without CUDA. Fix: install nvcc, then {REINSTALL}")
        return False
    if capability < (8, 0):
        problems.append("the GPU is older than compute capability 8.0. Fix: none, use the CPU or another GPU")
        return False
    return True


def test_operator(name: str, device: str, problems: list[str]) -> None:
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        error = max(rel_err(out.cpu(), ref) for out, ref in SELF_TESTS[name](device))
        text = f"error {error:.1e} (limit {LIMIT:.0e})"
        passed = error <= LIMIT
    except Exception as e:
        text, passed = f"{type(e).__name__}: {str(e).strip().splitlines()[-1]}", False
    fact(f"{name} on {device}", f"{'ok' if passed else 'FAILED'}, {text}, {time.perf_counter() - start:.2f} s")
    if not passed:
        problems.append(f"{name} on {device}: {text}. Fix: {REINSTALL}; if it stays, report this output")


def compare(
    op: Callable[..., Any], oracle: Callable[..., Any], device: str, tensors: Tensors, written: tuple[str, ...] = (),
    **options: Any,
) -> Pairs:  # fmt: skip
    """Outputs of ``op`` (then the arguments that it has ``written``) beside those of ``oracle`` in float64."""
    given = {name: t.to(device, copy=True) for name, t in tensors.items()}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    out, ref = flat(op(**given, **options)), flat(oracle(**exact, **options))
    return zip(out + [given[name] for name in written], ref, strict=True)


def flat(result: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def chunk_gated_delta_rule(device: str) -> Pairs:
    inputs = gdn_inputs(B=1, T=70, H=1, HV=2, K=64, V=128)
    return compare(
        ops.chunk_gated_delta_rule, gdn_reference.gated_delta_rule, device, inputs, output_final_state=True
    )


def fused_recurrent_gated_delta_rule(device: str) -> Pairs:
    inputs = gdn_inputs(B=1, T=20, H=1, HV=2, K=64, V=128)
    return compare(
        ops.fused_recurrent_gated_delta_rule, gdn_reference.gated_delta_rule, device, inputs, output_final_state=True
    )


def relative(op: Callable[..., Any], T: int, delta: bool) -> Callable[[str], Pairs]:
    """Of the gated delta rule: without its decay, or (not ``delta``) without its erasing; T = 3 is a step."""

    def test(device: str) -> Pairs:
        x = gdn_inputs(B=2, T=T, H=1, HV=2, K=64, V=128)
        if delta:
            del x["g"]
        oracle = partial(gdn_reference.gated_delta_rule, delta=delta, output_final_state=True)
        if T > 3:
            return compare(partial(op, output_final_state=True), oracle, device, x)
        x["state"] = x.pop("initial_state")
        return compare(op, lambda state, **rest: oracle(initial_state=state, **rest), device, x, ("state",))

    return test


chunk_delta_rule = relative(ops.chunk_delta_rule, 70, True)
fused_recurrent_delta_rule = relative(ops.fused_recurrent_delta_rule, 20, True)
delta_rule_step_ = relative(ops.delta_rule_step_, 3, True)
chunk_simple_gla = relative(ops.chunk_simple_gla, 70, False)
fused_recurrent_simple_gla = relative(ops.fused_recurrent_simple_gla, 20, False)
simple_gla_step_ = relative(ops.simple_gla_step_, 3, False)


def kda_inputs(B: int, T: int, delta: bool) -> Tensors:
    x = gdn_inputs(B=B, T=T, H=1, HV=2, K=64, V=128)
    x["g"] = torch.nn.functional.logsigmoid(torch.randn(B, T, 2, 64))
    return x if delta else {n: t for n, t in x.items() if n != "beta"}


def chunk_kda(device: str) -> Pairs:
    return compare(ops.chunk_kda, kda_reference.kda, device, kda_inputs(1, 70, True), output_final_state=True)


def fused_recurrent_kda(device: str) -> Pairs:
    return compare(ops.fused_recurrent_kda, kda_reference.kda, device, kda_inputs(1, 20, True), output_final_state=True)


def chunk_gla(device: str) -> Pairs:
    oracle = partial(kda_reference.kda, delta=False)
    return compare(ops.chunk_gla, oracle, device, kda_inputs(1, 70, False), output_final_state=True)


def fused_recurrent_gla(device: str) -> Pairs:
    tensors = kda_inputs(1, 20, False)
    tensors["gk"] = tensors.pop("g")

    def oracle(gk: Tensor, **x: Any) -> tuple[Tensor, Tensor | None]:
        return kda_reference.kda(g=gk, delta=False, **x)

    return compare(ops.fused_recurrent_gla, oracle, device, tensors, output_final_state=True)


def kda_step_(device: str) -> Pairs:
    tensors = kda_inputs(2, 1, True)
    tensors["state"] = tensors.pop("initial_state")
    return compare(ops.kda_step_, kda_reference.kda_step, device, tensors, ("state",))


def gated_delta_step_(device: str) -> Pairs:
    x = gdn_inputs(B=2, T=1, H=2, HV=4, K=64, V=128)
    raw = {"a": torch.randn(2, 1, 4), "b": torch.randn(2, 1, 4), "A_log": torch.rand(4), "dt_bias": torch.randn(4)}
    tensors = {"state": x["initial_state"], "q": x["q"], "k": x["k"], "v": x["v"], **raw}
    return compare(ops.gated_delta_step_, gdn_reference.gated_delta_step, device, tensors, ("state",))


def gdn_decode_fused_(device: str) -> Pairs:
    raw = {n: torch.randn(2, 1, 4) for n in ("a", "b")} | {"A_log": torch.rand(4), "dt_bias": torch.randn(4)}
    layer = {"conv_weight": torch.randn(768, 4) / 2, "norm_weight": torch.randn(128)}
    pools = {"state": torch.randn(2, 4, 64, 128), "conv_state": torch.randn(2, 768, 4)}
    tensors = {**pools, "qkv": torch.randn(2, 1, 768), "z": torch.randn(2, 1, 4, 128), **raw, **layer}
    return compare(ops.gdn_decode_fused_, gdn_reference.decode_fused, device, tensors, ("state", "conv_state"))


def causal_conv1d(device: str) -> Pairs:
    tensors = {"x": torch.randn(2, 50, 96), "weight": torch.randn(96, 4), "bias": torch.randn(96)}
    return compare(ops.causal_conv1d, conv_reference.causal_conv1d, device, tensors, output_final_state=True)


def causal_conv1d_step_(device: str) -> Pairs:
    def oracle(state: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return conv_reference.causal_conv1d(x, weight, initial_state=state, output_final_state=True)

    tensors = {"state": torch.randn(2, 96, 4), "x": torch.randn(2, 1, 96), "weight": torch.randn(96, 4)}
    return compare(ops.causal_conv1d_step_, oracle, device, tensors, ("state",))


def dsa_attention(device: str) -> Pairs:
    tensors = {"q": torch.randn(2, 50, 4, 64), "k": torch.randn(2, 50, 2, 64), "v": torch.randn(2, 50, 2, 64)}
    tensors["indices"] = torch.randint(-8, 60, (2, 50, 8), dtype=torch.int32)
    return compare(ops.dsa_attention, dsa_reference.dsa_attention, device, tensors)


def window_attention(device: str) -> Pairs:
    q, k, v = torch.randn(2, 50, 4, 64), torch.randn(2, 50, 2, 64), torch.randn(2, 50, 2, 64)
    newest = (torch.arange(50)[:, None] - torch.arange(8)).int().expand(2, -1, -1)

    def op(**x: Tensor) -> Any:
        return ops.window_attention(x["q"], x["k"], x["v"], window=8)

    return compare(op, dsa_reference.dsa_attention, device, {"q": q, "k": k, "v": v, "indices": newest})


def indexer_loss(device: str) -> Pairs:
    tensors = {"q": torch.randn(2, 50, 4, 64), "k": torch.randn(2, 50, 2, 64), "lse": torch.full((2, 50, 4), 4.0)}
    tensors |= {"q_idx": torch.randn(2, 50, 4, 64), "k_idx": torch.randn(2, 50, 64), "w_idx": torch.randn(2, 50, 4)}
    return compare(ops.indexer_loss, dsa_reference.indexer_loss, device, tensors)


def lightning_indexer(device: str) -> Pairs:
    tensors = {"q_idx": torch.randn(2, 50, 4, 64), "k_idx": torch.randn(2, 50, 64), "w_idx": torch.randn(2, 50, 4)}
    return compare(ops.lightning_indexer, dsa_reference.lightning_indexer, device, tensors, topk=8)


def loop_residual(device: str) -> Pairs:
    tensors = {"h": torch.randn(2, 5, 96), "h_in": torch.randn(2, 5, 96), "rho": torch.randn(96)}
    return compare(ops.loop_residual, loop_reference.loop_residual, device, tensors)


def loop_residual_rmsnorm(device: str) -> Pairs:
    tensors = {"h": torch.randn(2, 5, 96), "h_in": torch.randn(2, 5, 96), "rho": torch.randn(96)}
    tensors["weight"] = torch.randn(96)
    return compare(ops.loop_residual_rmsnorm, loop_reference.loop_residual_rmsnorm, device, tensors, eps=1e-6)


def add_rmsnorm(device: str) -> Pairs:
    tensors = {"x": torch.randn(2, 5, 96), "residual": torch.randn(2, 5, 96), "weight": torch.randn(96)}
    return compare(ops.add_rmsnorm, loop_reference.add_rmsnorm, device, tensors, eps=1e-6)


def swiglu(device: str) -> Pairs:
    return compare(
        ops.swiglu, block_reference.swiglu, device, {"gate": torch.randn(2, 5, 96), "up": torch.randn(2, 5, 96)}
    )


def gated_rmsnorm(device: str) -> Pairs:
    tensors = {"o": torch.randn(2, 5, 4, 64), "z": torch.randn(2, 5, 4, 64), "weight": torch.randn(64)}
    return compare(ops.gated_rmsnorm, block_reference.gated_rmsnorm, device, tensors, eps=1e-6)


def rope_cache_(device: str) -> Pairs:
    tensors = {"k_cache": torch.randn(3, 40, 2, 64), "v_cache": torch.randn(3, 40, 2, 64)}
    tensors |= {"q": torch.randn(3, 2, 4, 64), "k": torch.randn(3, 2, 2, 64), "v": torch.randn(3, 2, 2, 64)}
    tensors |= {"cos": torch.randn(1, 2, 32), "sin": torch.randn(1, 2, 32)}
    tensors["places"] = torch.tensor([[0, 1], [39, 0], [7, 8]])
    return compare(ops.rope_cache_, block_reference.rope_cache, device, tensors, ("k_cache", "v_cache"))


def linear_step(device: str) -> Pairs:
    """On CUDA of 16 bits only: small integers, whose sums these hold exactly."""
    x, residual, *weights = (torch.randint(-1, 2, s).to(torch.bfloat16) for s in ((3, 64), (3, 40), (40, 64), (24, 64)))

    def op(x: Tensor, residual: Tensor, first: Tensor, second: Tensor, f: Any = ops.linear_step) -> tuple[Tensor, ...]:
        return *f(x, [first, second]), *f(x, [first], residual=residual)

    def oracle(**tensors: Tensor) -> tuple[Tensor, ...]:
        return op(**tensors, f=block_reference.linear_step)

    tensors = {"x": x, "residual": residual, "first": weights[0], "second": weights[1]}
    return compare(op, oracle, device, tensors)


def block(device: str, *projected: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Rows, norm, projections and the rest of a block, in the 16 bits that CUDA wants. A step in one operator gives the
    bits of those that it is made of."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, torch.bfloat16) / 4

    rest = [randn(64, 64), randn(64), randn(96, 64), randn(96, 64), randn(64, 96)]
    return randn(2, 1, 64), randn(64), [randn(n, 64) for n in projected], rest


def mlp_step(device: str) -> Pairs:
    o, _, _, rest = block(device)
    (h,) = ops.linear_step(o, rest[:1], residual=o)
    (x,) = ops.linear_step(h, rest[2:4], norm_weight=rest[1], swiglu=True)
    return [(ops.mlp_step(o, o, rest), ops.linear_step(x, rest[4:], residual=h)[0].cpu())]


def gdn_block_step_(device: str) -> Pairs:
    h, norm, projections, rest = block(device, 192, 64, 2, 2)
    small = [torch.rand(s, device=device) for s in ((192, 4), (2,), (2,), (32,))]
    state, window = torch.ones(2, 2, 32, 32, device=device), torch.ones(2, 192, 4, device=device, dtype=h.dtype)
    pools = state.clone(), window.clone()
    qkv, z, a, b = ops.linear_step(h, projections, norm_weight=norm)
    o = ops.gdn_decode_fused_(pools[0], pools[1], qkv, z.view(2, 1, 2, 32), a, b, *small)
    out = ops.gdn_block_step_(h, state, window, norm, projections, small, rest)
    return zip((out, state, window), (t.cpu() for t in (ops.mlp_step(o.flatten(2), h, rest), *pools)), strict=True)


def attention_block_step_(device: str) -> Pairs:
    h, norm, projections, rest = block(device, 64, 64, 64, 128, 64, 2)
    ours, theirs = (list(torch.ones(4, 2, 9, 1, 64, device=device, dtype=h.dtype)) for _ in range(2))
    angles = [torch.rand(1, 1, 32, device=device) for _ in range(2)]
    places, lengths = torch.tensor([[4], [8]], device=device), torch.tensor([5, 9], device=device)
    where, offsets = [*angles, places, lengths], lengths - 1
    dense = ops.attention_block_step_(h, ours[0], ours[1], norm, projections[:3], where, rest)
    index = [ours[2][:, :, 0], *angles, offsets]
    out = ops.attention_block_step_(dense, ours[0], ours[1], norm, projections, where, rest, index=index, topk=2)
    pairs = []
    for row, few in ((h, projections[:3]), (dense, projections)):
        x = ops.linear_step(row, few, norm_weight=norm, floats=len(few) // 6)
        q, k, v = (y.unflatten(2, (-1, 64)) for y in x[:3])
        q = ops.rope_cache_(theirs[0], theirs[1], q, k, v, angles[0], angles[1], places)
        indices = None
        if few is projections:
            q_idx, k_idx = (y.unflatten(2, (-1, 64)) for y in x[3:5])
            q_idx = ops.rope_cache_(theirs[2], theirs[3], q_idx, k_idx, k_idx, angles[0], angles[1], places)
            indices = ops.lightning_indexer(q_idx, theirs[2][:, :, 0], x[5], topk=2, scale=1.0, q_offset=offsets)
        o = ops.loop_decode_attention(q, theirs[0], theirs[1], lengths, indices=indices)
        pairs.append(ops.mlp_step(o.flatten(2), row, rest))
    return zip((dense, out, *ours[:3]), (t.cpu() for t in (*pairs, *theirs[:3])), strict=True)


def loop_decode_attention(device: str) -> Pairs:
    tensors = {"k_cache": torch.randn(3, 40, 2, 64), "v_cache": torch.randn(3, 40, 2, 64)}
    tensors |= {"q": torch.randn(3, 2, 4, 64), "lengths": torch.tensor([40, 2, 17])}
    return compare(ops.loop_decode_attention, loop_reference.loop_decode_attention, device, tensors)


def loop_state_zero_(device: str) -> Pairs:
    def oracle(state: Tensor, slots: Tensor) -> Tensor:
        return state.index_fill(0, slots, 0)

    tensors = {"state": torch.randn(4, 8, 8), "slots": torch.tensor([2, 0])}
    return compare(ops.loop_state_zero_, oracle, device, tensors, ("state",))


def loop_state_copy_(device: str) -> Pairs:
    tensors = {"state": torch.randn(4, 8, 8), "src": torch.tensor([2, 0]), "dst": torch.tensor([0, 3])}
    return compare(ops.loop_state_copy_, loop_reference.loop_state_copy, device, tensors, ("state",))


SELF_TESTS: dict[str, Callable[[str], Pairs]] = {name: globals()[name] for name in ops.__all__}
