"""``lt2 train``: text in, a looped language model out. The same command continues a run that was stopped or crashed."""

from __future__ import annotations

import argparse
import fcntl
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from . import checkpoint, prepare, runlog, settings, shards, text
from .files import UserError, checksum, out_of_memory, read_json, run_command, write
from .settings import Run
from .trainer import Trainer

SECONDS_PER_FIGURE = 60.0
OUT_OF_MEMORY = (
    "out of memory: lower train.batch_size and raise train.grad_accumulation by the same factor, or set "
    "train.gradient_checkpointing=true (the last checkpoint is good)"
)
TEXT_SETTINGS = ("path", "tokenizer", "vocab_size", "suffix", "held_out")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lt2 train",
        description="Train a looped language model on text. Settings come from a YAML file and from key=value; the "
        "defaults are the paper's recipe. The folder out=... gets the settings, log.jsonl, loss.png and checkpoints; "
        "the same command continues from the newest. Ctrl-C stops after the step and saves.",
        epilog="example: lt2 train out=runs/book data.path=book.txt model=tiny data.sequence_length=256 "
        "train.steps=300 train.batch_size=8 train.grad_accumulation=1 optimizer.lr=3e-3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="FILE.yaml key=value", help="settings and changes to them")
    parser.add_argument("--keys", action="store_true", help="print every setting with its default, and stop")
    args = parser.parse_args(argv)
    if args.keys:
        print(settings.to_yaml(Run()), end="")
        return 0
    return run_command(parser.prog, lambda: train(settings.read(args.settings)))


def train(run: Run) -> int:
    if not run.data.path:
        raise UserError("data.path must name a text file, a folder of texts, or prepared tokens")
    resolve(run)
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out):
        folder = tokens_of(run)
        with prepare.bar("checking the data", shards.nbytes(folder)) as tick:
            splits = shards.open_shards(folder, run.data.verify, tick)
        tokenizer = text.load(folder)
        config = settings.model_config(run.model, tokenizer.vocab_size)
        if config.vocab_size < splits["train"].vocab_size:
            needed = splits["train"].vocab_size
            raise UserError(f"model.vocab_size must be at least the {needed} of the data, got {config.vocab_size}")
        run.model = {k: v for k, v in config.to_dict().items() if k != "model_type"}
        path, saved = out / "settings.yaml", checkpoint.find(out / "checkpoints")
        if saved and path.is_file():
            settings.check_same(settings.read([str(path)]), run, path)
        write(path, settings.to_yaml(run))
        print(settings.to_yaml(run), flush=True)
        trainer = Trainer(run, config, splits, tokenizer, checksum(folder / shards.INDEX))
        if saved:
            trainer.load(saved[-1])
            print(f"continues from {saved[-1]}", flush=True)
        return loop(trainer, out)


def resolve(run: Run) -> None:
    """Put what ``auto`` and null mean here in their place."""
    t, o = run.train, run.optimizer
    t.device = ("cuda" if torch.cuda.is_available() else "cpu") if t.device == "auto" else t.device
    try:
        torch.empty(0, device=t.device)
        kind = torch.device(t.device).type
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"train.device must be a device of this machine, got {t.device!r}") from e
    if kind not in ("cpu", "cuda"):
        raise UserError(f"train.device must be cpu or cuda, got {t.device!r}")
    t.dtype = ("bf16" if kind == "cuda" else "fp32") if t.dtype == "auto" else t.dtype
    o.warmup_steps = min(10_000, t.steps // 10) if o.warmup_steps is None else o.warmup_steps


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Two runs in one folder would destroy each other's checkpoints. The lock dies with the process."""
    with open(out / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another run is training in {out}") from e
        yield


def tokens_of(run: Run) -> Path:
    """The folder of tokens that ``data.path`` is, or that is made from its text."""
    path = Path(run.data.path)
    if (path / shards.INDEX).is_file():
        return path
    folder = Path(run.out) / "data"
    wanted = {name: getattr(run.data, name) for name in TEXT_SETTINGS}
    made = folder / "text.json"
    if made.is_file() and (old := read_json(made)) != wanted:
        key = next(k for k in wanted if old.get(k) != wanted[k])
        raise UserError(f"{folder} was made with data.{key} = {old.get(key)!r}, now it is {wanted[key]!r}; remove it")
    if not (folder / shards.INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write(made, json.dumps(wanted) + "\n")
        prepare.run(
            argparse.Namespace(
                sources=[Path(p) for p in run.data.path.split(",")],
                suffix=run.data.suffix.split(",") if run.data.suffix else None,
                exclude=[],
                tokenizer=run.data.tokenizer,
                vocab_size=run.data.vocab_size,
                bos=text.BOS,
                eos=text.EOS,
                held_out=run.data.held_out,
                out=folder,
            )
        )
    return folder


class Stop:
    """Ctrl-C and SIGTERM end the run after the step; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.old = {s: signal.signal(s, self._set) for s in (signal.SIGINT, signal.SIGTERM)}

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def loop(trainer: Trainer, out: Path) -> int:
    t, folder = trainer.run.train, out / "checkpoints"
    log = runlog.Log(out / "log.jsonl", trainer.step)
    progress = runlog.Progress(trainer.step, t.steps)
    stop, begun, tokens, drawn = Stop(), time.monotonic(), 0, 0.0
    try:
        while trainer.step < t.steps and not stop.signal:
            watch = (trainer.step + 1) % t.log_every == 0
            record = trainer.train_step(watch)
            tokens += trainer.tokens_per_step
            rate = tokens / (time.monotonic() - begun)
            paused = time.monotonic()
            if trainer.step % t.eval_every == 0 or trainer.step == t.steps:
                held_out = trainer.evaluate()
                if held_out is not None:
                    record["held_out_loss"] = held_out
                    progress.say(f"step {trainer.step:,}: held-out loss {held_out:.4f}")
            if watch or "held_out_loss" in record:
                record["tokens/s"] = round(rate, 1)
                if trainer.device.type == "cuda":
                    record["peak_memory"] = torch.cuda.max_memory_allocated(trainer.device)
                log.add(record)
            progress.update(trainer.step, record["loss"], rate)
            if trainer.step % t.checkpoint_every == 0:
                log.sync()
                trainer.save(folder)
                if paused - drawn > SECONDS_PER_FIGURE:
                    runlog.plot(log.records, out / "loss.png")
                    drawn = paused
            begun += time.monotonic() - paused
        log.sync()
        path = trainer.save(folder)
        runlog.plot(log.records, out / "loss.png")
    except RuntimeError as e:
        if out_of_memory(e):
            raise UserError(OUT_OF_MEMORY) from e
        raise
    finally:
        progress.close()
        log.close()
        stop.restore()
    if stop.signal:
        print(f"stopped after step {trainer.step:,}; the same command continues from {path}")
        return 128 + stop.signal
    losses = [f"loss {r['loss']:.4f}   " for r in log.records[-1:]]
    print(f"done: {path}   {''.join(losses)}figure {out / 'loss.png'}   next: lt2 generate {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
