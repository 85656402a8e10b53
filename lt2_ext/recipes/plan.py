"""``lt2 plan``: what a model costs, before it runs. Nothing is allocated."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lt2_ext.models import LT2, LoopState, LT2Config
from lt2_ext.models.config import Layer
from lt2_ext.models.mixers import MIXERS, Attention, LinearMixer, Mixer, NativeSparseAttention, SparseAttention
from lt2_ext.models.presets import PRESETS

from . import checkpoint, settings, shards
from .files import UserError, read_json, run_command
from .instruments import kind_of
from .trainer import BYTES_PER_PARAMETER

GDN_FLOPS = 7  # per token and entry of a head's matrix: decay 1; k^T S, k x correction, q^T S 2 each


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lt2 plan",
        description="Parameters, FLOPs per token, bytes of state per loop and layer, memory for training: of a preset, "
        "a saved model or the folder of a run, a config.json, or a settings file of lt2 train. Nothing is allocated.",
        epilog=f"example: lt2 plan lt2-1.3b-full-gdn --context 32768   presets: {', '.join(PRESETS)}",
    )
    parser.add_argument("model", metavar="MODEL", help="preset, folder, config.json, or settings file (.yaml)")
    parser.add_argument("changes", nargs="*", default=[], metavar="key=value", help="such as model.loop_count=2")
    parser.add_argument("--context", type=int, help="tokens of a sequence, default 4096 or that of the settings")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: plan(args.model, args.changes, args.context))


def plan(name: str, changes: Sequence[str], context: int | None) -> int:
    run, config = find(name, changes)
    length = (run.data.sequence_length if run else 4096) if context is None else context
    if not 1 <= length <= 2**30:
        raise UserError(f"--context must be in 1..{2**30}, got {length}")
    shape = f"{config.num_hidden_layers} layers x {config.loop_count} loops, hidden {config.hidden_size}"
    print(f"{name}: {shape}, {config.layer_pattern}, vocabulary {config.vocab_size:,}")
    with torch.device("meta"):
        model = LT2(config)
    counts = count_parameters(model)
    total = sum(counts.values())
    print(f"parameters {total:,}: " + ", ".join(f"{kind} {count:,}" for kind, count in counts.items()))
    trained, decoded = train_flops(model, length), forward_flops(model, length)
    print(f"FLOPs per token: {in_units(trained, 'FLOP')} in training, forward and backward, sequences of {length:,};")
    print(f"  {in_units(decoded, 'FLOP')} in decoding, after {length:,} tokens")
    print(f"state of one sequence of {length:,} tokens, bf16:")
    print(f"  {'mixer':<14}{'loops':<8}{'layers':>6}{'each loop and layer':>22}{'all':>12}")
    state = model.to(torch.bfloat16).new_state(1, length)
    costs = state_costs(state)
    for row in costs:
        sizes = f"{in_units(row.nbytes, 'B'):>22}{in_units(row.nbytes * row.count, 'B'):>12}"
        print(f"  {row.mixer:<14}{row.loops:<8}{row.layers:>6}{sizes}")
    print(f"  {'all':<50}{in_units(state.nbytes, 'B'):>12}")
    kinds = ", ".join(f"{name} {in_units(nbytes, 'B')}" for name, nbytes in state.kind_nbytes.items())
    print(f"  one allocation, {in_units(state.arena.nbytes, 'B')} a sequence: {kinds}")
    if state.kept_nbytes < state.arena.nbytes:
        print(f"  a snapshot between segments has {in_units(state.kept_nbytes, 'B')} of it: one matrix for all loops")
    gigabytes = f"{in_units(BYTES_PER_PARAMETER * total, 'B')} in training (fp32, gradients, AdamW)"
    weights, memory = decode_bytes(model.to(torch.bfloat16), length)
    print(f"a step of decoding moves at least {in_units(weights, 'B')} of weights, which every loop reads,", end=" ")
    print(f"and {in_units(memory, 'B')} of state for each sequence")
    print(f"weights: {in_units(2 * total, 'B')} in bf16, {gigabytes}, activations not counted")
    if run is not None:
        t = run.train
        tokens = t.batch_size * t.grad_accumulation * run.data.sequence_length
        print(f"the run: {t.steps:,} steps x {tokens:,} tokens = {in_units(t.steps * tokens, ' tokens')}, ", end="")
        print(in_units(t.steps * tokens * train_flops(model, run.data.sequence_length), "FLOP"))
    return 0


def find(name: str, changes: Sequence[str]) -> tuple[settings.Run | None, LT2Config]:
    """The configuration that ``name`` means, and the settings where that is a settings file."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        run = settings.read([name, *changes])
        return run, settings.model_config(run.model, vocabulary(run.data))
    changed = settings.read([c if c.startswith("model.") else f"model.{c}" for c in ("preset=null", *changes)]).model
    if name in PRESETS:
        values = PRESETS[name]
    elif path.suffix == ".json":
        values = read_json(path)
    elif path.exists():
        values = read_json(checkpoint.model_folder(path) / "config.json")
    else:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"presets: {', '.join(PRESETS)}"
        raise UserError(f"there is no file or preset {name}; {hint}")
    return None, settings.model_config({**values, **changed}, None)


def vocabulary(data: settings.Data) -> int | None:
    """Its size in training on this data, as far as it is known before."""
    if not data.path:
        return None
    index = Path(data.path) / shards.INDEX
    if index.is_file():
        return shards.open_shards(index.parent, verify=False)["train"].vocab_size
    return 258 if data.tokenizer == "bytes" else data.vocab_size


