"""Whole models with random weights: a decode step at a context, a prefill, a training step. The floor of a step is what
``lt2 plan`` counts. The plain implementation (``plain_model``) runs the same weights eagerly with growing caches."""

from __future__ import annotations

import copy
import functools
import gc
from typing import Any

import torch
from plain_model import Cache, DeltaRule, PlainModel, fla_rule, reference_rule, torch_step
from torch import Tensor
from torch.nn import functional as F

from lt2_ext.models import LT2, LoopState, LT2Config
from lt2_ext.models.presets import PRESETS, preset
from lt2_ext.recipes.plan import decode_bytes, forward_flops, train_flops

from . import NAMES, Call, Case, Tensors

F32, BF16 = torch.float32, torch.bfloat16
FULL_GDN = {"num_attention_heads": 8, "layer_pattern": "interleaved:4:1:gdn:full"}
# 1.1M parameters, the Full+GDN decoder of the demo; 100M parameters.
DEMO: dict[str, Any] = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
DEMO["layer_pattern"] = "interleaved:3:1:gdn:full"
MODELS: dict[str, dict[str, Any]] = {
    "demo": DEMO,
    # For a test; with so many heads no score is exactly 0, where torch breaks ties as it likes.
    "sparse": {**DEMO, "layer_pattern": "interleaved:1:1:gdn:dsa", "index_n_heads": 16, "index_topk": 16},
    "100m": {"vocab_size": 24576, "hidden_size": 1024, "num_hidden_layers": 5, **FULL_GDN},
}
# Every output, in fp32: ten operators' worth. In bf16 a hundred blocks round the residual stream until plain torch is
# off by some percent (of a long recurrence from nothing: by a third); ours is then held against that.
TOLERANCE = 1e-4
# For more tokens than a GPU of 80 GB holds without reuse; and what four loops cost beside one.
REUSED = {"lt2-1.3b-full-gdn": "kv:first", "lt2-1.3b-gdn-dsa": "kv:first,index:share"}
MODELS["sparse-reuse"] = MODELS["sparse"] | {"state_reuse": "kv:first,index:share"}
MODELS |= {f"{n} {modes}": PRESETS[n] | {"state_reuse": modes} for n, modes in REUSED.items()}
MODELS |= {f"{n} T=1": PRESETS[n] | {"loop_count": 1} for n in REUSED}
MODELS["lt2-1.3b-full kv:first"] = PRESETS["lt2-1.3b-full"] | {"state_reuse": "kv:first"}
CHECKED, CHECKED_SEQUENCE = 96, 24  # tokens of context, and of a sequence, where the outputs are compared
ROOM = 6 << 30  # bytes of a GPU for weights, and what a step of ours needs beside its state
STD = 0.1  # of the random memory of a context that nobody read


def cases(device: torch.device, quick: bool) -> list[Case]:
    if device.type == "cpu":
        rows = [("demo", F32), ("100m", F32)] if quick else [("demo", F32), ("100m", F32), ("100m", BF16)]
        return [decode_case(name, 1, 2048, dtype, device) for name, dtype in rows]
    shapes = [(1, 8192), (8, 32768)] if quick else [(1, 8192), (1, 32768), (8, 8192), (8, 32768), (8, 131072)]
    room = torch.cuda.get_device_properties(device).total_memory - ROOM

    def steps(name: str) -> list[Case]:
        sketch = meta(name).to(BF16)
        fit = [(B, context) for B, context in shapes if sketch.new_state(B, context + 1).nbytes < room]
        return [decode_case(name, B, context, BF16, device) for B, context in fit]

    rows = []
    for name, modes in REUSED.items():
        rows += [*steps(name), prefill_case(name, 8192, BF16, device), train_case(name, 4096, BF16, device)]
        rows += [train_case(f"{name} T=1", 4096, BF16, device), *steps(f"{name} {modes}")[-1:]]
    return [*rows, *steps("lt2-1.3b-full"), *steps("lt2-1.3b-full kv:first")[-1:]]


# The model and the memory of the case that runs: there is no room for those of two.
models: dict[tuple[str, torch.dtype, torch.device], LT2] = {}
memories: dict[tuple[int, int], LoopState] = {}
expected: dict[tuple[int, int], Tensors] = {}  # of the oracle, which contexts of all lengths share


