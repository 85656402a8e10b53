"""The token mixers; ``_mixer.py`` says what they share, ``_linear.py`` what those with a matrix state do. May import:
torch and ``lt2_ext.ops``."""

from ._linear import LinearMixer
from ._mixer import Mixer, Shared, State
from .attention import Attention
from .channel import GLA, HGRN2, KimiDeltaAttention
from .dsa import SparseAttention
from .gdn import GatedDeltaNet
from .nsa import NativeSparseAttention
from .scalar import DeltaNet, LinearAttention, Mamba2, RetNet

# Names of layer_pattern. Two names of one class have the same weights: a layer can be one in one loop, one in another.
MIXERS: dict[str, type[Mixer]] = {
    "full": Attention,
    "window": Attention,
    "dsa": SparseAttention,
    "nsa": NativeSparseAttention,
    "gdn": GatedDeltaNet,
    "linear": LinearAttention,
    "retnet": RetNet,
    "mamba2": Mamba2,
    "delta": DeltaNet,
    "gla": GLA,
    "hgrn2": HGRN2,
    "kda": KimiDeltaAttention,
}

__all__ = [
    "MIXERS",
    "Attention",
    "GatedDeltaNet",
    "LinearMixer",
    "Mixer",
    "NativeSparseAttention",
    "Shared",
    "SparseAttention",
    "State",
]
