"""Settings of a run: dataclasses, filled from a YAML file and ``key=value`` overrides. Unknown keys are errors."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from lt2_ext.models import LT2Config
from lt2_ext.models.presets import preset

from .files import LARGEST_JSON, UserError, short

C = TypeVar("C")


@dataclass
class Data:
    path: str = ""  # prepared tokens, or text files and folders (separated by commas) to prepare in OUT/data
    tokenizer: str = "bytes"  # for text: bytes, bpe (trained on it), or a tokenizer.json file
    vocab_size: int = 8192  # for text: largest size of a trained bpe
    suffix: str = ""  # for text: in folders, take only files that end so (separated by commas)
    held_out: float = 0.01  # for text: share of the documents that is not trained on
    sequence_length: int = 4096
    isolate_documents: bool = False  # nothing passes between the documents of a row; the paper lets it pass
    verify: bool = True  # compare the checksums of the token files before training


@dataclass
class Optimizer:
    """AdamW with a linear warm-up and a cosine decay, as in the paper."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; not of norms, gates and decay rates
    warmup_steps: int | None = None  # null: 10,000, but at most a tenth of the steps
    final_lr: float = 1e-6  # at the last step, as a share of lr
    clip: float = 1.0  # largest norm of the gradient; 0 for none


@dataclass
class Train:
    steps: int = 255_000
    batch_size: int = 3  # rows at a time
    grad_accumulation: int = 32  # times so many make a step: 393,216 tokens with the other defaults
    seed: int = 777  # of the weights and of the order of the data
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: the GPU if there is one
    dtype: str = "auto"  # of matrix products: bf16, fp32; auto: bf16 on a GPU. Weights are fp32 always
    gradient_checkpointing: bool = False
    dense_warmup_steps: int = 0  # so many first steps dsa layers attend to all keys, and their indexers learn from that
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 1  # steps between lines of the log, each with the instruments of loops and mixers
    eval_every: int = 1000
    eval_rows: int = 64  # of the held-out documents, at most; 0 for no evaluation


@dataclass
class Run:
    """``model``: a preset by name, or fields of LT2Config, which may change those of a ``preset``. ``vocab_size``
    follows from the data unless it is given."""

    out: str = "runs/lt2"
    model: dict[str, Any] = field(default_factory=lambda: {"preset": "lt2-0.6b-gdn"})
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)


# What may differ between a run and its continuation: a step does not depend on it, but for the rounding of sums where
# the rows of a step come in other portions (how many there are may not differ).
FREE = {
    "out", "data.path", "data.tokenizer", "data.vocab_size", "data.suffix", "data.held_out", "data.verify",
    "train.checkpoint_every", "train.keep_checkpoints", "train.log_every", "train.eval_every", "train.eval_rows",
    "train.gradient_checkpointing", "train.batch_size", "train.grad_accumulation",
}  # fmt: skip

_RANGES: dict[str, tuple[float, float]] = {
    "data.vocab_size": (258, 2**20), "data.held_out": (0, 0.5), "data.sequence_length": (2, 2**20),
    "optimizer.lr": (0, 10), "optimizer.beta1": (0, 1 - 1e-9), "optimizer.beta2": (0, 1 - 1e-9),
    "optimizer.eps": (1e-30, 1), "optimizer.weight_decay": (0, 10), "optimizer.warmup_steps": (0, 10**9),
    "optimizer.final_lr": (0, 1), "optimizer.clip": (0, 1e9),
    "train.steps": (1, 10**9), "train.batch_size": (1, 2**16), "train.grad_accumulation": (1, 2**16),
    "train.dense_warmup_steps": (0, 10**9),
    "train.seed": (0, 2**63 - 1), "train.checkpoint_every": (1, 10**9), "train.keep_checkpoints": (1, 10**6),
    "train.log_every": (1, 10**9), "train.eval_every": (1, 10**9), "train.eval_rows": (0, 10**6),
}  # fmt: skip