def build(name: str, dtype: torch.dtype, device: torch.device) -> LT2:
    """The cases of a model follow each other."""
    if (name, dtype, device) not in models:
        forget(models, memories, expected)
        models[name, dtype, device] = new_model(name, dtype, device)
    return models[name, dtype, device]


def forget(*caches: dict[Any, Any]) -> None:
    """Give their memory back, or the allocator would put other tensors into a part of it and keep the rest."""
    for cache in caches:
        cache.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def new_model(name: str, dtype: torch.dtype, device: torch.device) -> LT2:
    torch.manual_seed(0)
    config = LT2Config(**MODELS[name]) if name in MODELS else preset(name)
    with device:
        model = LT2(config).to(dtype)
    for block in model.layers:  # a residual stream that no block dominates, as in a trained model: rounding stays small
        for weight in (block.mixer.o_proj.weight, block.mlp.down_proj.weight):
            weight.data *= (2 * config.num_hidden_layers * config.loop_count) ** -0.5
    return model


def in_dtype(model: LT2, dtype: torch.dtype) -> LT2:
    return model if model.embed_tokens.weight.dtype == dtype else copy.deepcopy(model).to(dtype)


@functools.cache
def meta(name: str) -> LT2:
    with torch.device("meta"):
        return LT2(LT2Config(**MODELS[name]) if name in MODELS else preset(name))


def decode_case(name: str, B: int, context: int, dtype: torch.dtype, device: torch.device) -> Case:
    """One token for each of B sequences, after ``context`` tokens each."""

    def inputs(context: int = context) -> Tensors:
        return {"ids": torch.arange(B, device=device)[:, None], "past": torch.empty(context, device="meta")}

    def oracle(x: Tensors) -> Tensors:
        model, key = build(name, dtype, device), (B, len(x["past"]))
        if key not in expected:
            expected[key] = step_plain(model, x, torch_step, torch.float64)()
        return expected[key]

    sketch = meta(name)
    weights, memory = decode_bytes(sketch.to(dtype), context)
    return Case(
        op="decode step",
        shape=f"{name} B={B} context={context} {NAMES[dtype]}",
        dtype=dtype,
        flops=B * forward_flops(sketch, context + 1),
        moved=weights + B * memory,
        tokens=B,
        inputs=inputs,
        ours=lambda x: step_ours(build(name, dtype, device), x),
        torch=lambda x: step_plain(build(name, dtype, device), x, torch_step),
        peers={"fla": lambda x: step_plain(build(name, dtype, device), x, fla_rule)},
        oracle=oracle,
        checked=lambda: inputs(min(CHECKED, context)),
        tolerance=TOLERANCE,
        beside_torch=True,
        eager=True,
    )


def remembered(model: LT2, x: Tensors) -> LoopState:
    """A state as if every sequence had ``past`` tokens, of random numbers."""
    state = memory(model, len(x["ids"]), len(x["past"]))
    randomise(state)
    return state


def memory(model: LT2, B: int, past: int) -> LoopState:
    """One for all that are timed: it can be half of a GPU."""
    if (B, past) not in memories:
        if past > CHECKED:  # that of the case before
            forget(memories)
        memories[B, past] = model.new_state(B, past + 1)
        memories[B, past].advance(past)
    return memories[B, past]


def randomise(state: LoopState) -> None:
    random = torch.Generator(state.lengths.device).manual_seed(0)
    for tensors in (layer for loop in state.layers for layer in loop):
        for tensor in tensors.values():
            tensor.normal_(std=STD, generator=random)


@torch.no_grad()
def step_ours(model: LT2, x: Tensors) -> Call:
    """The token again and again, so that the context stays what it is; on CUDA one graph."""
    state = remembered(model, x)

    @torch.no_grad()
    def step() -> Tensors:
        logits = model(x["ids"], state=state, logits_to_keep=1)
        state.advance(-1)
        return {"o": logits}

    if x["ids"].device.type == "cpu":
        return step
    step()  # allocates, and chooses matrix kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    randomise(state)

    def replay() -> Tensors:
        graph.replay()
        return outputs

    return replay


