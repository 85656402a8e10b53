#!/usr/bin/env python
"""Measure the operators beside plain PyTorch and every peer that is installed; print a table, write a report.

    python bench/run.py --quick
    python bench/run.py --suite gdn --device cuda --graph --peers fla flashinfer --match "gdn fwd B=1 "

Each implementation is checked against a float64 oracle before it is timed; a wrong one gets no time. The exit status
is 1 if one of ours is wrong or fails.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import peers
import report
import timing
import torch
from report import Result, Run
from suites import Build, Case, Tensors
from tqdm import tqdm

import lt2_ext
from lt2_ext.testing import PLAIN_FACTOR, TOLERANCE, Kind, rel_err

SUITES = ("gdn", "kda", "causal_conv1d", "dsa", "window", "loop_state", "block_ops", "model", "loop")
ROUNDS, BUDGET = 50, {"cpu": 15.0, "cuda": 3.0}  # samples of each implementation, and seconds until it drops out
QUICK_ROUNDS, QUICK_BUDGET = 20, 1.5
PEER_SLACK = 3  # a peer is timed up to so many times our tolerance: most round more between their kernels


def kind(output: str) -> Kind:
    """Column of the tolerance table."""
    return "gate_grad" if output in ("dg", "dbeta") else "grad" if output.startswith("d") else "out"


def check(result: Result, outputs: Tensors, expected: Tensors, case: Case, plain: dict[str, float]) -> None:
    """Note the error of the output that is nearest to (or furthest beyond) its tolerance. plain: errors of torch, which
    are noted there."""
    errors = {n: rel_err(outputs[n], reference) for n, reference in expected.items()}
    slack = PEER_SLACK if result.role == "peer" else 1
    limits = {n: slack * (case.tolerance or TOLERANCE[case.dtype][kind(n)][0]) for n in expected}
    if case.beside_torch and case.dtype != torch.float32:
        if result.role == "torch":
            plain.update(errors)
        limits = {n: slack * PLAIN_FACTOR[kind(n)] * plain[n] for n in expected}
    worst = max(errors, key=lambda n: errors[n] / limits[n])
    result.error, result.error_of, result.tolerance = errors[worst], worst, limits[worst]
    if not errors[worst] <= limits[worst]:
        result.note = f"WRONG err={errors[worst]:.1e} ({worst}, tolerance {limits[worst]:.0e})"


def run_case(
    case: Case,
    suite: str,
    device: torch.device,
    ceilings: timing.Ceilings,
    chosen: Sequence[str] = tuple(peers.PEERS),
    rounds: int = QUICK_ROUNDS,
    budget: float = QUICK_BUDGET,
    graph: bool = False,
    plain_torch: bool = True,
) -> list[Result]:
    """Check every implementation, then time the right ones side by side. Ours is first, plain torch second. Where the
    check is on smaller inputs, the outputs on those that are timed must at least be finite."""
    results: dict[str, Result] = {}
    builds: dict[str, Build] = {}
    floor = ceilings.floor(case.flops, case.moved, case.dtype)

    def add(name: str, version: str, role: Literal["ours", "torch", "peer"], build: Build, missing: str = "") -> None:
        results[name] = Result(suite, case.op, case.shape, name, version, role, floor, missing, tokens=case.tokens)
        builds[name] = build

    add("lt2_ext", lt2_ext.__version__, "ours", case.ours)
    add("torch", torch.__version__, "torch", case.torch, "" if plain_torch or case.beside_torch else "left out")
    for name, build in case.peers.items():
        if (package := name.split()[0]) in chosen:
            peer = peers.find(package, device.type)
            add(name, peer.version, "peer", build, peer.missing)

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the case before
    clock = timing.make_clock(device, (graph or case.graph) and not case.eager)
    inputs = case.inputs()
    checked = case.checked() if case.checked else inputs
    compared = case.compared or (lambda inputs, outputs: outputs)
    expected = compared(checked, case.oracle(checked))
    calls = {}
    plain: dict[str, float] = {}
    for name, result in sorted(results.items(), key=lambda item: item[1].role != "torch"):
        if result.note:
            continue
        try:
            if case.checked and result.role == "peer":
                builds[name](inputs)()  # one that tunes itself in its first call tunes for what is timed
            call = builds[name](checked)
            check(result, compared(checked, call()), expected, case, plain)
            if case.checked and not result.note:
                call = builds[name](inputs)
                infinite = [n for n, t in call().items() if not bool(t.isfinite().all())]
                result.note = f"WRONG not finite: {', '.join(infinite)}" if infinite else ""
            if not result.note:
                calls[name] = clock.prepare(call)
                result.peak = timing.peak_bytes(call) if device.type == "cuda" else 0
        except peers.Unsupported as e:
            result.note = f"not supported: {e}"
        except Exception as e:  # a failing peer is a row of the table, and so is a failure of ours
            result.note = failed(e)
    endless = {n for n, r in results.items() if case.headline and r.role != "torch"}
    budgets = {n: math.inf if n in endless else budget for n in calls}
    failures: dict[str, Exception] = {}
    for name, times in timing.interleaved(clock, calls, rounds, budgets, failures).items():
        results[name].times = times
    for name, failure in failures.items():
        results[name].note = failed(failure)
    return list(results.values())


def failed(e: Exception) -> str:
    return f"failed: {type(e).__name__}: {' '.join(str(e).split())[:200]}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return model[1] if model else platform.processor() or platform.machine()


def machine_slug(device: torch.device, isa: str) -> str:
    """Such as ``epyc-9575f-avx512_bf16-2c`` or ``h200``."""
    noise = r"\(\w+\)|@.*|\b(nvidia|intel|amd|cpu|processor|\d+-core|with .*)\b"
    words = re.findall(r"[a-z0-9]+", re.sub(noise, " ", device_name(device).lower()))
    return "-".join(words if device.type == "cuda" else [*words, isa, f"{torch.get_num_threads()}c"])


def commit() -> str:
    """Of the source tree that this file is in."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: torch.device, arguments: Sequence[str], ceilings: timing.Ceilings) -> Run:
    cuda = device.type == "cuda"
    isa = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if cuda else lt2_ext.build_info()["cpu_isa"]
    return Run(
        command=shlex.join(["python", "bench/run.py", *arguments]),
        machine=machine_slug(device, isa),
        device=device_name(device),
        isa=isa,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        commit=commit(),
        flags={k: v for k, v in sorted(os.environ.items()) if k.startswith("LT2_") and k != peers.VLLM_CPU_SO},
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        load_average=[os.getloadavg()[0]],
        statistic="median" if cuda else "min",
        ceilings=ceilings,
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=SUITES, help="may be repeated; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=list(peers.PEERS), help="default: all")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--graph", action="store_true", help="cuda: time replays of a CUDA graph (decode steps always)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and runs: about two minutes on 2 cores")
    parser.add_argument("--rounds", type=int, help=f"samples of each implementation; default: {ROUNDS}")
    parser.add_argument("--seconds", type=float, help=f"until an implementation drops out of a case; default: {BUDGET}")
    parser.add_argument("--no-torch", action="store_true", help="leave plain PyTorch out where no check is beside it")
    parser.add_argument("--match", default="", help='only cases in whose "op shape" this regular expression is found')
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no case after so long")
    parser.add_argument("--json", type=Path, help="the data, saved after every case; default: OUT_DIR/<machine>.json")
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rounds, budget = (QUICK_ROUNDS, QUICK_BUDGET) if options.quick else (ROUNDS, BUDGET[device.type])
    rounds, budget = options.rounds or rounds, options.seconds or budget

    run = describe(device, arguments, timing.measure_ceilings(device))
    suites = options.suite or SUITES
    cases = [(s, c) for s in suites for c in importlib.import_module(f"suites.{s}").cases(device, options.quick)]
    cases = [(s, c) for s, c in cases if re.search(options.match, f"{c.op} {c.shape}")]
    path = options.json or options.out_dir / f"{run.machine}.json"
    end = time.monotonic() + 60 * options.minutes
    with tqdm(cases, unit="case", dynamic_ncols=True) as progress:
        for suite, case in progress:
            if time.monotonic() > end:
                break
            progress.set_postfix_str(f"{case.op} {case.shape}")
            how = rounds, budget, options.graph, not options.no_torch
            results = run_case(case, suite, device, run.ceilings, options.peers, *how)
            run.results += results
            run.save(path)
            progress.write(report.line(run, results))
    run.load_average.append(os.getloadavg()[0])

    run.save(path)
    written = report.write(run, options.out_dir)
    print(report.text(report.HEADER, report.main_table(run)))
    print(written)
    return int(any(r.role == "ours" and r.times is None for r in run.results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
