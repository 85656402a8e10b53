"""Draw what ``bench/run.py --suite loop`` measured, tokens per second against the context, and the memory of a state.

    python bench/contexts.py RESULT.json PICTURE.png
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from report import Run
from suites.loop import SHAPES

from lt2_ext.models import LT2, LT2Config

DASHES = {1: ":", 2: "--", 4: "-"}


def measured(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Of each model: contexts, and tokens per second."""
    points: dict[str, list[tuple[int, float]]] = {}
    for r in run.results:
        found = re.fullmatch(r"(.* T=\d) B=1 context=(\d+) .*", r.shape)
        if found and r.role == "ours" and (seconds := run.seconds(r)):
            points.setdefault(found[1], []).append((int(found[2]), 1 / seconds))
    return points


def state_bytes(name: str, context: int) -> int:
    """Of one sequence in bf16, as ``lt2 plan`` counts them."""
    with torch.device("meta"):
        model = LT2(LT2Config(**SHAPES[name])).to(torch.bfloat16)
    return model.new_state(1, context).nbytes


def draw(run: Run, path: Path) -> None:
    points = measured(run)
    contexts = sorted({context for line in points.values() for context, _ in line})
    patterns = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in points))
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, line in points.items():
        pattern, loops = name.rsplit(" T=", 1)
        style = {"color": f"C{patterns.index(pattern)}", "linestyle": DASHES[int(loops)], "marker": ".", "label": name}
        left.plot(*zip(*line, strict=True), **style)
        right.plot(contexts, [state_bytes(name, context) / 2**20 for context in contexts], **style)
    left.set(ylabel="tokens per second", title="Decoding, batch 1")
    right.set(ylabel="MiB", title="State of one sequence, bf16")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="tokens of context")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k")
        axes.set_xticks(contexts)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, handlelength=4)
    figure.suptitle(f"{run.device}, torch {run.torch}", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(Run.load(Path(sys.argv[1])), Path(sys.argv[2]))
