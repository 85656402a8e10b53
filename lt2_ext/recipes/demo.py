"""``lt2 demo``: four facts about looped linear-time transformers, measured here and now, then a model that learns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lt2_ext import build_info
from lt2_ext.models import LT2

from . import demo_facts, state_tracking, stdlib_bytes

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from tqdm import tqdm
except ModuleNotFoundError as e:
    raise SystemExit(f"lt2 demo needs {e.name}. Install: pip install tqdm matplotlib") from e

LOOP_COUNTS = (1, 2, 4)
TRACKING_SHARE = 0.3  # of the training time, for each model of the state tracking task
PROMPT = "    return "


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lt2 demo",
        description="Four facts about looped linear-time transformers, measured on this machine; then a small Full+GDN "
        "model trains on the Python standard library. About 3 minutes with the defaults. No network.",
        epilog="example: lt2 demo --seconds 20 --plot quick.png",
    )
    parser.add_argument("--seconds", type=float, default=60, help="training time, default 60; the rest scales with it")
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), help="figure to write, default demo.png")
    args = parser.parse_args(argv)
    if not 1 <= args.seconds <= 3600:
        parser.error(f"--seconds must be in 1..3600, got {args.seconds:g}")
    if not args.plot.parent.is_dir():
        parser.error(f"--plot must be in a folder that exists, got {args.plot}")

    isa, threads = build_info()["cpu_isa"], torch.get_num_threads()
    print(f"LT2: layers that run several times, with linear-time mixers. On this CPU ({isa}, {threads} threads):\n")
    start = time.perf_counter()
    runs = track_states(TRACKING_SHARE * args.seconds)
    stream()
    decoders = decode(rounds=max(5, min(30, round(args.seconds / 2))))
    compare(seconds=args.seconds / 100)
    history = learn(args.seconds)
    draw(args.plot, runs, decoders, history)
    print(f"\nFigure: {args.plot}   (the whole demo: {time.perf_counter() - start:.0f} s)")
    print(
        "Next: the model in 300 lines: lt2_ext/models/lt2.py   the operators: make bench   what is verified: make test"
    )
    return 0


@contextmanager
def progress(text: str, total: float, unit: str = "") -> Iterator[Callable[..., object]]:
    """A bar that disappears when it is done; the function adds to it."""
    form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(desc=text, total=total, leave=False, bar_format=form, dynamic_ncols=True, unit=unit) as bar:

        def add(amount: float = 1, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(min(amount, bar.total - bar.n))

        yield add


def track_states(seconds: float) -> list[state_tracking.Run]:
    with progress("1 state tracking", len(LOOP_COUNTS) * seconds) as add:
        runs = state_tracking.train(LOOP_COUNTS, seconds, add)
    print(
        f"1 State tracking, words of up to {state_tracking.LONGEST} swaps and rotations (group S3), one block of "
        f"{runs[0].parameters:,} parameters, {seconds:.0f} s each:"
    )
    results = ", ".join(f"{r.loops} x {100 * mean(r.accuracy):.0f} %" for r in runs)
    print(f"  {tracking_verdict(runs)} Right answers by number of loops: {results} (guessing: 17 %).")
    return runs


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tracking_verdict(runs: Sequence[state_tracking.Run]) -> str:
    """What this run shows, which depends on the machine: a slow one trains for fewer steps."""
    first, last = mean(runs[0].accuracy), mean(runs[-1].accuracy)
    if last > first + 0.05:
        return "Looping helps."
    return "Looping does not help in this short run." if last > first - 0.05 else "Looping hurts in this short run."


def stream() -> None:
    with progress("2 streaming", len(demo_facts.MIXERS)) as add:
        differences = demo_facts.streaming_differences(add)
    results = ", ".join(f"{mixer} {difference:.0e}" for mixer, difference in differences.items())
    print("2 Streaming a text in random pieces through the state gives the logits of one full forward;")
    print(f"  largest difference with 4 loops: {results}.")


def decode(rounds: int) -> list[demo_facts.Decoder]:
    with progress("3 decoding", len(demo_facts.CONTEXTS)) as add:
        decoders = demo_facts.decoding_costs(rounds, add)
    first, last = (f"{context // 1024}k" for context in (demo_facts.CONTEXTS[0], demo_facts.CONTEXTS[-1]))
    print(f"3 Decoding, 4 layers x 4 loops, one token after {first} tokens of context and after {last}:")
    for d in decoders:
        ms, mb = ([value / unit for value in values] for values, unit in ((d.seconds, 1e-3), (d.nbytes, 1e6)))
        print(f"  {d.name:<10} {ms[0]:6.1f} -> {ms[-1]:6.1f} ms   state {mb[0]:7.1f} -> {mb[-1]:7.1f} MB")
    return decoders


def compare(seconds: float) -> None:
    with progress("4 operators", len(demo_facts.CASES)) as add:
        results = demo_facts.compare_operators(seconds, add)
    print("4 Operators against plain PyTorch (how many times faster, and the relative difference):")
    for r in results:
        print(f"  {r.name:<34} {r.ratio:5.1f} x   {r.error:.0e}")


def learn(seconds: float) -> list[stdlib_bytes.Step]:
    corpus = stdlib_bytes.load()
    model = stdlib_bytes.new_model()
    size = sum(p.numel() for p in model.parameters())
    print(
        f"\nTraining: Full+GDN, {model.config.num_hidden_layers} layers x {model.config.loop_count} loops, {size:,} "
        f"parameters, on {len(corpus.train) / 1e6:.0f} MB of the Python standard library, byte by byte."
    )
    before = stdlib_bytes.bits_per_byte(model, corpus.held_out)
    with progress("  training", seconds) as add:
        done = 0.0

        def tick(step: stdlib_bytes.Step) -> None:
            nonlocal done
            add(step.seconds - done, f"{step.loss:.2f} bits/byte, {step.tokens / step.seconds:,.0f} bytes/s")
            done = step.seconds

        history = stdlib_bytes.train(model, corpus.train, seconds, tick)
    after = stdlib_bytes.bits_per_byte(model, corpus.held_out)
    packed = stdlib_bytes.gzip_bits_per_byte(corpus.held_out)
    last = history[-1]
    print(
        f"  {last.tokens:,} bytes in {len(history)} steps, {last.tokens / last.seconds:,.0f} bytes/s. "
        f"Held-out files, 2 KB windows: {before:.2f} -> {after:.2f} bits per byte; gzip {packed:.2f}."
    )
    print("  This shows that training works, not quality. A sample, generated through the state:")
    print("".join(f"    | {line.rstrip()[:100]}\n" for line in sample(model).splitlines()), end="")
    return history


def sample(model: LT2) -> str:
    prompt = torch.tensor([list(PROMPT.encode())])
    generator = torch.Generator().manual_seed(0)
    tokens = model.generate(prompt, max_new_tokens=240, temperature=0.8, top_p=0.95, generator=generator)
    text = bytes(tokens[0].tolist()).decode(errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def draw(
    path: Path,
    runs: Sequence[state_tracking.Run],
    decoders: Sequence[demo_facts.Decoder],
    history: Sequence[stdlib_bytes.Step],
) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.9), layout="constrained")
    tracking, times, sizes, loss = axes
    for run in runs:
        loops = f"{run.loops} loop{'s' * (run.loops > 1)}"
        tracking.plot(range(1, len(run.accuracy) + 1), [100 * a for a in run.accuracy], "o-", ms=3, label=loops)
    tracking.axhline(100 / 6, color="gray", ls=":", lw=1)
    tracking.set(title="State tracking (S3), equal parameters", xlabel="length of the word", ylabel="right answers, %")
    contexts = [context // 1024 for context in demo_facts.CONTEXTS]
    for d in decoders:
        times.plot(contexts, [1e3 * s for s in d.seconds], "o-", ms=3, label=d.name)
        sizes.plot(contexts, [n / 1e6 for n in d.nbytes], "o-", ms=3, label=d.name)
    times.set(title="Decoding, 4 layers x 4 loops", ylabel="ms per token", ylim=(0, None))
    sizes.set(title="Memory of one sequence", ylabel="MB", yscale="log")
    for axis in (times, sizes):
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{c}k" for c in contexts])
        axis.set_xlabel("context, tokens")
    loss.plot([s.seconds for s in history], [s.loss for s in history], lw=0.8)
    loss.set(title="Training on Python sources", xlabel="seconds", ylabel="loss, bits per byte", ylim=(0, 8))
    for axis in (tracking, times, sizes):
        axis.legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