def count_parameters(model: LT2) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, p in model.named_parameters():
        counts[kind_of(name, model.config.layer_types)] += p.numel()
    return dict(counts)


def forward_flops(model: LT2, context: int) -> int:
    """Of one token that has ``context`` tokens behind it, itself included: matrix products and mixers."""
    return _flops(model, lambda window: min(window or context, context))


def train_flops(model: LT2, length: int) -> int:
    """Of one token on average over a sequence, forward and twice as much backward."""

    def seen(window: int | None) -> float:
        w = min(window or length, length)
        return w - w * (w - 1) / (2 * length)  # mean of min(t, w) over t = 1..length

    return 3 * _flops(model, seen)


def _flops(model: LT2, seen: Callable[[int | None], float]) -> int:
    def matrices(module: nn.Module) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

    total = 2.0 * model.config.vocab_size * model.config.hidden_size
    for number, loop in enumerate(model.config.schedule()):
        for block, layer in zip(model.layers, loop, strict=True):
            total += 2 * matrices(block)
            mixer, reuse = block.mixer, model.config.reuse
            if number > 0 and isinstance(mixer, Mixer):
                total -= 2 * sum(matrices(m) for m in first_loop_only(mixer))
            if isinstance(mixer, SparseAttention):
                total += 4 * mixer.heads * mixer.head_dim * seen(mixer.topk)
                if number == 0 or reuse.index != "share":
                    total += 2 * mixer.index_heads * mixer.index_dim * seen(None)
            elif isinstance(mixer, NativeSparseAttention):
                keys = seen(mixer.window) + seen(mixer.count * mixer.block) + seen(None) / mixer.block
                total += 4 * mixer.heads * mixer.head_dim * keys
            elif isinstance(mixer, Attention):
                total += 4 * mixer.heads * mixer.head_dim * seen(layer.window)
            elif isinstance(mixer, LinearMixer):
                total += 2 * mixer.conv_weight.numel() if mixer.short_conv else 0
                scans = 2 if number > 0 and layer.mixer == "gdn" and reuse.gdn == "read" else 1
                per_entry = GDN_FLOPS if mixer.erases else GDN_FLOPS - 2
                total += scans * per_entry * mixer.value_heads * mixer.key_dim * mixer.value_dim
            else:
                raise UserError(f"lt2 plan does not know the FLOPs of {layer.mixer}; known: {', '.join(MIXERS)}")
    return round(total)


def first_loop_only(mixer: Mixer) -> list[nn.Module]:
    """The projections that later loops do not apply, because they read their results."""
    names = {"k": ["k_proj"], "v": ["v_proj"], "index_k": ["index_q_proj", "index_k_proj", "index_weights_proj"]}
    return [getattr(mixer, name) for kind in mixer.reused for name in names[kind]]


@dataclass
class StateCost:
    """(loop, layer) pairs whose memory is alike."""

    mixer: str
    loops: str
    layers: int
    nbytes: int
    count: int


def state_costs(state: LoopState) -> list[StateCost]:
    pairs: dict[tuple[Layer, int], list[int]] = {}
    for number, (loop, memory) in enumerate(zip(state.config.schedule(), state.layers, strict=True), 1):
        for layer, tensors in zip(loop, memory, strict=True):
            pairs.setdefault((layer, sum(t.nbytes for t in tensors.values())), []).append(number)
    costs = []
    for (layer, nbytes), numbers in pairs.items():
        loops = sorted(set(numbers))
        whole = len(loops) > 1 and len(loops) == loops[-1] - loops[0] + 1
        words = f"{loops[0]}-{loops[-1]}" if whole else ",".join(map(str, loops))
        name = layer.mixer if layer.window is None else f"{layer.mixer}:{layer.window}"
        costs.append(StateCost(name, words, len(numbers) // len(loops), nbytes, len(numbers)))
    return costs


def decode_bytes(model: LT2, context: int) -> tuple[int, int]:
    """Least traffic with the memory of a decode step after ``context`` tokens: of weights, and of the state of each
    sequence. A matrix state and its window are read and written, of keys and values those are read that are seen."""
    blocks = sum(p.nbytes for block in model.layers for p in block.parameters())
    head = model.config.vocab_size * model.config.hidden_size * model.embed_tokens.weight.itemsize
    memory = 0.0
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    layers = model.new_state(1, context).layers
    for loop in layers:
        for mixer, own, first in zip(mixers, loop, layers[0], strict=True):
            tensors, seen = {name: first[name] for name in ("k", "v") if name in mixer.reused} | own, 1.0
            if isinstance(mixer, SparseAttention):
                seen = min(mixer.topk / context, 1)
            elif isinstance(mixer, NativeSparseAttention):
                seen = min((mixer.window + mixer.count * mixer.block) / context, 1)
            parts = {"k": seen, "v": seen, "index_k": 1, "k_mean": 1, "v_mean": 1}
            memory += sum(tensor.nbytes * parts.get(name, 2) for name, tensor in tensors.items())
    spared = sum(p.nbytes for mixer in mixers for m in first_loop_only(mixer) for p in m.parameters())
    loops = model.config.loop_count
    return loops * blocks - (loops - 1) * spared + head, round(memory)


def in_units(number: float, unit: str) -> str:
    """Three digits and a prefix: 1234567, "B" -> "1.23 MB"."""
    for factor, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{_digits(number / factor)} {prefix}{unit}"
    return f"{number:g} {unit}"


def _digits(x: float) -> str:
    return f"{x:.2f}" if x < 9.995 else f"{x:.1f}" if x < 99.95 else f"{x:.0f}"


if __name__ == "__main__":
    sys.exit(main())
