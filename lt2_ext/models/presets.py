"""Configurations by name: the models of the LT2 paper and of Ouro, and a tiny and a small one of each mixer."""

from __future__ import annotations

import difflib
from typing import Any

from .config import LT2Config
from .mixers import MIXERS

_PAPER = {"vocab_size": 128256, "loop_count": 4}
_INDEX = {"index_n_heads": 16, "index_head_dim": 64, "index_topk": 2048}
_OURO = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "layer_pattern": "full",
    "loop_count": 4,
    "use_loop_residual": False,
    "norm_placement": "sandwich",
    "inter_loop_norm": True,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
}


def _paper(hidden_size: int, layers: int, heads: int, pattern: str, **more: Any) -> dict[str, Any]:
    return {
        **_PAPER,
        **more,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "layer_pattern": pattern,
    }


def _of(mixer: str, hidden_size: int, layers: int, window: int) -> dict[str, Any]:
    """The paper's shape with one mixer; heads as wide as its kernels like."""
    if mixer == "nsa":
        return _paper(hidden_size, layers, 16, mixer, num_key_value_heads=1)
    more = {"window_size": window} if mixer == "window" else _INDEX if mixer == "dsa" else {}
    return _paper(hidden_size, layers, 16 if more else hidden_size // 128, mixer, **more)


_TINY = {"vocab_size": 258, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "loop_count": 2}
_SMALL = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8, "loop_count": 4}
# Depth of the models of one mixer, 0.6B and 1.3B: nearest to the size of the published one of attention, as the paper
# gives no depth but that of gdn. The heads of the index of dsa, their dim and topk are those of its code.
_LAYERS = {"linear": (25, 25), "retnet": (19, 19), "mamba2": (21, 21), "delta": (25, 25), "window": (25, 25)}
_LAYERS |= {"gla": (25, 25), "hgrn2": (25, 25), "kda": (24, 24)}
_LAYERS |= {"nsa": (29, 29), "dsa": (23, 24)}
_SPARSE = {"index_topk": 32, "nsa_block_size": 16, "nsa_block_count": 2, "nsa_window_size": 32, "window_size": 64}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**_TINY, "layer_pattern": "interleaved:2:1:gdn:full"},
    "small": {**_SMALL, "layer_pattern": "interleaved:4:1:gdn:full"},
    "tiny-gdn-dsa": {**_TINY, **_SPARSE, "layer_pattern": "interleaved:2:1:gdn:dsa"},
    "small-gdn-dsa": {**_SMALL, **_SPARSE, "layer_pattern": "interleaved:4:1:gdn:dsa"},
    **{f"tiny-{mixer}": {**_TINY, **_SPARSE, "layer_pattern": mixer} for mixer in MIXERS},
    **{f"small-{mixer}": {**_SMALL, **_SPARSE, "layer_pattern": mixer} for mixer in MIXERS},
    **{f"lt2-0.6b-{mixer}": _of(mixer, 1024, layers, 256) for mixer, (layers, _) in _LAYERS.items()},
    **{f"lt2-1.3b-{mixer}": _of(mixer, 2048, layers, 2048) for mixer, (_, layers) in _LAYERS.items()},
    "lt2-0.6b-full": _paper(1024, 25, 16, "full"),
    "lt2-0.6b-gdn": _paper(1024, 21, 8, "gdn"),
    "lt2-0.6b-coarse-to-fine": _paper(1024, 25, 16, "full->window:512->window:256->window:128"),
    "lt2-0.6b-fine-to-coarse": _paper(1024, 25, 16, "window:128->window:256->window:512->full"),
    "lt2-1.3b-full": _paper(2048, 25, 16, "full"),
    "lt2-1.3b-gdn": _paper(2048, 22, 8, "gdn"),
    "lt2-1.3b-full-gdn": _paper(2048, 21, 16, "interleaved:4:1:gdn:full"),
    "lt2-1.3b-bookend": _paper(2048, 21, 16, "bookend:2:full:gdn"),
    "lt2-1.3b-front": _paper(2048, 21, 16, "front:4:full:gdn"),
    "lt2-1.3b-back": _paper(2048, 21, 16, "back:4:full:gdn"),
    "lt2-1.3b-gdn-dsa": _paper(2048, 21, 16, "interleaved:4:1:gdn:dsa", **_INDEX),
    "ouro-1.4b": {**_OURO, "num_hidden_layers": 24},
    "ouro-2.6b": {**_OURO, "num_hidden_layers": 48},
}


def preset(name: str, **changes: Any) -> LT2Config:
    """The configuration called ``name``, with some fields changed.

    Raises:
        ValueError: No such preset, or changes that are no valid configuration.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"there is no preset {name!r}; {hint}")
    return LT2Config.from_dict({**PRESETS[name], **changes})
