"""Token ids in memory-mapped files.

A data folder holds ``index.json``, a tokenizer, and for each split the files ``SPLIT-00000.bin``, ...: little-endian
uint16 or uint32 ids, nothing else. The index is written last, so a folder without one is unfinished.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import UserError, checksum, inside, read_json, replace, short, write

INDEX = "index.json"
FORMAT = "lt2 tokens 1"
SPLITS = ("train", "held_out")
SHARD_TOKENS = 2**26
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


class ShardWriter:
    """Writes the files of one split; :meth:`finish` gives their entries in the index."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, DTYPES[dtype], shard_tokens
        self.entries: list[dict[str, Any]] = []
        self.file: Any = None

    def add(self, tokens: NDArray[np.int64]) -> None:
        while len(tokens):
            if self.file is None:
                self.path = self.folder / f"{self.split}-{len(self.entries):05}.bin"
                self.file = open(self.path.with_suffix(".tmp"), "wb")  # noqa: SIM115 (until it is full)
                self.tokens, self.crc32 = 0, 0
            piece, tokens = np.split(tokens, [self.shard_tokens - self.tokens])
            data = piece.astype(self.dtype).tobytes()
            self.file.write(data)
            self.tokens += len(piece)
            self.crc32 = zlib.crc32(data, self.crc32)
            if self.tokens == self.shard_tokens:
                self._close()

    def _close(self) -> None:
        self.file.close()
        self.file = None
        replace(self.path.with_suffix(".tmp"), self.path)
        self.entries.append({"file": self.path.name, "tokens": self.tokens, "crc32": self.crc32})

    def finish(self) -> list[dict[str, Any]]:
        if self.file is not None:
            self._close()
        return self.entries


def write_index(folder: Path, vocab_size: int, bos: int, splits: dict[str, list[dict[str, Any]]]) -> None:
    index = {"format": FORMAT, "dtype": dtype_for(vocab_size), "vocab_size": vocab_size, "bos": bos, "splits": splits}
    write(folder / INDEX, json.dumps(index, indent=1) + "\n")


@dataclass
class Split:
    """The ids of one split, in order. ``bos`` begins each document."""

    shards: Sequence[NDArray[Any]]
    bos: int
    vocab_size: int

    def __post_init__(self) -> None:
        self.starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Ids ``[start, start + count)``, which may lie in several files.

        Raises:
            UserError: An id is not below vocab_size, so the file is not what the index says.
        """
        pieces = [np.empty(0, dtype=np.int64)]
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while count:
            offset = start - int(self.starts[shard])
            piece = self.shards[shard][offset : offset + count]
            pieces.append(piece)
            start, count, shard = start + len(piece), count - len(piece), shard + 1
        tokens = np.concatenate(pieces).astype(np.int64)
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(f"the data has the token {tokens.max()}, but its vocabulary ends at {self.vocab_size - 1}")
        return tokens


def open_shards(folder: Path, verify: bool = True, tick: Callable[[int], object] = lambda n: None) -> dict[str, Split]:
    """The splits of a data folder.

    Args:
        verify: Read every file once and compare its checksum; file sizes are always compared.
        tick: Told the number of bytes read for that.

    Raises:
        UserError: No data folder, or one that is unfinished, truncated, corrupted or leads outside itself.
    """
    if not (folder / INDEX).is_file():
        raise UserError(
            f"there is no {folder / INDEX}; make it with: python -m lt2_ext.recipes.prepare TEXT... --out {folder}"
        )
    index = read_json(folder / INDEX)

    def check(name: str, value: object, ok: bool, rule: str) -> None:
        if not ok:
            raise UserError(f"{folder / INDEX}: {name} must {rule}, got {short(value)}")

    def integer(name: str, values: dict[str, Any], low: int, high: int) -> int:
        value = values.get(name)
        check(name, value, type(value) is int and low <= value <= high, f"be an integer in {low}..{high}")
        return int(values[name])

    check("format", index.get("format"), index.get("format") == FORMAT, f"be {FORMAT!r}")
    vocab_size = integer("vocab_size", index, 1, 2**32)
    bos = integer("bos", index, 0, vocab_size - 1)
    expected = dtype_for(vocab_size)
    check("dtype", index.get("dtype"), index.get("dtype") == expected, f"be {expected!r} for this vocab_size")
    splits = index.get("splits")
    check("splits", splits, isinstance(splits, dict) and set(splits) == set(SPLITS), f"name {' and '.join(SPLITS)}")
    dtype, opened = DTYPES[expected], {}
    for split in SPLITS:
        entries = index["splits"][split]
        check(split, entries, isinstance(entries, list) and all(isinstance(e, dict) for e in entries), "list files")
        shards = []
        for entry in entries:
            path = inside(folder, entry.get("file"))
            _check_file(path, integer("tokens", entry, 1, 2**48) * dtype.itemsize)
            if verify:
                _check_sum(path, integer("crc32", entry, 0, 2**32 - 1), tick)
            shards.append(np.memmap(path, dtype=dtype, mode="r"))
        opened[split] = Split(shards, bos, vocab_size)
    return opened


def nbytes(folder: Path) -> int:
    """Size of all token files, for a progress bar."""
    return sum(path.stat().st_size for path in folder.glob("*.bin"))


def _check_file(path: Path, size: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again")
    found = os.stat(path).st_size
    if found != size:
        raise UserError(f"{path} is truncated or was changed: it has {found} bytes, the index says {size}")


def _check_sum(path: Path, expected: int, tick: Callable[[int], object]) -> None:
    crc32 = checksum(path, tick)
    if crc32 != expected:
        raise UserError(f"{path} is corrupted: its checksum is {crc32:08x}, the index says {expected:08x}")
