"""``lt2 doctor``: facts about this installation and a test of every operator against the float64 oracles."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata

import torch
from torch import Tensor

from . import __version__, build_info, ops
from .reference import causal_conv1d as conv_reference
from .reference import gdn as gdn_reference
from .reference import loop_state as loop_reference
from .testing import TOLERANCE, gdn_inputs, rel_err

REBUILD = "pip install --force-reinstall --no-deps ."
OPTIONAL = {
    "transformers": ("Hugging Face models", "transformers>=5.17"),
    "matplotlib": ("lt2 demo", "matplotlib"),
    "tqdm": ("lt2 demo", "tqdm"),
    "pytest": ("tests", "pytest pytest-timeout hypothesis"),
}
Results = Iterator[tuple[Tensor, Tensor]]  # (what the operator gave, what the oracle gives)


@dataclass
class Report:
    problems: list[str] = field(default_factory=list)

    def fact(self, name: str, text: str) -> None:
        print(f"{name:<34} {text}")

    def problem(self, what: str, fix: str) -> None:
        self.problems.append(f"{what}. Fix: {fix}")

    def finish(self) -> int:
        if not self.problems:
            print("OK")
            return 0
        count = len(self.problems)
        separator = " " if count == 1 else "\n  "
        print(separator.join([f"{count} problem{'s' * (count > 1)}:", *self.problems]))
        return 1


def describe_archs(archs: str) -> str:
    """``"90a-real;80-virtual"`` in CUDA's words: ``"sm_90a, compute_80"``."""
    names = []
    for arch in archs.split(";"):
        number, _, kind = arch.partition("-")
        names.append(f"compute_{number}" if kind == "virtual" else f"sm_{number}")
    return ", ".join(names)


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