def read(arguments: Sequence[str]) -> Run:
    """The settings that ``[FILE.yaml] key=value ...`` on a command line name.

    Raises:
        UserError: Unknown keys, values of the wrong kind, or outside their range.
    """
    values: dict[str, Any] = {}
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise UserError(f"one settings file at most, got {' '.join(files)} (overrides look like train.steps=100)")
    if files:
        values = read_yaml(Path(files[0]))
    for override in (a for a in arguments if "=" in a):
        key, _, text = override.partition("=")
        _assign(values, key.split("."), _parse(text, f"{key}="), key)
    if isinstance(values.get("model"), str):
        values["model"] = {"preset": values["model"]}
    run = _build(Run, values, "")
    for key, (low, high) in _RANGES.items():
        section, name = key.split(".")
        value = getattr(getattr(run, section), name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{key} must be in {low:g}..{high:g}, got {value:g}")
    if run.train.dtype not in ("auto", "bf16", "fp32"):
        raise UserError(f"train.dtype must be auto, bf16 or fp32, got {run.train.dtype!r}")
    return run


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than the {LARGEST_JSON} that are read")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text") from e
    values = _parse(content, f"{path}: ")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, got {short(values)}")
    return values


def _parse(text: str, where: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as e:
        raise UserError("settings need the yaml library (pip install pyyaml)") from e
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        line = " ".join(str(e).split())
        raise UserError(f"{where}{text if len(text) < 40 else ''} is not valid YAML ({line})") from e


def _assign(values: dict[str, Any], keys: list[str], value: Any, whole: str) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if isinstance(inner, str) and key == "model":  # model=tiny model.loop_count=3
            inner = values[key] = {"preset": inner}
        if not isinstance(inner, dict):
            raise UserError(f"{whole}: {key} is not a section, but {short(inner)}")
        values = inner
    values[keys[-1]] = value


def keys_of(kind: type, prefix: str = "") -> list[str]:
    """``section.name`` of every setting."""
    hints, keys = typing.get_type_hints(kind), []
    for f in fields(kind):
        keys += keys_of(hints[f.name], f"{prefix}{f.name}.") if is_dataclass(hints[f.name]) else [f"{prefix}{f.name}"]
    return keys


def _build(kind: type[C], values: object, prefix: str) -> C:
    if not isinstance(values, dict):
        raise UserError(f"{prefix[:-1]} must be a section of keys and values, got {short(values)}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise UserError(f"unknown key {short(f'{prefix}{key}')}; {_suggest(str(key), prefix)}")
    return kind(**{name: _convert(value, hints[name], f"{prefix}{name}") for name, value in values.items()})


def _suggest(key: str, prefix: str) -> str:
    known = keys_of(Run)
    by_name = {k.rpartition(".")[2]: k for k in known}
    close = difflib.get_close_matches(f"{prefix}{key}", known, n=1) or [
        by_name[name] for name in difflib.get_close_matches(key, by_name, n=1)
    ]
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _convert(value: object, hint: Any, key: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, f"{key}.")  # type: ignore[arg-type]
    kinds = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = typing.get_origin(kinds[0]) or kinds[0]
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML takes 3e-4 for text
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is kind:
        return value
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a section or a preset"}
    raise UserError(f"{key} must be {names[kind]}, got {short(value)}")


def flat(run: Run) -> dict[str, Any]:
    """``{"section.name": value}`` of all settings."""
    return {
        f"{section}.{name}" if isinstance(values, dict) else section: value
        for section, values in asdict(run).items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def to_yaml(run: Run) -> str:
    import yaml

    return str(yaml.safe_dump(asdict(run), sort_keys=False))


def check_same(old: Run, new: Run, path: Path) -> None:
    """Refuse to continue a run with settings that would have made another one.

    Raises:
        UserError: Naming the first setting that differs.
    """
    before, after = flat(old), flat(new)
    for values in (before, after):
        values["batch_size x grad_accumulation"] = values["train.batch_size"] * values["train.grad_accumulation"]
    for key in {**before, **after}:
        if key not in FREE and before.get(key) != after.get(key):
            raise UserError(
                f"{path} is of a run with {key} = {short(before.get(key))}, now it is {short(after.get(key))}; "
                f"use that value, or another folder (out=...)"
            )


def model_config(values: dict[str, Any], vocab_size: int | None) -> LT2Config:
    """The model that the section ``model`` names; ``vocab_size`` is used where it gives none.

    Raises:
        UserError: No valid model.
    """
    fields_given = {k: v for k, v in values.items() if k != "preset"}
    if vocab_size is not None:
        fields_given.setdefault("vocab_size", vocab_size)
    name = values.get("preset")
    try:
        if name is None:
            return LT2Config.from_dict(fields_given)
        if not isinstance(name, str):
            raise ValueError(f"preset must be a name, got {short(name)}")
        return preset(name, **fields_given)
    except (ValueError, TypeError) as e:
        raise UserError(f"model: {e}") from e
