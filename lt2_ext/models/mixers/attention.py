"""Softmax attention to all of the past or to a sliding window: multi-head or grouped-query, rotary positions, optional
output gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2_ext import ops

from ._mixer import Keys, Mixer, Shared, State, StepWeights

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
        self.share_keys = config.reuse.kv == "first"
        self.reused = ("k", "v") if self.share_keys else ()
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
        self, x: Tensor, tokens: Tokens, window: int | None, state: State | None, shared: Shared | None = None
    ) -> tuple[Tensor, Shared | None]:
        q, keys = self.project(x, tokens, state, shared)
        kept: State | None = {"k": keys.k, "v": keys.v} if tokens.segment else None
        return self.output(attend(q, keys, tokens, window), x), Shared(keys if self.share_keys else None, state=kept)

    def project(self, x: Tensor, tokens: Tokens, state: State | None, shared: Shared | None) -> tuple[Tensor, Keys]:
        """Queries ``[B, T, heads, head_dim]``, and what they see: the same as in the first loop if loops share it, else
        with the keys of the tokens themselves appended."""
        angles, q = tokens.rope(self.head_dim), self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        if self.share_keys and shared is not None and shared.keys is not None:
            return rotate(q, *angles), shared.keys
        k, v = (proj(x).unflatten(-1, (self.kv_heads, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        if state and not tokens.segment and is_step(tokens, state):
            return step(q, k, v, tokens, state)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if tokens.segment and state:
            k, v = torch.cat((state["k"], k), 1), torch.cat((state["v"], v), 1)
            return q, Keys(k, v, torch.arange(k.shape[1], device=k.device)[None])
        return q, append(k, v, tokens, state) if state else Keys(k, v, tokens.index)

    def step_layers(self, tokens: Tokens, state: State, shared: Shared | None) -> list[nn.Module] | None:
        if self.share_keys and shared is not None and shared.keys is not None:
            if shared.keys.places is not None:
                return None
            layers: list[nn.Module] = [self.q_proj]
        elif is_step(tokens, state):
            layers = [self.q_proj, self.k_proj, self.v_proj]
        else:
            return None
        return layers if self.gate_proj is None else [*layers, self.gate_proj]

    def block_step(self, h: Tensor, weights: StepWeights, tokens: Tokens, state: State, **by: Any) -> Tensor | None:
        if self.share_keys or self.gate_proj is not None:
            return None
        (first, _, norm, rest, eps), k, v = weights, state["k"], state["v"]
        where = *tokens.rope(self.head_dim), places_in(k, tokens), tokens.lengths
        return ops.attention_block_step_(h, k, v, norm, first, where, rest, slots=tokens.slots, eps=eps, **by)

    def step(
        self, projected: list[Tensor], tokens: Tokens, window: int | None, state: State, shared: Shared | None
    ) -> tuple[Tensor, Shared | None]:
        q, keys, gate = self.step_keys(projected, tokens, state, shared)
        o = ops.loop_decode_attention(q, keys.k, keys.v, tokens.lengths, slots=tokens.slots).flatten(-2)
        return o if gate is None else o * gate.sigmoid(), Shared(keys if self.share_keys else None)

    def step_keys(
        self, projected: list[Tensor], tokens: Tokens, state: State, shared: Shared | None
    ) -> tuple[Tensor, Keys, Tensor | None]:
        """Rotated queries, the caches with the new keys, and the input of the gate ``[B, T, heads head_dim]``."""
        gate = None if self.gate_proj is None else projected[-1]
        q, *new = (x.view(*x.shape[:-1], -1, self.head_dim) for x in (projected if gate is None else projected[:-1]))
        if new:
            k, v = new
            return *step(q, k, v, tokens, state), gate
        assert shared is not None
        assert shared.keys is not None
        cache, none = shared.keys.k[:, :, :0], q[:, :, :0]  # of no head: only q is rotated
        q, _ = step(q, none, none, tokens, {"k": cache, "v": cache})
        return q, shared.keys, gate

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Of o ``[B, T, heads, head_dim]``, with x for the gate."""
        o = o.flatten(-2)
        return self.o_proj(o if self.gate_proj is None else o * torch.sigmoid(self.gate_proj(x)))


def store(cache: Tensor, new: Tensor, tokens: Tokens) -> None:
    """Put new [B, T, ..] at the places of its tokens in cache [slots, S, ..]."""
    size = cache.shape[1]
    cache[tokens.rows, tokens.index[:, -size:] % size] = new[:, -size:]


