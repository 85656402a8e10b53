"""Results as data, as a table, as markdown with a plot. Also a command: python bench/report.py RESULT.json [DIR]."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from timing import Ceilings, Times

HEADER = ["op", "shape", "ours", "torch", "best peer (version)", "ratio", "% of floor", "error"]
DETAILS = ["op", "shape", "implementation", "min", "median", "p10..p90", "runs", "/ ours", "% of floor", "error"]
WHOLE = ["tokens/s", "peak GiB"]  # of whole models


@dataclass
class Result:
    """One implementation on one case. Without ``times``, ``note`` says why."""

    suite: str
    op: str
    shape: str
    name: str
    version: str
    role: Literal["ours", "torch", "peer"]
    floor: float  # seconds, at the measured ceilings
    note: str = ""
    error: float | None = None  # relative, against the float64 oracle, of the output nearest to its tolerance
    error_of: str = ""
    tolerance: float | None = None
    times: Times | None = None
    tokens: int = 0  # of a call
    peak: int = 0  # bytes of the GPU in a call, all that is there included


@dataclass
class Run:
    """Everything that one command measured."""

    command: str
    machine: str  # slug, the name of the report
    device: str
    isa: str
    threads: int
    torch: str
    python: str
    commit: str
    flags: dict[str, str]  # environment variables of the package
    date: str
    load_average: list[float]  # at the start and at the end
    statistic: Literal["min", "median"]  # the time of an implementation, where one number stands for it
    ceilings: Ceilings
    results: list[Result] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Run:
        data: dict[str, Any] = json.loads(path.read_text())
        copy = {int(size): rate for size, rate in data["ceilings"]["copy"].items()}
        data["ceilings"] = Ceilings(copy, data["ceilings"]["matmul"])
        data["results"] = [Result(**{**r, "times": r["times"] and Times(**r["times"])}) for r in data["results"]]
        return Run(**data)

    def seconds(self, result: Result) -> float | None:
        return getattr(result.times, self.statistic) if result.times else None

    def cases(self) -> list[list[Result]]:
        """The results of each case: ours, plain torch, the peers."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for r in self.results:
            groups.setdefault((r.op, r.shape), []).append(r)
        return list(groups.values())


def duration(seconds: float) -> str:
    unit, scale = next((u for u in (("s", 1.0), ("ms", 1e3)) if seconds * u[1] >= 1), ("us", 1e6))
    return f"{seconds * scale:.3g} {unit}"


def over(run: Run, result: Result, ours: Result) -> float | None:
    """The time of ``result`` over ours: above 1 ours is faster."""
    t, other = run.seconds(ours), run.seconds(result)
    return other / t if t and other else None


def line(run: Run, results: list[Result]) -> str:
    """One case, every implementation: its time, or why there is none."""
    cells = [f"{r.name} {duration(s) if (s := run.seconds(r)) else f'({r.note})'}" for r in results]
    return f"{results[0].op}, {results[0].shape}: {'; '.join(cells)}"


def quality(run: Run, result: Result) -> list[str]:
    """Percent of the floor, and the error."""
    seconds = run.seconds(result)
    share = f"{100 * result.floor / seconds:.0f} %" if seconds else ""
    return [share, "" if result.error is None else f"{result.error:.1e} ({result.error_of})"]


def main_table(run: Run) -> list[list[str]]:
    """One row per case, then one per reason why a peer has no time. ``ratio`` is best peer (else torch) over ours."""
    rows, missing = [], Counter[tuple[str, str, str]]()
    for ours, plain, *others in run.cases():
        cells = [duration(s) if (s := run.seconds(r)) else r.note for r in (ours, plain)]
        best = min((r for r in others if r.times), key=lambda r: run.seconds(r) or 0, default=None)
        peer = f"{duration(run.seconds(best) or 0)} {best.name} ({best.version})" if best else "-"
        ratio = over(run, best or plain, ours)
        rows.append([ours.op, ours.shape, *cells, peer, f"{ratio:.2f}" if ratio else "", *quality(run, ours)])
        missing.update((r.suite, r.name, r.note) for r in others if not r.times)
    for (suite, name, note), count in missing.items():
        rows.append([suite, f"{count} rows", "", "", f"{name}: {note}", "", "", ""])
    return rows


