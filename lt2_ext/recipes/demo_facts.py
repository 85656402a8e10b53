"""What ``lt2 demo`` measures besides training: streaming, decoding, the operators."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2_ext import ops
from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.mixers import MIXERS
from lt2_ext.reference import gdn as gdn_reference
from lt2_ext.reference import loop_state as loop_reference
from lt2_ext.testing import gdn_inputs, rel_err, with_gradients

Tick = Callable[[], object]

CONTEXTS = (1024, 2048, 4096, 8192, 16384)
LOOPS = 4
DECODERS = {"attention": "full", "Full+GDN": "interleaved:3:1:gdn:full", "GDN": "gdn"}  # name: layer_pattern


@torch.no_grad()
def streaming_differences(tick: Tick) -> dict[str, float]:
    """For each mixer the largest difference between logits of one forward and of random pieces through the state."""
    differences = {}
    for mixer in MIXERS:
        torch.manual_seed(0)
        config = LT2Config(
            vocab_size=256,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            layer_pattern=mixer,
            loop_count=LOOPS,
        )
        model = LT2(config)
        tokens = torch.randint(256, (2, 256))
        state = model.new_state(batch_size=2, max_length=256)
        cuts = torch.randperm(255)[:40].sort().values + 1  # pieces of one token and of several chunks among them
        pieces = [model(piece, state=state) for piece in tokens.tensor_split(cuts, dim=1)]
        differences[mixer] = (torch.cat(pieces, 1) - model(tokens)).abs().max().item()
        tick()
    return differences


@dataclass
class Decoder:
    """Fastest seconds per token and bytes of state, one entry per context of ``CONTEXTS``."""

    name: str
    model: LT2
    seconds: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)


@torch.no_grad()
def decoding_costs(rounds: int, tick: Tick) -> list[Decoder]:
    """One token at a time for one sequence, the models in turn. What a step costs does not depend on what was said, so
    the state is filled with random numbers instead of reading ``context`` tokens."""
    decoders = []
    for name, pattern in DECODERS.items():
        torch.manual_seed(0)
        config = LT2Config(
            vocab_size=256,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            layer_pattern=pattern,
            loop_count=LOOPS,
        )
        decoders.append(Decoder(name, LT2(config)))
    token = torch.zeros(1, 1, dtype=torch.int64)
    for context in CONTEXTS:
        states = []
        for decoder in decoders:
            state = decoder.model.new_state(batch_size=1, max_length=context)
            decoder.nbytes.append(state.nbytes)
            for tensors in (layer for loop in state.layers for layer in loop):
                for tensor in tensors.values():
                    tensor.uniform_(-0.1, 0.1)
            state.advance(context - rounds - 1)
            states.append(state)
            decoder.model(token, state=state)
        times: list[list[float]] = [[] for _ in decoders]
        for _ in range(rounds):
            for decoder, state, samples in zip(decoders, states, times, strict=True):
                start = time.perf_counter()
                decoder.model(token, state=state)
                samples.append(time.perf_counter() - start)
        for decoder, samples in zip(decoders, times, strict=True):
            decoder.seconds.append(min(samples))
        tick()
    return decoders


@dataclass
class Comparison:
    """An operator beside plain PyTorch: how many times faster, and the relative difference of the results."""

    name: str
    ratio: float
    error: float


def compare_operators(seconds: float, tick: Tick) -> list[Comparison]:
    """Every operator for about ``seconds``, in turn with the same thing in plain PyTorch."""
    torch.manual_seed(0)
    results = []
    for name, make in CASES.items():
        ours, plain = make()
        error = max(rel_err(a, b) for a, b in zip(ours(), plain(), strict=True))
        times: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + seconds
        while len(times[0]) < 5 or time.perf_counter() < end:
            for call, samples in zip((ours, plain), times, strict=True):
                start = time.perf_counter()
                call()
                samples.append(time.perf_counter() - start)
        results.append(Comparison(name, statistics.median(times[1]) / statistics.median(times[0]), error))
        tick()
    return results


Call = Callable[[], list[Tensor]]
Case = tuple[Call, Call]  # the operator and plain PyTorch; operators in place each have a state of their own


def chunked(gradients: bool) -> Case:
    x = gdn_inputs(T=1024, H=4, K=64, V=128)
    cotangents = {"o": torch.randn_like(x["v"])}

    def run(op: Callable[..., tuple[Tensor, Tensor | None]], **options: object) -> list[Tensor]:
        if gradients:
            return list(with_gradients(op, x, cotangents, **options).values())
        with torch.no_grad():
            return [op(**x, **options)[0]]

    return (
        lambda: run(ops.chunk_gated_delta_rule),
        lambda: run(gdn_reference.gated_delta_rule, rule=gdn_reference.chunks),
    )


def recurrent() -> Case:
    q, k, v, g, beta, state = gdn_inputs(T=32, H=4, K=64, V=128).values()
    return (
        lambda: [ops.fused_recurrent_gated_delta_rule(q, k, v, g, beta, initial_state=state)[0]],
        lambda: [gdn_reference.gated_delta_rule(q, k, v, g, beta, initial_state=state)[0]],
    )


def step() -> Case:
    x = gdn_inputs(T=1, H=8, K=64, V=128)
    q, k, v, ours, plain = x["q"], x["k"], x["v"], x["initial_state"], x["initial_state"].clone()
    a, b, A_log, dt_bias = torch.randn(1, 1, 8), torch.randn(1, 1, 8), torch.rand(8), torch.randn(8)

    def in_torch() -> list[Tensor]:
        Q, K, V = (t.transpose(1, 2) for t in (gdn_reference.l2norm(q), gdn_reference.l2norm(k), v))
        decay, beta = gdn_reference.log_decay(a, A_log, dt_bias).exp(), b.sigmoid()
        plain.mul_(decay.mT[..., None])
        plain.add_(K.mT * (beta.mT[..., None] * (V - K @ plain)))
        return [(q.shape[-1] ** -0.5 * (Q @ plain)).transpose(1, 2), plain]

    return lambda: [ops.gated_delta_step_(ours, q, k, v, a, b, A_log, dt_bias), ours], in_torch


def convolution() -> Case:
    x, weight = torch.randn(1, 1024, 1024), torch.randn(1024, 4)

    def in_torch() -> list[Tensor]:
        y = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=1024)
        return [F.silu(y).mT]

    return lambda: [ops.causal_conv1d(x, weight)[0]], in_torch


def convolution_step() -> Case:
    x, weight, ours = torch.randn(1, 1, 1024), torch.randn(1024, 4), torch.randn(1, 1024, 4)
    plain = ours.clone()

    def in_torch() -> list[Tensor]:
        plain.copy_(torch.cat([plain[..., 1:], x.mT], -1))
        return [F.silu((plain * weight).sum(-1))[:, None], plain]

    return lambda: [ops.causal_conv1d_step_(ours, x, weight), ours], in_torch


def residual(norm: bool) -> Case:
    h, h_in, rho, weight = torch.randn(1024, 512), torch.randn(1024, 512), torch.randn(512), torch.randn(512)
    if norm:
        return (
            lambda: list(ops.loop_residual_rmsnorm(h, h_in, rho, weight, 1e-6)),
            lambda: [out := h + rho * h_in, F.rms_norm(out, [512], weight, 1e-6)],
        )
    return lambda: [ops.loop_residual(h, h_in, rho)], lambda: [loop_reference.loop_residual(h, h_in, rho)]


def attention() -> Case:
    q, k, v = torch.randn(1, 1, 8, 64), torch.randn(1, 4096, 8, 64), torch.randn(1, 4096, 8, 64)
    lengths = torch.tensor([4096])
    q_heads, k_heads, v_heads = (t.transpose(1, 2) for t in (q, k, v))

    def in_torch() -> list[Tensor]:
        return [F.scaled_dot_product_attention(q_heads, k_heads, v_heads).transpose(1, 2)]

    return lambda: [ops.loop_decode_attention(q, k, v, lengths)], in_torch


def slots(copy: bool) -> Case:
    ours = torch.randn(8, 8, 64, 128)
    plain = ours.clone()
    first, second = torch.tensor([0, 1]), torch.tensor([5, 6])

    def op() -> list[Tensor]:
        ops.loop_state_copy_(ours, first, second) if copy else ops.loop_state_zero_(ours, second)
        return [ours]

    def in_torch() -> list[Tensor]:
        plain[second] = plain[first] if copy else 0.0
        return [plain]

    return op, in_torch


CASES: dict[str, Callable[[], Case]] = {
    "chunk_gated_delta_rule": lambda: chunked(gradients=False),
    "chunk_gated_delta_rule, gradients": lambda: chunked(gradients=True),
    "fused_recurrent_gated_delta_rule": recurrent,
    "gated_delta_step_": step,
    "causal_conv1d": convolution,
    "causal_conv1d_step_": convolution_step,
    "loop_residual": lambda: residual(norm=False),
    "loop_residual_rmsnorm": lambda: residual(norm=True),
    "loop_decode_attention": attention,
    "loop_state_zero_": lambda: slots(copy=False),
    "loop_state_copy_": lambda: slots(copy=True),
}
