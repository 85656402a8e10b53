"""Every mode of ``state_reuse`` after the same steps on the same data: what it predicts, the bytes of its memory, the
time of a token. Two tasks: bytes of the Python standard library, and recall of pairs that the text has once."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2_ext.models import LT2, Engine, LT2Config
from lt2_ext.models.presets import preset

from . import stdlib_bytes

HYBRID, SPARSE = "interleaved:2:1:gdn:full", "interleaved:2:1:gdn:dsa"
TRAINED = {
    HYBRID: ("none", "kv:first", "gdn:read", "gdn:segment:32", "kv:first,gdn:segment:32"),
    SPARSE: ("none", "index:share", "kv:first,index:share"),
}
DECODED = ("kv:last", "kv:mean")  # of the weights that were trained with none
SHAPE: dict[str, Any] = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "loop_count": 3}
SHAPE |= {"num_attention_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
SHAPE |= {"index_topk": 32, "index_head_dim": 32}
WARMUP = 0.3  # share of the steps in which layers that select attend to every key
PAIRS, NAMES, ROUNDS = 8, 16, 3  # of a recall text: pairs, keys and as many values to choose from, how often it asks
BATCH, LENGTH = {"text": 16, "recall": 32}, 128  # bytes of a piece of text
TESTED = 256  # texts
TIMED = 40  # tokens


class Job(NamedTuple):
    task: str
    pattern: str
    mode: str
    seed: int


@dataclass
class Result:
    """bits: per token of the second half of new texts, in recall of the values there; right: share of the latter;
    seconds: of the training, 0 where there is none."""

    task: str
    pattern: str
    mode: str
    seed: int
    bits: float
    right: float
    seconds: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lt2_ext.recipes.reuse", description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of each run, default 400")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="a run of each for all, default 0 1 2")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (training in autocast bf16), default cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, default 1")
    parser.add_argument("--context", type=int, default=4096, help="tokens before those that are timed, default 4096")
    parser.add_argument("--timed", metavar="PRESET", help="time a preset's size in place of the one trained")
    parser.add_argument("--out", type=Path, help="write the table there too, and every number to the same .json")
    args = parser.parse_args(argv)
    modes = [(pattern, mode) for pattern, modes in TRAINED.items() for mode in modes]
    jobs = [Job(task, *m, seed) for seed in args.seeds for m in reversed(modes) for task in BATCH]
    results: list[Result] = []
    for done in run_all(jobs, args.steps, args.device, args.jobs):
        results += done
        print(*done, sep="\n", file=sys.stderr, flush=True)
    times, middle = {}, len(TRAINED[HYBRID])
    for pattern, mode in [*modes[:middle], *((HYBRID, mode) for mode in DECODED), *modes[middle:]]:
        times[pattern, mode] = decode_seconds(timed_config(args.timed, pattern, mode), args.device, args.context)
    text = table(results, times, f"ms a token after {args.context}" + f", {args.timed}" * (args.timed is not None))
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
        rows = [asdict(r) for r in results], [[*m, seconds] for m, seconds in times.items()]
        args.out.with_suffix(".json").write_text(json.dumps(dict(zip(("runs", "decode"), rows, strict=True)), indent=1))
    return 0


def run_all(jobs: Sequence[Job], steps: int, device: str, processes: int) -> Iterator[list[Result]]:
    """In so many processes, each with its share of the CPU threads; as they are done."""
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for future in as_completed([pool.submit(run, job, steps, device) for job in jobs]):
            yield future.result()


def config(pattern: str, mode: str) -> LT2Config:
    return LT2Config(**SHAPE, layer_pattern=pattern, state_reuse=mode)


def run(job: Job, steps: int, device: str) -> list[Result]:
    """Train, and measure; of ``none`` also what the modes make of its weights that need no training."""
    torch.manual_seed(job.seed)
    model = LT2(config(job.pattern, job.mode)).to(device)

    def tick(step: stdlib_bytes.Step) -> None:
        model.dense_warmup = len(history) < WARMUP * steps
        history.append(step)

    history: list[stdlib_bytes.Step] = []
    model.dense_warmup = True
    draw, tested = texts() if job.task == "text" else recall()
    stdlib_bytes.fit(model, draw, 0.0, tick, steps, seed=1 + job.seed)
    model.dense_warmup = False
    results = [Result(*job, *measure(model, *tested), history[-1].seconds)]
    for mode in DECODED if (job.pattern, job.mode) == (HYBRID, "none") else ():
        model.config.state_reuse = mode
        results.append(Result(*job._replace(mode=mode), *measure(model, *tested)))
    return results


Batch = tuple[Tensor, Tensor]  # tokens and labels, -100 where there is none


def texts() -> tuple[stdlib_bytes.Draw, Batch]:
    """Batches of the standard library; and pieces of its held-out files."""
    corpus = stdlib_bytes.load(windows=TESTED * LENGTH // stdlib_bytes.WINDOW)
    held_out = corpus.held_out.view(-1, LENGTH).long()
    return stdlib_bytes.pieces(corpus.train, BATCH["text"], LENGTH), (held_out, held_out)


def recall() -> tuple[stdlib_bytes.Draw, Batch]:
    """Pairs of a key and a value, then the same pairs in other orders: the values there are to be told."""

    def draw(generator: torch.Generator, rows: int = BATCH["recall"]) -> Batch:
        def orders(*shape: int) -> Tensor:
            return torch.rand(rows, *shape, generator=generator).argsort(-1)

        values = torch.randint(NAMES, 2 * NAMES, (rows, PAIRS), generator=generator)
        pairs, asked = torch.stack((orders(NAMES)[:, :PAIRS], values), 2), orders(ROUNDS, PAIRS).flatten(1)
        tokens = torch.cat((pairs, pairs.gather(1, asked[..., None].expand(-1, -1, 2))), 1)
        labels = tokens.clone()
        labels[:, :PAIRS] = labels[..., 0] = -100
        return tokens.flatten(1), labels.flatten(1)

    return draw, draw(torch.Generator().manual_seed(0), TESTED)


@torch.no_grad()
def measure(model: LT2, tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    """Bits per token of the second half, and share of right ones; the first half is a prompt."""
    device, half = next(model.parameters()).device, tokens.shape[1] // 2
    tokens, labels = tokens.to(device), labels[:, half:].to(device)
    if model.config.state_reuse in DECODED:
        state = model.new_state(*tokens.shape)
        parts = [model(tokens[:, :half], state=state, logits_to_keep=1)]
        parts += [model(t, state=state, generated=True) for t in tokens[:, half:-1].split(1, 1)]
        logits = torch.cat(parts, 1)
    else:
        logits = torch.cat([model(t)[:, half - 1 : -1] for t in tokens.split(32)])
    asked = labels >= 0
    right = (logits.argmax(-1) == labels)[asked].float().mean()
    return float(F.cross_entropy(logits[asked].float(), labels[asked])) / math.log(2), float(right)


def timed_config(name: str | None, pattern: str, mode: str) -> LT2Config:
    if name is None:
        return config(pattern, mode)
    return preset(name, layer_pattern=pattern, state_reuse=mode)


@torch.no_grad()
def decode_seconds(config: LT2Config, device: str, context: int) -> float:
    """Median time that an engine takes for a token of one sequence."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LT2(config).to(torch.bfloat16)
    engine = Engine(model, 1, context + TIMED, chunk=4096)
    generation = engine.add([1] * context, TIMED)
    times = []
    while not generation.done:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[-TIMED // 2 :])


def state_bytes(pattern: str, mode: str) -> tuple[float, float, float]:
    """Of the state of a sequence in bf16: for each of its tokens, beside them, and of this in a snapshot between
    segments."""
    with torch.device("meta"):
        model = LT2(config(pattern, mode)).to(torch.bfloat16)
    short, long = (model.new_state(1, n) for n in (1024, 2048))
    rest = 2 * short.nbytes - long.nbytes
    return (long.nbytes - short.nbytes) / 1024, rest, rest - (short.arena.nbytes - short.kept_nbytes)


def table(results: Sequence[Result], times: dict[tuple[str, str], float], timed: str) -> str:
    """Means over the seeds, and standard deviations."""

    def spread(values: Sequence[float], digits: int) -> str:
        if not values:
            return ""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"

    lines = [
        "| layers | `state_reuse` | text, bits per byte | recall, bits per answer | recall, % right | bytes a token "
        f"| and a sequence | {timed} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (pattern, mode), seconds in times.items():
        ours = [r for r in results if (r.pattern, r.mode) == (pattern, mode)]
        bits = {task: [r.bits for r in ours if r.task == task] for task in BATCH}
        right = [100 * r.right for r in ours if r.task == "recall"]
        per_token, rest, kept = state_bytes(pattern, mode)
        memory = f"{rest / 1024:.0f} KiB" + f", saved {kept / 1024:.0f}" * (kept < rest)
        lines.append(
            f"| `{pattern}` | `{mode}` | {spread(bits['text'], 3)} | {spread(bits['recall'], 3)} | {spread(right, 1)} "
            f"| {per_token:.0f} | {memory} | {1e3 * seconds:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
