"""The grammar of ``state_reuse``: what later loops of a layer read from an earlier one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Kind of state -> the mixers that have it, and its modes.
KINDS = {
    "kv": (("full", "window", "dsa"), ("first", "last", "mean")),
    "index": (("dsa",), ("share",)),
    "gdn": (("gdn",), ("read", "segment:LENGTH")),
}


@dataclass(frozen=True)
class Reuse:
    """The mode of each kind of state; None: every loop has its own. segment: its tokens, 0 without that mode."""

    kv: str | None = None
    index: str | None = None
    gdn: str | None = None
    segment: int = 0


def parse(text: str) -> Reuse:
    """``"none"``, or ``kind:mode`` one after the other with commas, such as ``"kv:first,index:share"``.

    Raises:
        ValueError: A name that is not known, or a kind that is named twice.
    """
    modes: dict[str, Any] = {}
    for part in text.split(",") if text != "none" else ():
        kind, _, mode = part.partition(":")
        segment = re.fullmatch(r"segment:([1-9][0-9]{0,6})", mode)
        name = "segment:LENGTH" if segment else mode
        if kind not in KINDS or name not in KINDS[kind][1]:
            known = ", ".join(["none", *(f"{kind}:{mode}" for kind, (_, names) in KINDS.items() for mode in names)])
            raise ValueError(f"state_reuse: unknown mode {part!r} in {text!r}; known: {known}")
        if kind in modes:
            raise ValueError(f"state_reuse: {text!r} names {kind!r} twice")
        modes[kind] = "segment" if segment else mode
        if segment:
            modes["segment"] = int(segment[1])
    return Reuse(**modes)
