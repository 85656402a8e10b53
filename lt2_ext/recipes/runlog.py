"""What a training run says: a JSON line per step, a progress bar, a figure of the loss."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
from tqdm import tqdm

from .files import replace

matplotlib.use("Agg")
from matplotlib import pyplot as plt

QUIET = 10.0  # seconds between lines where there is no terminal


class Log:
    """``log.jsonl``, cut after ``step``: what a crashed run wrote beyond its checkpoint is done again."""

    def __init__(self, path: Path, step: int) -> None:
        self.records = [r for r in read(path) if r["step"] <= step]
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(r) + "\n" for r in self.records)
        replace(temporary, path)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the log)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log, up to the first line that a crash left unfinished."""
    records: list[dict[str, Any]] = []
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    break
                records.append(record)
    return records


class Progress:
    """A bar with loss, tokens/s and the time left; on no terminal, a line now and then."""

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.steps, self.begun = start, steps, time.monotonic()
        self.said = self.begun
        form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        terminal = sys.stderr.isatty()
        options: dict[str, Any] = {"bar_format": form, "dynamic_ncols": True, "leave": False}
        self.bar = tqdm(initial=start, total=steps, **options) if terminal else None

    def update(self, step: int, loss: float, rate: float) -> None:
        note = f"loss {loss:.3f}, {rate:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(step - self.bar.n)
        elif (now := time.monotonic()) - self.said > QUIET:
            self.said = now
            left = (now - self.begun) / (step - self.start) * (self.steps - step)
            self.say(f"step {step:,}/{self.steps:,}: {note}, {tqdm.format_interval(left)} left")

    def say(self, message: str) -> None:
        if self.bar is None:
            print(message, flush=True)
        else:
            self.bar.write(message)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Loss, held-out loss, and the residual stream after each loop, over the steps."""
    trained = [r for r in records if "loss" in r]
    tested = [r for r in records if "held_out_loss" in r]
    watched = [r for r in records if "residual_rms" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    steps, losses = [r["step"] for r in trained], [r["loss"] for r in trained]
    left.plot(steps, losses, lw=0.6, alpha=0.5, color="C0")
    left.plot(steps, smooth(losses), color="C0", label="training")
    if tested:
        held_out = [r["held_out_loss"] for r in tested]
        left.plot([r["step"] for r in tested], held_out, "o-", ms=3, color="C1", label="held out")
    left.set(title="Loss", xlabel="step", ylabel="nats per token")
    for loop in range(len(watched[0]["residual_rms"]) if watched else 0):
        sizes = [r["residual_rms"][loop] for r in watched]
        right.plot([r["step"] for r in watched], sizes, lw=1, label=f"loop {loop + 1}")
    right.set(title="Residual stream after each loop", xlabel="step", ylabel="RMS")
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def smooth(values: list[float]) -> list[float]:
    """Exponential average over about a fiftieth of the values."""
    keep = math.exp(-50 / max(len(values), 50))
    result: list[float] = []
    for value in values:
        result.append(value if not result else keep * result[-1] + (1 - keep) * value)
    return result
