"""Checkpoints that a crash at any moment leaves whole.

A checkpoint is a folder ``step-N``: the model as ``LT2.save`` writes it, the tokenizer, ``trainer.pt`` (what else
training needs: tensors and numbers, no other pickle) and ``complete.json``, written last, with the size and checksum of
every file. A folder without it does not count.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lt2_ext.models import LT2

from . import text
from .files import UserError, checksum, inside, read_json, short, sync, write

COMPLETE, TRAINER = "complete.json", "trainer.pt"
NEEDED = ("config.json", "model.safetensors", TRAINER)
FORMAT = "lt2 checkpoint 1"


def find(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{9}", p.name) and (p / COMPLETE).is_file()]
    return sorted(found)


def save(folder: Path, model: LT2, tokenizer: text.Tokenizer, state: dict[str, Any], keep: int) -> Path:
    """Write ``step-N`` for ``state["step"]``; then remove all but the newest ``keep``, and what crashes left behind.

    Raises:
        UserError: The disk is full or the like; the older checkpoints are there still.
    """
    target = folder / f"step-{state['step']:09}"
    if target in find(folder):
        return target
    temporary = folder / f"{target.name}.tmp"
    for path in (temporary, target):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model.save(temporary)
        tokenizer.save(temporary)
        torch.save(state, temporary / TRAINER)
    except (SafetensorError, RuntimeError) as e:  # how these libraries report a full disk
        raise UserError(f"{temporary} cannot be written ({' '.join(str(e).split())})") from e
    files = {}
    for path in sorted(temporary.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "crc32": checksum(path)}
    sync(temporary)
    os.replace(temporary, target)
    sync(folder)
    write(target / COMPLETE, json.dumps({"format": FORMAT, "step": state["step"], "files": files}, indent=1) + "\n")
    _remove_others(folder, find(folder)[-keep:])
    return target


def _remove_others(folder: Path, kept: list[Path]) -> None:
    for path in folder.iterdir():
        if path.name.startswith("step-") and path not in kept:
            (path / COMPLETE).unlink(missing_ok=True)  # first: half a checkpoint must not count
            shutil.rmtree(path)


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its ``complete.json``.

    Raises:
        UserError: A file is missing, truncated, changed, or not in the folder.
    """
    complete = read_json(folder / COMPLETE)
    files = complete.get("files")
    if complete.get("format") != FORMAT or not isinstance(files, dict):
        raise UserError(f"{folder / COMPLETE} must be of the format {FORMAT!r} and list files, got {short(complete)}")
    for name in NEEDED:
        if name not in files:
            raise UserError(f"{folder / COMPLETE} must list {name}, got {short(list(files))}")
    for name, expected in files.items():
        path = inside(folder, name)
        if not path.is_file():
            raise UserError(f"{path} is missing; remove {folder} to go on from the checkpoint before it")
        found = {"bytes": path.stat().st_size, "crc32": checksum(path)}
        if found != expected:
            raise UserError(
                f"{path} is truncated or was changed: {_in_words(found)}, but {COMPLETE} says "
                f"{_in_words(expected)}; remove {folder} to go on from the checkpoint before it"
            )


def _in_words(entry: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in entry.items()) if isinstance(entry, dict) else short(entry)


def read_trainer(folder: Path) -> dict[str, Any]:
    """What ``trainer.pt`` holds. It can hold tensors and plain values only: no code runs when it is read.

    Raises:
        UserError: It is missing or holds anything else.
    """
    path = inside(folder, TRAINER)
    if not path.is_file():
        raise UserError(f"there is no {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # broken files raise errors of every kind in torch's reader
        reason = " ".join(str(e).split())[:120]
        raise UserError(f"{path} is refused: it must hold tensors and plain values only ({reason})") from e
    if not isinstance(state, dict):
        raise UserError(f"{path} must hold a dictionary, got {short(type(state).__name__)}")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """``optimizer.load_state_dict``, after a look at the shapes, which it does not check.

    Raises:
        UserError: The state is not that of this optimizer.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        for i, p in enumerate(parameters):
            for name in ("exp_avg", "exp_avg_sq"):
                t = state["state"][i][name]
                if t.shape != p.shape or t.dtype != p.dtype:
                    raise ValueError(f"{name} {i} must be {p.dtype} {list(p.shape)}, got {t.dtype} {list(t.shape)}")
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError(f"{path / TRAINER} does not fit the model ({type(e).__name__}: {e})") from e


def model_folder(path: Path) -> Path:
    """The folder of a saved model that ``path`` is, or the newest checkpoint of the run in it.

    Raises:
        UserError: There is none.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if (path / "config.json").is_file():
        return path
    found = find(path / "checkpoints")
    if not found:
        raise UserError(f"{path} holds neither a saved model (config.json) nor a checkpoint of lt2 train")
    return found[-1]


def load_model(folder: Path, device: str = "cpu") -> LT2:
    """The model in a folder.

    Raises:
        UserError: It is missing, its files are not those of a model, or there is no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device must be a device of this machine, got {device!r}") from e
    read_json(folder / "config.json")
    try:
        return LT2.load(folder, device)
    except (ValueError, RecursionError, FileNotFoundError) as e:
        raise UserError(f"{folder}: {e}") from e
