"""The decode step of one sequence against its context, for several patterns and numbers of loops. ``bench/contexts.py``
draws it."""

from __future__ import annotations

from typing import Any

import torch

from lt2_ext.models.presets import PRESETS

from . import Case
from .model import DEMO, MODELS, decode_case, meta

LOOPS = (1, 2, 4)
PATTERNS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "demo-full": DEMO | {"layer_pattern": "full"},
        "demo-full-gdn": DEMO,
        "demo-gdn-dsa": DEMO | {"layer_pattern": "interleaved:3:1:gdn:dsa"},
    },
    "cuda": {name: PRESETS[name] for name in ("lt2-1.3b-full", "lt2-1.3b-full-gdn", "lt2-1.3b-gdn-dsa")},
}
SHAPES = {f"{n} T={T}": s | {"loop_count": T} for p in PATTERNS.values() for n, s in p.items() for T in LOOPS}
MODELS |= SHAPES  # where the suite of whole models looks names up
ROOM = 0.75  # share of a GPU's memory that a state may take


def cases(device: torch.device, quick: bool) -> list[Case]:
    cuda = device.type == "cuda"
    dtype, longest = (torch.bfloat16, 17) if cuda else (torch.float32, 15)
    room = ROOM * torch.cuda.get_device_properties(device).total_memory if cuda else float("inf")
    rows = [
        (f"{name} T={loops}", 2**power)
        for name in PATTERNS[device.type]
        for loops in (LOOPS[-1:] if quick else LOOPS)
        for power in ((10, 13) if quick else range(10, longest + 1))
    ]
    fitting = [(n, context) for n, context in rows if meta(n).to(dtype).new_state(1, context).nbytes < room]
    return [decode_case(name, 1, context, dtype, device) for name, context in fitting]
