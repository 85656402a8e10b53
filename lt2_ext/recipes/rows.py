"""Documents packed into rows of one length, in an order that depends on the seed and the position only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .files import UserError
from .shards import Split


@dataclass
class Batch:
    """tokens int64 ``[rows, length]``, or ``[1, rows * length]`` with the document boundaries cu_seqlens ``[N + 1]``;
    targets: how many of the tokens the model has to predict."""

    tokens: Tensor
    cu_seqlens: Tensor | None
    targets: int


class Rows:
    """The tokens of a split, one document after the other, cut into rows of ``length``.

    Neighbouring rows share one token: the last of a row is only predicted, as the first of the next it only predicts,
    so every token is a target once. A rest that does not fill a row is left out.

    Args:
        seed: Every epoch has an order of its own, drawn from it; None keeps the order of the data.

    Raises:
        UserError: The split is too short for one row.
    """

    def __init__(self, split: Split, length: int, seed: int | None) -> None:
        self.split, self.length, self.seed = split, length, seed
        self.count = (len(split) - 1) // (length - 1)
        if self.count < 1:
            raise UserError(f"the data has {len(split)} tokens, too few for one row of {length} (data.sequence_length)")
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def row(self, position: int) -> int:
        """Which row stands at ``position`` of the endless sequence of epochs."""
        epoch, i = divmod(position, self.count)
        if self.seed is None:
            return i
        if epoch != self.epoch:
            self.order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.count)
            self.epoch = epoch
        return int(self.order[i])

    def batch(self, position: int, rows: int, isolate: bool = False) -> Batch:
        """Rows ``[position, position + rows)``; ``isolate``: nothing passes between their documents."""
        starts = [self.row(p) * (self.length - 1) for p in range(position, position + rows)]
        tokens = torch.from_numpy(np.stack([self.split.read(start, self.length) for start in starts]))
        if not isolate:
            return Batch(tokens, None, rows * (self.length - 1))
        begins = tokens == self.split.bos
        begins[:, 0] = True
        bounds = begins.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([bounds, torch.tensor([tokens.numel()])])
        return Batch(tokens.view(1, -1), cu_seqlens, tokens.numel() - len(bounds))
