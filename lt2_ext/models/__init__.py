"""Looped language models. May import: torch, safetensors and ``lt2_ext.ops``.

``lt2.py`` is the model, ``mixers/`` its token mixers, ``loop_state.py`` its memory, ``config.py`` its shape,
``engine.py`` decodes many sequences at a time.
"""

from .config import LT2Config
from .engine import Engine, Generation
from .loop_state import LoopState
from .lt2 import LT2, LT2Output

__all__ = ["LT2", "Engine", "Generation", "LT2Config", "LT2Output", "LoopState"]