def is_step(tokens: Tokens, state: State) -> bool:
    """Whether the tokens are a few that can see what the caches hold once their keys are there."""
    count, ring = tokens.index.shape[1], state["k"].shape[1] < tokens.max_length
    return count <= MAX_STEP and not tokens.from_start and not (ring and count > 1)


def places_in(cache: Tensor, tokens: Tokens) -> Tensor:
    """Where the tokens go in a cache ``[slots, S, ..]``, ``[B, T]``."""
    size = cache.shape[1]
    return tokens.once(("places", size), lambda: tokens.index % size)


def step(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, Keys]:
    """Rotate q and k and add k and v to the state; the queries, and the caches for them to see."""
    where = *tokens.rope(q.shape[-1]), places_in(state["k"], tokens)
    q, k, v = (x.to(state["k"].dtype) for x in (q, k, v))
    q = ops.rope_cache_(state["k"], state["v"], q, k, v, *where, slots=tokens.slots)
    return q, Keys(state["k"], state["v"], None)


def append(k: Tensor, v: Tensor, tokens: Tokens, state: State) -> Keys:
    """Add the keys and values of new tokens to the state; what these tokens see there."""
    count, size = k.shape[1], state["k"].shape[1]
    ring, seen = size < tokens.max_length, Keys(k, v, tokens.index)
    if ring and count > 1 and not tokens.from_start:  # the new keys overwrite old ones that the first tokens still see
        last = tokens.index[:, :1] - 1
        held = last - (last - torch.arange(size, device=k.device)) % size  # newest place of each row; < 0: empty
        past_k, past_v = tokens.of(state["k"]), tokens.of(state["v"])
        seen = Keys(torch.cat((past_k, k), 1), torch.cat((past_v, v), 1), torch.cat((held, tokens.index), 1))
    for name, new in (("k", k), ("v", v)):
        store(state[name], new, tokens)
    if tokens.from_start or (ring and count > 1):
        return seen
    return whole(Keys(state["k"], state["v"], None), tokens)


def whole(keys: Keys, tokens: Tokens) -> Keys:
    """These keys by row and place, also where they are caches."""
    if keys.places is not None:
        return keys
    places = torch.arange(tokens.visible, device=keys.k.device)[None]
    return Keys(tokens.of(keys.k[:, : tokens.visible]), tokens.of(keys.v[:, : tokens.visible]), places)


def attend(q: Tensor, keys: Keys, tokens: Tokens, window: int | None) -> Tensor:
    """q ``[B, T, heads, D]`` to the keys that each token sees.

    The last T keys are those of the tokens themselves, unless they are the whole past. A window much shorter than the
    sequence takes time linear in T: blocks of queries, each with the keys of its own block and of the one before.
    """
    k, v, places = keys
    if places is None:
        return ops.loop_decode_attention(q, k, v, tokens.lengths, slots=tokens.slots)
    if tokens.from_start and (tokens.bounds is not None or (tokens.plain and window)) and has_kernel(q):
        return attend_within(window, q, k, v, tokens)
    block = T = q.shape[1]
    if window is not None and (wide := max(window, MIN_BLOCK)) * 2 < T and k.shape[1] <= T + wide:
        block = wide
        q, k, v = _blocks(q, block, 0, T), _bands(k, block, T), _bands(v, block, T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = tokens.once(("mask", window), lambda: _mask(tokens, window, places, block))
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    o = o.transpose(1, 2)
    return o if block == T else o.unflatten(0, (-1, -(-T // block))).flatten(1, 2)[:, :T]


def attend_within(window: int | None, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
    """To the newest keys of whole sequences, or of what the state holds."""
    o, _ = ops.window_attention(
        *(tokens.pack(t) for t in (q, k, v)),
        window=window,
        cu_seqlens=tokens.bounds,
        q_offset=tokens.offset,
        return_lse=True,
    )
    return o.view(q.shape)


def has_kernel(q: Tensor) -> bool:
    """Whether :func:`lt2_ext.ops.window_attention` is faster than SDPA for such queries."""
    if not q.is_cuda or q.dtype == torch.float32 or q.shape[-1] not in (64, 128):
        return False
    return torch.cuda.get_device_properties(q.device).major == 9


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
    """Rotary embedding of x [B, T, H, D], halves paired (i, i + D/2); cos and sin fp32 [B or 1, T, D/2]."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
