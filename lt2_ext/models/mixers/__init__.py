"""The token mixers, one file each. May import: torch and ``lt2_ext.ops``.

A mixer is a module with

``forward(x, tokens, state) -> y``
    x, y ``[B, T, hidden_size]``; tokens: a :class:`~lt2_ext.models.loop_state.Tokens`; state: what ``new_state`` gave,
    read and advanced in place by T tokens, or None for whole sequences.
``new_state(batch_size, max_length) -> dict[str, Tensor]``
    Zeroed tensors ``[batch_size, ...]`` in the dtype and on the device of the weights.
``reset_parameters()``
    Initial values of whatever is not a plain projection.
"""

from torch import nn

from .full import FullAttention
from .gdn import GatedDeltaNet

MIXERS: dict[str, type[nn.Module]] = {"full": FullAttention, "gdn": GatedDeltaNet}

__all__ = ["MIXERS", "FullAttention", "GatedDeltaNet"]
