"""The token mixers, one file each; ``_mixer.py`` says what they share. May import: torch and ``lt2_ext.ops``."""

from ._mixer import Mixer, Shared, State
from .attention import Attention
from .dsa import SparseAttention
from .gdn import GatedDeltaNet

# Names of layer_pattern. Two names of one class have the same weights: a layer can be one in one loop, one in another.
MIXERS: dict[str, type[Mixer]] = {"full": Attention, "window": Attention, "gdn": GatedDeltaNet, "dsa": SparseAttention}

__all__ = ["MIXERS", "Attention", "GatedDeltaNet", "Mixer", "Shared", "SparseAttention", "State"]