@torch.no_grad()
def step_plain(model: LT2, x: Tensors, delta_rule: DeltaRule, dtype: torch.dtype | None = None) -> Call:
    """In another dtype: that model and its memory, cast. Keys are those that the model has as well: it only adds to
    them; what it overwrites is copied."""
    past = len(x["past"])
    state = remembered(model, x)

    def kept(name: str, t: Tensor) -> Tensor:
        t = t[:, :past] if name in ("k", "v", "index_k") else t.clone()
        return t if dtype is None else t.to(dtype)

    caches: list[list[Cache]] = [[{n: kept(n, t) for n, t in c.items()} for c in loop] for loop in state.layers]
    plain = PlainModel(model if dtype is None else in_dtype(model, dtype), delta_rule)

    def call() -> Tensors:
        grown = ((dict(c) for c in row) for row in caches)  # those of a layer are gone when the next one begins
        return {"o": plain(x["ids"], grown, past, keep=1)}

    return torch.no_grad()(call)


def sequence_inputs(T: int, device: torch.device) -> Tensors:
    """Ids that every vocabulary has."""
    return {"ids": torch.arange(T, device=device)[None] * 7 % 251}


def prefill_case(name: str, T: int, dtype: torch.dtype, device: torch.device) -> Case:
    """One sequence from its start to the logits of its last token, with the memory that decoding goes on from."""
    sketch = meta(name)
    head = 2 * sketch.config.vocab_size * sketch.config.hidden_size

    def ours(x: Tensors) -> Call:
        model = build(name, dtype, device)
        forget(memories)
        state = model.new_state(1, x["ids"].shape[1])

        @torch.no_grad()
        def call() -> Tensors:
            state.reset()
            return {"o": model(x["ids"], state=state, logits_to_keep=1)}

        return call

    def plain(x: Tensors, rule: DeltaRule, dtype_: torch.dtype = dtype) -> Call:
        forget(memories)
        model = PlainModel(in_dtype(build(name, dtype, device), dtype_), rule)
        return torch.no_grad()(lambda: {"o": model(x["ids"], keep=1)})

    return Case(
        op="prefill",
        shape=f"{name} T={T} {NAMES[dtype]}",
        dtype=dtype,
        flops=T * (train_flops(sketch, T) // 3 - head) + head,
        moved=decode_bytes(sketch.to(dtype), T)[0],
        tokens=T,
        inputs=lambda: sequence_inputs(T, device),
        ours=ours,
        torch=lambda x: plain(x, reference_rule),
        peers={"fla": lambda x: plain(x, fla_rule)},
        oracle=lambda x: plain(x, reference_rule, torch.float64)(),
        checked=lambda: sequence_inputs(min(CHECKED_SEQUENCE, T), device),
        tolerance=TOLERANCE,
        beside_torch=True,
        eager=True,
    )


def train_case(name: str, T: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Loss and gradients of one sequence, every block computed again in the backward pass. The plain one does not train
    its indexers. The last token's logits are compared, not the loss: in one number errors may cancel by chance."""
    sketch = meta(name)

    def ours(x: Tensors) -> Call:
        model = build(name, dtype, device)
        forget(memories)
        model.gradient_checkpointing = True

        def call() -> Tensors:
            model.zero_grad()
            out = model(x["ids"], labels=x["ids"], logits_to_keep=1)
            out.loss.backward()
            return {"o": out.logits[0, -1].detach(), **gradients(model)}

        return call

    def plain(x: Tensors, rule: DeltaRule, dtype_: torch.dtype = dtype) -> Call:
        model = in_dtype(build(name, dtype, device), dtype_)
        forward = PlainModel(model, rule, checkpointed=True)

        def call() -> Tensors:
            model.zero_grad()
            logits = forward(x["ids"])[0]
            exact = torch.promote_types(logits.dtype, F32)
            F.cross_entropy(logits[:-1].to(exact), x["ids"][0, 1:]).backward()
            return {"o": logits[-1].detach(), **gradients(model)}

        return call

    return Case(
        op="train step",
        shape=f"{name} T={T} {NAMES[dtype]}",
        dtype=dtype,
        flops=T * train_flops(sketch, T),
        moved=3 * decode_bytes(sketch.to(dtype), T)[0],
        tokens=T,
        inputs=lambda: sequence_inputs(T, device),
        ours=ours,
        torch=lambda x: plain(x, reference_rule),
        peers={"fla": lambda x: plain(x, fla_rule)},
        oracle=lambda x: plain(x, reference_rule, torch.float64)(),
        checked=lambda: sequence_inputs(min(CHECKED_SEQUENCE, T), device),
        tolerance=TOLERANCE,
        beside_torch=True,
        eager=True,
    )


def gradients(model: LT2) -> Tensors:
    """One that every loop and layer has a part in."""
    assert model.rho is not None
    assert model.rho.grad is not None
    return {"drho": model.rho.grad}
