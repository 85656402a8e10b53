"""Softmax attention to all of the past or to a sliding window: multi-head or grouped-query, rotary positions, optional
output gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2_ext import ops

from ._mixer import Mixer, Selection, State

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens

# The decode op reads the cache once for a few queries; longer pieces are a job for SDPA.
MAX_STEP = 8
# Fewest queries that share one band of keys: narrower windows would make matrix products too small.
MIN_BLOCK = 64
FAR = 2**62  # place of the padding of a band: no token sees it


class Attention(Mixer):
    def __init__(self, config: LT2Config) -> None:
        super().__init__(config)
        d, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, d, bias=False)
        self.gate_proj = nn.Linear(d, self.heads * self.head_dim, bias=False) if config.attn_output_gate else None

    def reset_parameters(self) -> None:
        if self.gate_proj is not None:
            nn.init.zeros_(self.gate_proj.weight)  # the gate starts at 1/2 everywhere

    def new_state(self, batch_size: int, max_length: int, window: int | None) -> State:
        """Keys and values by place; a window shorter than the sequence is a ring: place p in slot p % window."""
        slots = max_length if window is None else min(window, max_length)
        shape = (batch_size, slots, self.kv_heads, self.head_dim)
        return {"k": self.k_proj.weight.new_zeros(shape), "v": self.v_proj.weight.new_zeros(shape)}

    def forward(
        self, x: Tensor, tokens: Tokens, window: int | None, state: State | None, shared: Selection | None = None
    ) -> tuple[Tensor, Selection | None]:
        q, k, v = self.project(x, tokens)
        return self.output(mix(q, k, v, tokens, window, state), x), None

    def project(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, T, heads, head_dim]`` and k, v ``[B, T, kv_heads, head_dim]``."""
        angles = tokens.rope(self.head_dim)
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)), *angles)
        k = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)), *angles)
        return q, k, self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Of o ``[B, T, heads, head_dim]``, with x for the gate."""
        o = o.flatten(-2)
        return self.o_proj(o if self.gate_proj is None else o * torch.sigmoid(self.gate_proj(x)))


def mix(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, window: int | None, state: State | None) -> Tensor:
    """Attention of the tokens to each other and to what is in the state."""
    return attend(q, k, v, tokens, window, tokens.index) if state is None else stream(q, k, v, tokens, window, state)


def store(cache: Tensor, new: Tensor, tokens: Tokens) -> None:
    """Put new [B, T, ..] at the places of its tokens in cache [slots, S, ..]."""
    size = cache.shape[1]
    cache[tokens.rows, tokens.index[:, -size:] % size] = new[:, -size:]


def stream(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, window: int | None, state: State) -> Tensor:
    """Attention of new tokens to the state and to each other; their keys and values are added to the state."""
    count, slots = q.shape[1], state["k"].shape[1]
    ring = slots < tokens.max_length
    if ring and count > 1 and not tokens.from_start:  # the new keys overwrite old ones that the first tokens still see
        last = tokens.index[:, :1] - 1
        held = last - (last - torch.arange(slots, device=q.device)) % slots  # newest place of each slot; < 0: empty
        all_k, all_v = (torch.cat((tokens.of(state[name]), new), dim=1) for name, new in (("k", k), ("v", v)))
        o = attend(q, all_k, all_v, tokens, window, torch.cat((held, tokens.index), dim=1))
    for name, new in (("k", k), ("v", v)):
        store(state[name], new, tokens)
    if tokens.from_start:
        o = attend(q, k, v, tokens, window, tokens.index)
    elif count == 1 or (count <= MAX_STEP and not ring):  # the op sees at most the whole ring
        o = ops.loop_decode_attention(q, state["k"], state["v"], tokens.lengths, slots=tokens.slots)
    elif not ring:  # then the window, if any, is longer than the sequence
        seen = tokens.visible
        places = torch.arange(seen, device=q.device)[None]
        past_k, past_v = (tokens.of(state[name][:, :seen]) for name in ("k", "v"))
        o = attend(q, past_k, past_v, tokens, None, places)
    return o


def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, window: int | None, places: Tensor) -> Tensor:
    """q [B, T, heads, D] to those of k, v [B, S, kv_heads, D] at ``places`` [B or 1, S] that each token sees.

    The last T keys are those of the tokens themselves, unless S is the whole past. A window much shorter than the
    sequence takes time linear in T: blocks of queries, each with the keys of its own block and of the one before.
    """
    block = T = q.shape[1]
    if window is not None and (wide := max(window, MIN_BLOCK)) * 2 < T:
        block = wide
        q, k, v = _blocks(q, block, 0, T), _bands(k, block, T), _bands(v, block, T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = tokens.once(("mask", window), lambda: _mask(tokens, window, places, block))
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    o = o.transpose(1, 2)
    return o if block == T else o.unflatten(0, (-1, -(-T // block))).flatten(1, 2)[:, :T]


def _mask(tokens: Tokens, window: int | None, places: Tensor, block: int) -> Tensor | None:
    """Which keys each token sees, bool [B or 1 (times blocks), 1, queries, keys]; None: plain causal."""
    T, index, first = tokens.index.shape[1], tokens.index, tokens.first
    if tokens.plain and tokens.from_start and (window is None or window >= T):
        return None
    oldest = first if window is None else torch.maximum(first, index - window + 1)
    oldest = torch.minimum(oldest, index)
    if block < T:
        rows = tokens.batch_size
        index, oldest = (_blocks(x.expand(rows, -1), block, 0, T, FAR) for x in (index, oldest))
        places = _bands(places.expand(rows, -1), block, T, FAR)
    return ((places[:, None] <= index[..., None]) & (places[:, None] >= oldest[..., None]))[:, None]


def _blocks(x: Tensor, block: int, front: int, T: int, fill: int = 0) -> Tensor:
    """[B, S, ..] -> [B n, block, ..], after ``front`` fills before and as many behind as T tokens need."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (front, -T % block), value=fill)
    return x.unflatten(1, (-1, block)).flatten(0, 1)


def _bands(x: Tensor, block: int, T: int, fill: int = 0) -> Tensor:
    """Keys [B, past + T, ..] with past <= block -> [B n, 2 block, ..]: each block after the one before it."""
    rows = x.shape[0]
    x = _blocks(x, block, block - (x.shape[1] - T), T, fill).unflatten(0, (rows, -1))
    return torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, D], halves paired (i, i + D/2); cos and sin fp32 [B or 1, T, 1, D/2]."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
