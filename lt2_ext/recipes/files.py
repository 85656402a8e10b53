"""Files written whole or not at all, names that stay in their folder, mistakes of the user in one sentence."""

from __future__ import annotations

import json
import os
import reprlib
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 2**22  # bytes per read when checking
LARGEST_JSON = 64 * 2**20  # bytes; ours are far smaller, and json.loads needs many times the size of its text


class UserError(Exception):
    """Something that the user can put right; its message is one sentence and is shown without a traceback."""


def run_command(name: str, main: Callable[[], int]) -> int:
    """Exit status of ``main()``; a :class:`UserError` or a failing file system is one line on stderr and status 2."""
    try:
        return main()
    except UserError as e:
        message = str(e)
    except OSError as e:
        message = f"{e.strerror or e}: {e.filename}" if e.filename else str(e.strerror or e)
    print(f"{name}: {message}", file=sys.stderr)
    return 2


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says so by its class, or one of torch or of an operator by its words."""
    said = any(words in str(error) for words in ("out of memory", "can't allocate memory"))
    return said or type(error).__name__ == "OutOfMemoryError"


def short(value: object) -> str:
    """``repr`` of a value that a file gave, cut: aliases in YAML can make it endless."""
    return reprlib.repr(value)


def sync(path: Path) -> None:
    """Have the file or folder on the disk, not only in the cache of the kernel."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename a finished file to its name, durably; a reader sees the old one or the new one."""
    sync(source)
    os.replace(source, target)
    sync(target.parent)


def write(path: Path, text: str) -> None:
    """Write a small file in one step."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: No such file, too large, or not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}")
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than the {LARGEST_JSON} that are read")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e})") from e
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, got {short(values)}")
    return values


def checksum(path: Path, tick: Callable[[int], object] = lambda n: None) -> int:
    """CRC-32 of a file; ``tick`` is told the number of bytes read."""
    crc32 = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            crc32 = zlib.crc32(block, crc32)
            tick(len(block))
    return crc32


def inside(folder: Path, name: object) -> Path:
    """The file called ``name`` in ``folder``, for a name that came out of a file.

    Raises:
        UserError: The name is not that of a regular file of this very folder.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise UserError(f"{folder} names the file {short(name)}, which is not a plain file name")
    path = folder / name
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} must be a regular file, not a link or a folder")
    return path
