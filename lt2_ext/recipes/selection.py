"""Does a trained indexer find the keys that attention wants? A small GDN+DSA model learns the Python standard library,
beside the same with one selection for all loops, with an indexer that is never trained, and with full attention."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lt2_ext.models import LT2
from lt2_ext.models.loop_state import Tokens
from lt2_ext.models.mixers import SparseAttention
from lt2_ext.models.mixers._mixer import Selection

from . import stdlib_bytes
from .instruments import attention

LOOPS, TOPK = 3, 32
SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "loop_count": LOOPS, "layer_pattern": "gdn,full"}
SPARSE: dict[str, Any] = SHAPE | {"layer_pattern": "gdn,dsa", "index_topk": TOPK, "index_head_dim": 32}
RUNS: dict[str, dict[str, Any]] = {
    "trained indexer": SPARSE,
    "trained, indices of loop 1": SPARSE | {"state_reuse": "index:share"},
    "indexer never trained": SPARSE | {"index_loss_weight": 0.0},
    "full attention": SHAPE,
}
WARMUP = 0.3  # share of the steps in which every key is attended to, in every run
MEASURED = 4  # windows that the selections are measured on, a few times a run
POOLS = (32, 64, 128)


@dataclass
class Selections:
    """How much of the attention to all visible keys falls on the selected ones, as a share of what the best of as many
    hold; the same for a random indexer and for the newest keys; and the share of selected keys that loops have in
    common. Means over the tokens that see more keys than are selected."""

    caught: list[float]  # in each loop
    random: float
    newest: float
    overlap: list[list[float]]  # loop by loop


@dataclass
class Result:
    name: str
    model: LT2
    history: list[stdlib_bytes.Step]
    bits: float
    measured: list[tuple[float, Selections]] = field(default_factory=list)  # after so many million bytes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lt2_ext.recipes.selection", description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of each of the four runs, default 300")
    parser.add_argument("--plot", type=Path, default=Path("selection.png"), help="figure, default selection.png")
    args = parser.parse_args(argv)
    corpus, results = stdlib_bytes.load(windows=16), []
    for name, changes in RUNS.items():
        results.append(run(name, changes, corpus, args.steps))
        print(describe(results[-1]), flush=True)
    windows = corpus.held_out[:MEASURED].long()
    for pool in POOLS:
        keys, mass = found(results[0].model, windows, pool)
        print(
            f"{results[0].name}, {windows.shape[1]} bytes, blocks of {pool} keys first: "
            f"{100 * keys:.0f} % of its keys, {100 * mass:.0f} % of the attention on them"
        )
    draw(args.plot, results)
    print(f"Figure: {args.plot}")
    return 0


def run(name: str, changes: dict[str, Any], corpus: stdlib_bytes.Corpus, steps: int) -> Result:
    model = stdlib_bytes.new_model(**changes)
    windows = corpus.held_out[:MEASURED, : stdlib_bytes.LENGTH].long()
    measured: list[tuple[float, Selections]] = []

    def tick(step: stdlib_bytes.Step) -> None:
        progress = step.tokens / (steps * stdlib_bytes.BATCH * stdlib_bytes.LENGTH)
        model.dense_warmup = progress < WARMUP
        if "dsa" in model.config.layer_types and progress > len(measured) / 12:
            measured.append((step.tokens / 1e6, measure(model, windows)))

    model.dense_warmup = True
    history = stdlib_bytes.train(model, corpus.train, 0.0, tick, steps)
    model.dense_warmup = False
    if measured:
        measured.append((history[-1].tokens / 1e6, measure(model, windows)))
    return Result(name, model, history, stdlib_bytes.bits_per_byte(model, corpus.held_out), measured)


@torch.no_grad()
def observe(
    model: LT2, tokens: Tensor, others: Callable[[SparseAttention, Tensor, Tokens, Selection], Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """In each loop of the last layer that selects: attention to all visible keys, the keys of the indexer, and those of
    ``others``, ``[B, T, T]``."""
    mixer = last_mixer(model)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(module: nn.Module, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        x, where, *_ = arguments
        index = results[1].selection  # may be that of the first loop
        q, (k, *_) = mixer.project(x, where, None, None)
        ours, theirs = mixer.select(index, index.k, where), others(mixer, x, where, index)
        seen.append((attention(q, k), selected(ours, x.shape[1]), selected(theirs, x.shape[1])))

    handle = mixer.register_forward_hook(watch)
    model(tokens)
    handle.remove()
    return seen


def last_mixer(model: LT2) -> SparseAttention:
    return [m for m in model.modules() if isinstance(m, SparseAttention)][-1]


def found(model: LT2, tokens: Tensor, pool: int) -> tuple[float, float]:
    """What a two-level search finds of the whole one, over the tokens that see more keys than are selected: share of
    the keys, and of the attention on them."""

    def two_level(mixer: SparseAttention, x: Tensor, where: Tokens, index: Selection) -> Tensor:
        pooled = copy.copy(mixer)
        pooled.pool = pool
        return pooled.select(index, index.k, where)

    chosen, seen = slice(last_mixer(model).topk, None), observe(model, tokens, two_level)
    keys = sum(float((a & b)[:, chosen].sum() / a[:, chosen].sum()) for _, a, b in seen)
    mass = sum(float((p * b)[:, chosen].sum() / (p * a)[:, chosen].sum()) for p, a, b in seen)
    return keys / len(seen), mass / len(seen)


def measure(model: LT2, tokens: Tensor) -> Selections:
    """Of tokens ``[B, T]``, in the last of the layers that select."""

    def random(mixer: SparseAttention, x: Tensor, where: Tokens, index: Selection) -> Tensor:
        other = random_indexer(mixer).index(x, where)
        return mixer.select(other, other.k, where)

    seen = observe(model, tokens, random)
    T, topk = tokens.shape[1], last_mixer(model).topk
    age = torch.arange(T)[:, None] - torch.arange(T)
    newest, chosen = (age >= 0) & (age < topk), slice(topk, None)

    def share(p: Tensor, mask: Tensor) -> float:
        best = p.topk(topk, -1).values.sum(-1)
        return float(((p * mask).sum(-1) / best)[:, chosen].mean())

    masks = [mask for _, mask, _ in seen]
    return Selections(
        caught=[share(p, mask) for p, mask, _ in seen],
        random=sum(share(p, mask) for p, _, mask in seen) / len(seen),
        newest=sum(share(p, newest) for p, _, _ in seen) / len(seen),
        overlap=[[float((a & b)[:, chosen].sum() / a[:, chosen].sum()) for b in masks] for a in masks],
    )


def random_indexer(mixer: SparseAttention) -> SparseAttention:
    """The mixer with the weights that its indexer could have started from."""
    fresh = copy.deepcopy(mixer)
    for linear in (fresh.index_q_proj, fresh.index_k_proj, fresh.index_weights_proj):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=torch.Generator().manual_seed(2))
    return fresh


def selected(indices: Tensor, T: int) -> Tensor:
    """bool ``[B, T, T]``"""
    mask = torch.zeros(*indices.shape[:2], T + 1, dtype=torch.bool)
    return mask.scatter_(2, indices.long().masked_fill(indices < 0, T), value=True)[..., :T]


def describe(r: Result) -> str:
    last = r.history[-1]
    lines = [f"{r.name}: {last.tokens:,} bytes in {last.seconds:.0f} s, {r.bits:.3f} bits per byte of held-out files"]
    if r.measured:
        s = r.measured[-1][1]
        caught = ", ".join(f"{100 * c:.0f}" for c in s.caught)
        lines += [
            f"  attention on its {TOPK} keys, % of what the best {TOPK} hold, by loop: {caught}; "
            f"a random indexer {100 * s.random:.0f}, the newest keys {100 * s.newest:.0f}",
            "  keys in common, %: "
            + "; ".join(
                f"loops {i + 1} and {j + 1} {100 * s.overlap[i][j]:.0f}" for i in range(LOOPS) for j in range(i)
            ),
        ]
    return "\n".join(lines)


def draw(path: Path, results: Sequence[Result]) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as e:
        raise SystemExit("the figure needs matplotlib (pip install matplotlib)") from e
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for i, r in enumerate(results):
        steps = [s.tokens / 1e6 for s in r.history]
        keep = max(1, len(steps) // 60)
        means = [sum(s.loss for s in r.history[j : j + keep]) / keep for j in range(0, len(steps) - keep + 1, keep)]
        left.plot(steps[keep - 1 :: keep], means, lw=1.2, label=f"{r.name} ({r.bits:.2f} held out)", color=f"C{i}")
        if r.measured:
            caught = [100 * sum(s.caught) / len(s.caught) for _, s in r.measured]
            middle.plot([t for t, _ in r.measured], caught, "o-", ms=3, label=r.name, color=f"C{i}")
    first = results[0]
    for name, style in (("random", ":"), ("newest", "--")):
        label = {"random": "random indexer", "newest": f"newest {TOPK} keys"}[name]
        middle.plot(
            [t for t, _ in first.measured], [100 * getattr(s, name) for _, s in first.measured],
            style, color="gray", label=f"{label} (in the first run)",
        )  # fmt: skip
    middle.axvspan(0, WARMUP * first.history[-1].tokens / 1e6, color="gray", alpha=0.12, label="dense warm-up")
    overlap = first.measured[-1][1].overlap
    right.imshow(overlap, vmin=0, vmax=1, cmap="viridis")
    for i, row in enumerate(overlap):
        for j, value in enumerate(row):
            right.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="w" if value < 0.6 else "k")
    right.set_xticks(range(LOOPS), [f"loop {i + 1}" for i in range(LOOPS)])
    right.set_yticks(range(LOOPS), [f"loop {i + 1}" for i in range(LOOPS)])
    right.set(title="Keys in common, % (trained indexer)")
    left.set(title="Training on Python sources", xlabel="million bytes", ylabel="bits per byte", ylim=(1.5, 6))
    middle.set(title=f"Attention on the selected {TOPK} keys, % of the best {TOPK}", ylim=(0, 100))
    middle.set_xlabel("million bytes")
    for axis in (left, middle):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
