"""The grammar of ``state_reuse``: what later loops of a layer read from an earlier one."""

from __future__ import annotations

from dataclasses import dataclass

# Kind of state -> the mixers that have it, and its modes.
KINDS = {
    "kv": (("full", "window", "dsa"), ("first",)),
    "index": (("dsa",), ("share",)),
    "gdn": (("gdn",), ("read",)),
}


@dataclass(frozen=True)
class Reuse:
    """The mode of each kind of state; None: every loop has its own."""

    kv: str | None = None
    index: str | None = None
    gdn: str | None = None


def parse(text: str) -> Reuse:
    """``"none"``, or ``kind:mode`` one after the other with commas, such as ``"kv:first,index:share"``.

    Raises:
        ValueError: A name that is not known, or a kind that is named twice.
    """
    modes: dict[str, str] = {}
    for part in text.split(",") if text != "none" else ():
        kind, _, mode = part.partition(":")
        if kind not in KINDS or mode not in KINDS[kind][1]:
            known = ", ".join(["none", *(f"{kind}:{mode}" for kind, (_, names) in KINDS.items() for mode in names)])
            raise ValueError(f"state_reuse: unknown mode {part!r} in {text!r}; known: {known}")
        if kind in modes:
            raise ValueError(f"state_reuse: {text!r} names {kind!r} twice")
        modes[kind] = mode
    return Reuse(**modes)