def details_table(run: Run) -> list[list[str]]:
    """With its header."""
    whole = any(r.tokens for r in run.results)
    rows = [DETAILS + WHOLE * whole]
    for results in run.cases():
        for r in results:
            times = [r.note, "", "", ""]
            if t := r.times:
                times = [duration(t.min), duration(t.median), f"{duration(t.p10)}..{duration(t.p90)}", str(t.runs)]
            name = f"{r.name} {r.version}".strip()
            ratio = over(run, r, results[0])
            cells = [r.op, r.shape, name, *times, f"{ratio:.2f}" if ratio else "", *quality(run, r)]
            seconds = run.seconds(r) if r.tokens else None
            rates = [f"{r.tokens / seconds:.4g}" if seconds else "", f"{r.peak / 2**30:.1f}" if r.peak else ""]
            rows.append(cells + rates * whole)
    return rows


def text(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)


def facts(run: Run) -> str:
    copy = ", ".join(f"{rate / 1e9:.0f} GB/s ({size >> 20} MiB)" for size, rate in run.ceilings.copy.items())
    matmul = ", ".join(f"{n.split('.')[1]} {rate / 1e12:.2f} TFLOP/s" for n, rate in run.ceilings.matmul.items())
    flags = " ".join(f"{k}={v}" for k, v in run.flags.items()) or "none"
    load = " and ".join(f"{x:.1f}" for x in run.load_average)
    return f"""\
- {run.device}, {run.isa}, {run.threads} CPU threads; torch {run.torch}, Python {run.python}; commit {run.commit}
- {run.date}; load average {load} at start and end; environment: {flags}
- ceilings in this run: copy (read + write, by working set) {copy}; matmul {matmul}
- one time is the {run.statistic} of interleaved runs; ratio = best peer, else torch, over ours: above 1 ours is faster
- floor = the larger of FLOPs / matmul rate and bytes / copy rate; an update in place can exceed the latter
- error = relative to a float64 oracle, of the output nearest to its tolerance (for a peer three times ours); beyond its
  tolerance nothing is timed; long sequences are checked by shorter ones"""


def plot(run: Run, path: Path) -> str:
    """Draw the time of every implementation over ours, one line per case; return the markdown that shows it."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError:
        return "No plot: matplotlib is not installed."
    drawn = [results for results in run.cases() if results[0].times]
    points: dict[str, list[tuple[float, int]]] = {}
    for y, (ours, *others) in enumerate(drawn):
        for r in others:
            if ratio := over(run, r, ours):
                points.setdefault(r.name, []).append((ratio, y))
    figure = Figure(figsize=(10, 2 + 0.28 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=1)
    for (name, xy), marker in zip(points.items(), "os^Dv<>P*X", strict=False):
        ratios, rows = zip(*xy, strict=True)
        axes.scatter(ratios, rows, label=name, marker=marker, s=28, zorder=3)
    axes.set(xscale="log", xlabel=f"time / time of lt2_ext ({run.statistic}); right of 1 lt2_ext is faster")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(drawn)), [f"{results[0].op}  {results[0].shape}" for results in drawn], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    if points:
        figure.legend(loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)
    return f"![time of each implementation over ours]({path.name})"


def write(run: Run, directory: Path) -> Path:
    """Render ``<machine>.md`` and ``<machine>.png``; return the path of the former."""
    directory.mkdir(parents=True, exist_ok=True)
    path, details = directory / f"{run.machine}.md", details_table(run)
    parts = [
        f"`{run.command}`",
        f"# {run.machine}",
        facts(run),
        markdown(HEADER, main_table(run)),
        plot(run, path.with_suffix(".png")),
        "## Every implementation",
        markdown(details[0], details[1:]),
    ]
    path.write_text("\n\n".join(parts) + "\n")
    return path


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(write(Run.load(source), Path(sys.argv[2]) if len(sys.argv) > 2 else source.parent))
