"""Clocks, interleaved measurement, and the ceilings of the machine. May import: torch only."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

MIN_SAMPLE = 5e-4  # seconds: a shorter call is repeated within one sample
MIN_RUNS = 5
ENOUGH = 10.0  # seconds of samples of a call that suffice, however few
SHORT, SHORT_CALLS = 1e-3, 20  # on CUDA: calls shorter than so many seconds are measured so many at a time


@dataclass(frozen=True)
class Times:
    """Seconds per call over ``runs`` samples."""

    min: float
    median: float
    p10: float
    p90: float
    runs: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples
        return Times(min(samples), statistics.median(samples), deciles[0], deciles[-1], len(samples))


class CpuClock:
    def __init__(self) -> None:
        self.repeats: dict[Call, int] = {}

    def prepare(self, call: Call) -> Call:
        """Warm up, and choose how often a sample repeats the call."""
        self.repeats[call] = 1
        self.repeats[call] = math.ceil(MIN_SAMPLE / self.sample(call))
        return call

    def sample(self, call: Call) -> float:
        repeats = self.repeats[call]
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaClock:
    """CUDA events around a sample, after a write that evicts the L2 cache. A sample is one call, or ``SHORT_CALLS`` one
    after the other where one is short: the events themselves take microseconds. Of an update in place whose data fit
    in the L2 cache, all but the first then find them there."""

    def __init__(self, graph: bool) -> None:
        self.graph = graph
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.repeats: dict[Call, tuple[int, int]] = {}  # launches of a sample, calls in each

    def prepare(self, call: Call) -> Call:
        """Warm up (compilation, autotuning), choose the size of a sample, and capture it as a graph if asked to."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # as capturing requires
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.repeats[call] = 1, 1
        calls = SHORT_CALLS if self.sample(call) < SHORT else 1
        self.repeats[call] = calls, 1
        if not self.graph:
            return call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        replay = graph.replay
        self.repeats[replay] = 1, calls
        replay()  # uploads the graph
        return replay

    def sample(self, call: Call) -> float:
        launches, calls = self.repeats[call]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (launches * calls)


def peak_bytes(call: Call) -> int:
    """Most that is allocated on the GPU at a time during a call, by anybody."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def make_clock(device: torch.device, graph: bool = False) -> CpuClock | CudaClock:
    return CudaClock(graph) if device.type == "cuda" else CpuClock()


def interleaved(
    clock: CpuClock | CudaClock,
    calls: Mapping[str, Call],
    rounds: int,
    budgets: Mapping[str, float],
    failures: dict[str, Exception],
) -> dict[str, Times]:
    """Sample every (prepared) call once per round, in alternating order, so that a change of the machine's load meets
    all of them. A call that has used its budget of seconds drops out, but not before ``MIN_RUNS`` samples or ``ENOUGH``
    seconds. One that fails has no times, but its exception in ``failures``."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in order:
                few = i < MIN_RUNS and spent[name] < ENOUGH
                if name in failures or not (spent[name] < budgets[name] or few):
                    continue
                start = time.perf_counter()
                try:
                    samples[name].append(clock.sample(calls[name]))
                except Exception as e:  # such as no memory left
                    failures[name] = e
                spent[name] += time.perf_counter() - start
            order.reverse()
    finally:
        gc.enable()
    return {name: Times.of(values) for name, values in samples.items() if name not in failures}


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best: ``copy`` in bytes/s (read + write) by working set in bytes, ``matmul`` in FLOP/s
    by dtype."""

    copy: dict[int, float]
    matmul: dict[str, float]

    def floor(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Least seconds for ``flops`` matrix FLOPs in ``dtype`` and ``moved`` bytes; the copy rate is that of the
        nearest measured working set, so data that fit in a cache are held against the cache. Half precision is no
        slower than float32, to which it can be converted (a CPU may have no instructions for it)."""
        copy = self.copy[min(self.copy, key=lambda size: abs(math.log(size / moved)))]
        matmul = max(self.matmul[str(dtype)], self.matmul["torch.float32"])
        return max(flops / matmul, moved / copy)


def measure_ceilings(device: torch.device, rounds: int = 10) -> Ceilings:
    """Best of ``rounds``. On CUDA the caches are flushed, so one working set tells the memory rate."""
    clock = make_clock(device)

    def best(call: Call) -> float:
        call = clock.prepare(call)
        return min(clock.sample(call) for _ in range(rounds))

    copy: dict[int, float] = {}
    matmul: dict[str, float] = {}
    for size in [4 << 30] if device.type == "cuda" else [2 << 20, 32 << 20, 512 << 20]:
        source, target = torch.zeros(2, size // 2, dtype=torch.uint8, device=device)
        copy[size] = size / best(lambda s=source, t=target: t.copy_(s))  # type: ignore[misc]
    for dtype in (torch.float32, torch.bfloat16):
        for n in [8192] if device.type == "cuda" else [512, 2048]:
            a, b = torch.randn(2, n, n, device=device).to(dtype)
            seconds = best(lambda a=a, b=b: a @ b)  # type: ignore[misc]
            matmul[str(dtype)] = max(matmul.get(str(dtype), 0), 2 * n**3 / seconds)
            if seconds > 0.1:  # without instructions for the dtype the larger one takes minutes
                break
    return Ceilings(copy, matmul)
