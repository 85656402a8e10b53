"""Every mixer at a tiny size for the same steps on the same text: what it learns, and whether it is calm."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lt2_ext.models import LT2
from lt2_ext.models.mixers import MIXERS
from lt2_ext.models.presets import PRESETS, preset

from . import stdlib_bytes

HYBRIDS = ("tiny", "tiny-gdn-dsa")


@dataclass
class Result:
    """bits: per byte of held-out text; losses: of each step, in bits per byte; largest: norm of the gradient after the
    first tenth of the steps."""

    name: str
    pattern: str
    parameters: int
    state_bytes: int
    losses: list[float]
    bits: float
    largest: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lt2_ext.recipes.family", description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of each run, default 200")
    parser.add_argument("--batch", type=int, default=8, help="pieces of 256 bytes in a step, default 8")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, metavar="PRESET", help="default: the tiny ones")
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args(argv)
    corpus = stdlib_bytes.load(windows=16)
    names = args.presets or [*HYBRIDS, *(f"tiny-{m}" for m in MIXERS)]
    results = [run(name, corpus, args.steps, args.batch) for name in names]
    text = table(results)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


def run(name: str, corpus: stdlib_bytes.Corpus, steps: int, batch: int) -> Result:
    """``steps`` steps of the preset called ``name``."""
    torch.manual_seed(0)
    model = LT2(preset(name))
    norms: list[float] = []

    def tick(step: stdlib_bytes.Step) -> None:
        norms.append(step.grad_norm)
        print(f"\r{name}: step {len(norms)}, {step.loss:.2f} bits per byte ", end="", file=sys.stderr)

    history = stdlib_bytes.train(model, corpus.train, 0.0, tick, steps, batch)
    print(file=sys.stderr)
    return Result(
        name=name,
        pattern=model.config.layer_pattern,
        parameters=sum(p.numel() for p in model.parameters()),
        state_bytes=model.new_state(1, 4096).nbytes,
        losses=[step.loss for step in history],
        bits=stdlib_bytes.bits_per_byte(model, corpus.held_out),
        largest=max(norms[steps // 10 :]),
    )


def table(results: Sequence[Result]) -> str:
    lines = [
        "| preset | layers | weights | state of 4096 tokens | bits per byte, held out | trained on, last tenth "
        "| largest gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(results, key=lambda r: r.bits):
        last = r.losses[-max(1, len(r.losses) // 10) :]
        lines.append(
            f"| `{r.name}` | `{r.pattern}` | {r.parameters / 1e6:.2f} M | {r.state_bytes / 2**20:.2f} MiB "
            f"| {r.bits:.3f} | {sum(last) / len(last):.3f} | {r.largest:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
