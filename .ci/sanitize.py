"""Run the CUDA kernels of the linear mixers under compute-sanitizer, on small shapes.

    make sanitize
    make sanitize ARGS="--tool racecheck --only 'forward.*96' --jobs 4"

Each case is a process of its own under each tool; one that a tool has anything to say about is printed with what it
said. Exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lt2_ext import ops
from lt2_ext.testing import gdn_inputs

TOOLS = ("memcheck", "initcheck", "racecheck")
FOUND = 9  # exit status of the sanitizer where it reports something
SHOWN = 40  # lines of a report
BF16, FP16 = torch.bfloat16, torch.float16
PACKED = (0, 0, 1, 130, 300)  # offsets of sequences of 0, 1, 129 and 170 tokens


def scan(
    op: Callable[..., Any] = ops.chunk_gated_delta_rule,
    backward: bool = False,
    packed: bool = False,
    portable: bool = False,
    width: int = 128,
    V: int | None = None,
    **sizes: Any,
) -> None:
    """The forward pass of an operator over sequences from an initial state, or also its backward pass."""
    if portable:
        os.environ["LT2_CUDA_KERNELS"] = "portable"  # read once, by the first operator
    if packed:
        sizes |= {"T": PACKED[-1], "sequences": len(PACKED) - 1}
    x = gdn_inputs(**{"B": 1, "dtype": BF16, "device": "cuda", "K": width, "V": V or width} | sizes)
    if op in (ops.chunk_kda, ops.chunk_gla):
        x["g"] = x["g"][..., None].repeat(1, 1, 1, width)
    if op in (ops.chunk_gla, ops.chunk_simple_gla):
        del x["beta"]
    offsets = torch.tensor(PACKED, device="cuda") if packed else None
    leaves = {name: t.requires_grad_(backward) for name, t in x.items()}
    o, state = op(**leaves, output_final_state=True, cu_seqlens=offsets)
    if backward:
        torch.autograd.backward([o, state], [torch.ones_like(o), torch.ones_like(state)])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def step(t: int, B: int = 2, H: int = 2, HV: int = 4, K: int = 128, state_dtype: torch.dtype = torch.float32) -> None:
    state, q, k = random(B + 1, HV, K, K, dtype=state_dtype), random(B, t, H, K), random(B, t, H, K)
    half = [x.to(BF16) for x in (q, k, random(B, t, HV, K), random(B, t, HV), random(B, t, HV))]
    slots = torch.tensor([2, -1], device="cuda")
    ops.gated_delta_step_(state, *half, random(HV), random(HV), slots=slots)


def fused_step(t: int, B: int = 2, H: int = 2, HV: int = 4, K: int = 128) -> None:
    D = (2 * H + HV) * K
    state, conv_state = random(B, HV, K, K), random(B, D, 4, dtype=BF16)
    half = [random(B, t, *shape, dtype=BF16) for shape in ((D,), (HV, K), (HV,), (HV,))]
    ops.gdn_decode_fused_(state, conv_state, *half, random(D, 4), random(HV), random(HV), random(K))


# Which kernels run follows from choose_cut() in csrc/gdn/cuda/sm90/forward_launch.cuh; by its model of an H100's or
# H200's 132 multiprocessors the cases take what their names say. Backward, gradients follow the scans in one launch
# unless heads are many.
CASES: dict[str, Callable[[], None]] = {
    "forward 64": partial(scan, width=64, T=200),
    "forward 64 segments": partial(scan, width=64, T=2500, H=1),
    "forward 96": partial(scan, width=96, V=192, T=200),
    "forward 96 segments in clusters": partial(scan, width=96, V=192, T=4200, H=1),
    "forward 96 clusters": partial(scan, width=96, V=192, T=130, H=48),
    "forward 96 fp16": partial(scan, width=96, V=192, T=200, dtype=FP16),
    "forward 128": partial(scan, T=200),
    "forward 128 segments": partial(scan, T=4200, H=1),
    "forward 128 two slices": partial(scan, T=130, H=80),
    "forward 128 fp16": partial(scan, T=200, dtype=FP16),
    "forward 128 grouped": partial(scan, T=200, H=1, HV=4),
    "forward 128 packed": partial(scan, packed=True),
    "forward 192 helpers aside": partial(scan, width=192, V=384, T=200, H=1),
    "forward 192 helpers aside, all multiprocessors": partial(scan, width=192, V=384, T=130, H=16),
    "forward 192 clusters": partial(scan, width=192, V=384, T=130, H=18),
    "forward 192 two slices": partial(scan, width=192, V=384, T=130, H=32),
    "forward 192 segments": partial(scan, width=192, V=384, T=4200, H=1),
    "forward 192 packed": partial(scan, width=192, V=384, packed=True, H=1),
    "forward 192 fp16": partial(scan, width=192, V=384, T=200, H=1, dtype=FP16),
    "forward 64 portable": partial(scan, portable=True, width=64, packed=True),
    "forward 96 portable": partial(scan, portable=True, width=96, V=192, T=70, H=1),
    "forward 128 portable, many heads": partial(scan, portable=True, T=70, H=80),
    "forward 256": partial(scan, width=256, T=130, H=1),
    "forward 80": partial(scan, width=80, T=130, H=1),
    "forward float32": partial(scan, T=70, H=1, dtype=torch.float32),
    "backward 64": partial(scan, backward=True, width=64, T=200, H=1),
    "backward 96": partial(scan, backward=True, width=96, V=192, T=200, H=1),
    "backward 128": partial(scan, backward=True, T=200, H=1),
    "backward 128 fp16": partial(scan, backward=True, T=130, H=1, dtype=FP16),
    "backward 128 grouped": partial(scan, backward=True, T=130, H=1, HV=2),
    "backward 128 packed": partial(scan, backward=True, packed=True, H=1),
    "backward 192": partial(scan, backward=True, width=192, V=384, T=130, H=1),
    "backward 96 many heads": partial(scan, backward=True, width=96, V=192, T=70, H=24),
    "backward 128 many heads": partial(scan, backward=True, T=70, H=40),
    "backward 192 many heads": partial(scan, backward=True, width=192, V=384, T=70, H=12),
    "simple_gla": partial(scan, ops.chunk_simple_gla, backward=True, T=130, H=1),
    "kda": partial(scan, ops.chunk_kda, backward=True, T=130, H=1),
    "gla": partial(scan, ops.chunk_gla, backward=True, T=130, H=1),
    "step": partial(step, 1),
    "step of 3 tokens, bf16 state": partial(step, 3, state_dtype=BF16),
    "fused step": partial(fused_step, 1),
    "fused step of 3 tokens": partial(fused_step, 3),
}


def find_sanitizer() -> str:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found = shutil.which("compute-sanitizer") or shutil.which(home / "bin/compute-sanitizer")
    if found is None:
        raise SystemExit("no compute-sanitizer found: install the CUDA toolkit, or set CUDA_HOME")
    return found


def sanitize(tool: str, case: str) -> tuple[str, str, subprocess.CompletedProcess[str]]:
    # Without torch's cache of blocks every tensor is an allocation, and its end is known.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = [find_sanitizer(), "--tool", tool, "--error-exitcode", str(FOUND)]
    command = [*watched, sys.executable, __file__, "--run", case]
    return tool, case, subprocess.run(command, capture_output=True, text=True, env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be repeated; default: all")
    parser.add_argument("--only", default="", help="cases in which this regular expression is found")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--run", choices=CASES, help="run one case, in this process")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    if options.run:
        torch.manual_seed(0)
        CASES[options.run]()
        torch.cuda.synchronize()
        return 0
    start = time.monotonic()
    runs = [(tool, case) for tool in options.tool or TOOLS for case in CASES if re.search(options.only, case)]
    with ThreadPoolExecutor(options.jobs) as pool:
        finished = list(pool.map(sanitize, *zip(*runs, strict=True))) if runs else []
    bad = [run for run in finished if run[2].returncode]
    for tool, case, process in bad:
        said = (process.stdout + process.stderr).splitlines()
        print(f"{tool}, {case}: status {process.returncode}", *said[:SHOWN], sep="\n  ")
    print(f"{len(finished) - len(bad)} of {len(finished)} runs without a report ({time.monotonic() - start:.0f} s)")
    return int(bool(bad) or not finished)


if __name__ == "__main__":
    sys.exit(main())
