"""A byte-level language model of the Python standard library's own sources, held against gzip."""

from __future__ import annotations

import gzip
import math
import sysconfig
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2_ext.models import LT2, LT2Config

# Not the library's own code, or long tables that would flatter a model that has seen their neighbours.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
WINDOW = 2048  # bytes of held-out text that gzip and the model are given at a time
LENGTH, BATCH = 256, 8
LEARNING_RATE = 3e-3


@dataclass
class Corpus:
    """Bytes of the training files, one after the other, and windows ``[N, WINDOW]`` of the held-out files."""

    train: Tensor
    held_out: Tensor
    files: tuple[int, int]


@dataclass
class Step:
    """Where training stood after a step: seconds and tokens since the start, loss of the language model in bits per
    byte, loss of its indexers or 0, norm of the gradient before it is clipped."""

    seconds: float
    tokens: int
    loss: float
    index_loss: float = 0.0
    grad_norm: float = 0.0


def is_held_out(name: str) -> bool:
    """A tenth of all file names, the same on every machine."""
    return zlib.crc32(name.encode()) % 10 == 0


def load(root: Path | None = None, windows: int = 48) -> Corpus:
    """The ``*.py`` files under ``root`` (the standard library), split by :func:`is_held_out` of their path in it."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    paths = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*.py"))}
    texts = {name: p.read_bytes() for name, p in paths.items() if not SKIPPED & set(name.split("/"))}
    train = [text for name, text in texts.items() if not is_held_out(name)]
    held_out = [text for name, text in texts.items() if is_held_out(name)]
    pieces = [text[i : i + WINDOW] for text in held_out for i in range(0, len(text) - WINDOW + 1, WINDOW)]
    if not pieces or sum(map(len, train)) <= LENGTH:
        raise SystemExit(f"lt2 demo: too few Python sources under {root} to train on (is the standard library zipped?)")
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:windows].tolist()
    windows_of_bytes = torch.stack([as_bytes(pieces[i]) for i in chosen])
    return Corpus(as_bytes(b"".join(train)), windows_of_bytes, (len(train), len(held_out)))


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def new_model(**changes: Any) -> LT2:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "layer_pattern": "interleaved:2:1:gdn:full",
        "loop_count": 2,
    }
    return LT2(LT2Config(**shape | changes))


def train(
    model: LT2,
    data: Tensor,
    seconds: float,
    tick: Callable[[Step], object],
    steps: int | None = None,
    batch: int = BATCH,
) -> list[Step]:
    """:func:`fit` on ``batch`` random pieces of ``data`` at a time."""
    return fit(model, pieces(data, batch), seconds, tick, steps)


Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]  # a batch: tokens and labels [B, T]


def pieces(data: Tensor, batch: int, length: int | None = None) -> Draw:
    length = LENGTH if length is None else length

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        offsets = torch.randint(len(data) - length, (batch, 1), generator=generator)
        tokens = data[offsets + torch.arange(length)].long()
        return tokens, tokens

    return draw


def fit(
    model: LT2, draw: Draw, seconds: float, tick: Callable[[Step], object], steps: int | None = None, seed: int = 1
) -> list[Step]:
    """AdamW until ``seconds`` have passed, or for so many steps however long they take; ``tick`` is told of every step.
    On CUDA in autocast bf16."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    history: list[Step] = []
    start = time.perf_counter()
    while (progress := len(history) / steps if steps else (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (len(history) + 1) / 20) * (1 + math.cos(math.pi * progress)) / 2
        tokens, labels = (t.to(device) for t in draw(generator))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, _, index_loss = model(tokens, labels=labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        index = 0.0 if index_loss is None else index_loss.item()
        language = loss.item() - model.config.index_loss_weight * index
        seen = (len(history) + 1) * tokens.numel()
        history.append(Step(time.perf_counter() - start, seen, language / math.log(2), index, norm.item()))
        tick(history[-1])
    return history


@torch.no_grad()
def bits_per_byte(model: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """Length of the code that the model's predictions give to windows ``[N, T]``, first bytes written out."""
    bits = 0.0
    for piece in windows.long().split(8):
        nll = F.cross_entropy(model(piece)[:, :-1].flatten(0, 1).float(), piece[:, 1:].flatten(), reduction="sum")
        bits += nll.item() / math.log(2) + 8 * len(piece)
    return bits / windows.numel()


def gzip_bits_per_byte(windows: Tensor) -> float:
    """What ``gzip -9`` makes of each window, header included."""
    return 8 * sum(len(gzip.compress(bytes(w.tolist()), 9, mtime=0)) for w in windows) / windows.numel()
