"""The token mixers, one file each; ``_mixer.py`` says what they share. May import: torch and ``lt2_ext.ops``."""

from ._mixer import Mixer
from .full import FullAttention
from .gdn import GatedDeltaNet

MIXERS: dict[str, type[Mixer]] = {"full": FullAttention, "gdn": GatedDeltaNet}

__all__ = ["MIXERS", "FullAttention", "GatedDeltaNet", "Mixer"]
