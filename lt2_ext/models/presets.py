"""Configurations by name: the models of the LT2 paper and of Ouro, and two small ones for a CPU."""

from __future__ import annotations

import difflib
from typing import Any

from .config import LT2Config

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


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 258,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "layer_pattern": "interleaved:2:1:gdn:full",
        "loop_count": 2,
    },
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "layer_pattern": "interleaved:4:1:gdn:full",
        "loop_count": 4,
    },
    "lt2-0.6b-full": _paper(1024, 25, 16, "full"),
    "lt2-0.6b-gdn": _paper(1024, 21, 8, "gdn"),
    "lt2-1.3b-full": _paper(2048, 25, 16, "full"),
    "lt2-1.3b-gdn": _paper(2048, 22, 8, "gdn"),
    "lt2-1.3b-full-gdn": _paper(2048, 21, 16, "interleaved:4:1:gdn:full"),
    # The paper does not say how deep its models with dsa are; heads, dim and topk of the index are those of its code.
    "lt2-1.3b-dsa": _paper(2048, 25, 16, "dsa", **_INDEX),
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
