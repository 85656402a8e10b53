"""Native sparse attention (arXiv 2502.11089): three ways to look at the same keys, mixed by gates of each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ._mixer import Keys, Shared, State
from .attention import Attention, attend_within, store
from .dsa import attend_to

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens


class Blocks(NamedTuple):
    """Means over the complete blocks of a sequence: k, v ``[B, M, kv_heads, D]``; number: of the block in its document,
    and seen: by which token, ``[B or 1, M]`` and ``[B or 1, T, M]``."""

    k: Tensor
    v: Tensor
    number: Tensor
    seen: Tensor


class NativeSparseAttention(Attention):
    """Attention to the mean keys and values of complete blocks of ``nsa_block_size`` tokens; to the tokens of
    ``nsa_block_count`` blocks: the token's own, the one before, the first, and those that its heads of one key head
    attend to most by their means; and to the last ``nsa_window_size`` tokens. Each head adds the three, each times a
    sigmoid of ``W x``. All read the same keys and values."""

    def __init__(self, config: LT2Config) -> None:
        super().__init__(config)
        self.block, self.count = config.nsa_block_size, config.nsa_block_count
        self.window = config.nsa_window_size
        self.share_keys, self.reused = False, ()
        self.branch_proj = nn.Linear(config.hidden_size, 3 * self.heads, bias=False)

    def new_state(self, batch_size: int, max_length: int, window: int | None) -> State:
        state = super().new_state(batch_size, max_length, window)
        blocks = -(-max_length // self.block)
        means = {f"{name}_mean": t.new_zeros(batch_size, blocks, *t.shape[2:]) for name, t in state.items()}
        return {**state, **means}

    def step_layers(self, tokens: Tokens, state: State, shared: Shared | None) -> None:
        return None

    def forward(
        self, x: Tensor, tokens: Tokens, window: int | None, state: State | None, shared: Shared | None = None
    ) -> tuple[Tensor, Shared | None]:
        q, (k, v, _) = self.project(x, tokens, None, None)
        if state is None:
            blocks = self.blocks(k, v, tokens)
        else:
            store(state["k"], k, tokens)
            store(state["v"], v, tokens)
            blocks = self.stored_blocks(state, tokens)
            k, v = (tokens.of(state[name][:, : tokens.visible]) for name in ("k", "v"))
        means, selected = [], []
        for head, queries in enumerate(q.chunk(self.kv_heads, 2)):
            mean, chosen = self.compressed(queries, head, blocks, tokens)
            own = Keys(k[:, :, head : head + 1], v[:, :, head : head + 1], None)
            rows = queries.shape[0]
            means.append(mean)
            selected.append(attend_to(chosen.expand(rows, -1, -1), queries, own, tokens)[0])
        near = attend_within(self.window, q, k, v, tokens)
        weights = self.branch_proj(x).float().sigmoid().unflatten(-1, (self.heads, 1, 3))
        branches = torch.stack([t.float() for t in (torch.cat(means, 2), torch.cat(selected, 2), near)], -1)
        o = (branches * weights).sum(-1)
        return self.output(o.to(x.dtype), x), None

    def compressed(self, q: Tensor, head: int, blocks: Blocks, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Of the heads q ``[B, T, heads, D]`` of a key head: what they read of the means, and int32 ``[B, T, tokens]``,
        those of the blocks that they read most of."""
        k, v, seen = blocks.k[:, :, head], blocks.v[:, :, head], blocks.seen
        scores = torch.einsum("bthd,bmd->bthm", q, k).float() * self.head_dim**-0.5
        p = scores.masked_fill(~seen[:, :, None], -1e30).softmax(-1).masked_fill(~seen[:, :, None], 0)
        number, own = blocks.number[:, None], (tokens.positions // self.block)[..., None]
        rank = p.detach().sum(2) + (2 * (number == own - 1) + 4 * (number == 0)) * q.shape[2]
        rank = rank.masked_fill(~seen | (number == own), -1)
        best, at = rank.topk(min(self.count - 1, rank.shape[-1]), -1)
        chosen = number.expand(rank.shape).gather(-1, at).masked_fill(best < 0, -1)
        chosen = torch.cat((chosen, own.expand(*rank.shape[:2], 1)), -1)[..., None]
        places = chosen * self.block + torch.arange(self.block, device=q.device)
        return torch.einsum("bthm,bmd->bthd", p.to(v.dtype), v), places.where(chosen >= 0, -1).flatten(2).int()

    def blocks(self, k: Tensor, v: Tensor, tokens: Tokens) -> Blocks:
        """Of whole sequences, which may begin anywhere in a row."""
        position = tokens.positions
        last = (position % self.block == self.block - 1) & (position >= 0)
        at = last.int().argsort(dim=1, descending=True, stable=True)[:, : k.shape[1] // self.block]
        ends, first = position.gather(1, at), tokens.first.expand_as(position).gather(1, at)
        seen = (ends[:, None] <= position[..., None]) & (first[:, None] == tokens.first[..., None])
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        places = (at[..., None] - torch.arange(self.block, device=k.device)).clamp(min=0)
        seen = seen & last.gather(1, at)[:, None]
        return Blocks(means(k, row, places), means(v, row, places), ends // self.block, seen)

    def stored_blocks(self, state: State, tokens: Tokens) -> Blocks:
        """Of what is in the state, after computing anew those that new tokens are in."""
        T, last = tokens.index.shape[1], state["k_mean"].shape[1] - 1
        some = torch.arange(-(-(T - 1) // self.block) + 1, device=tokens.index.device)
        touched = (tokens.index[:, :1].clamp(min=0) // self.block + some).clamp(max=last)
        places = touched[..., None] * self.block + torch.arange(self.block, device=some.device)
        places, row = places.clamp(max=tokens.max_length - 1), tokens.rows
        for name in ("k", "v"):
            state[f"{name}_mean"][row, touched] = means(state[name], row, places)
        number = torch.arange(tokens.visible // self.block, device=some.device)[None]
        seen = (number[:, None] + 1) * self.block - 1 <= tokens.positions[..., None]
        k, v = (tokens.of(state[f"{name}_mean"][:, : number.shape[1]]) for name in ("k", "v"))
        return Blocks(k, v, number, seen)


def means(t: Tensor, row: Tensor, places: Tensor) -> Tensor:
    """Of t ``[rows, S, ..]`` over the last axis of places ``[B or 1, M, block]``; row ``[B, 1]``."""
    return t[row[..., None], places].float().mean(2).to(t.dtype)
