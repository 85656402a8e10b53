"""Attention to the few keys that a trained indexer selects for each token (DeepSeek sparse attention)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lt2_ext import ops

from ._mixer import Keys, Selection, Shared, State, StepWeights
from .attention import MAX_STEP, Attention, attend, places_in, rotate, store, whole

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens

BLOCK = 128  # queries whose products with all keys exist at one time in the dense warm-up


class SparseAttention(Attention):
    """The projections of attention, and an indexer with projections of its own: each token attends to the
    ``index_topk`` keys with the highest ``sum_j w_j relu(q_j . k)``.

    The indexer is trained by :func:`lt2_ext.ops.indexer_loss` alone, and trains nothing but itself: what it reads is
    detached, and a selection has no gradient.
    """

    float_layers = ("index_weights_proj",)

    def __init__(self, config: LT2Config) -> None:
        super().__init__(config)
        d, self.topk, self.pool = config.hidden_size, config.index_topk, config.index_pool or None
        self.share_selection = config.reuse.index == "share"
        self.reused += ("index_k",) if self.share_selection else ()
        self.index_heads, self.index_dim = config.index_n_heads, config.index_head_dim
        self.index_scale = (self.index_heads * self.index_dim) ** -0.5
        self.index_q_proj = nn.Linear(d, self.index_heads * self.index_dim, bias=False)
        self.index_k_proj = nn.Linear(d, self.index_dim, bias=False)
        self.index_weights_proj = nn.Linear(d, self.index_heads, bias=False)

    def new_state(self, batch_size: int, max_length: int, window: int | None) -> State:
        state = super().new_state(batch_size, max_length, window)
        return {**state, "index_k": state["k"].new_zeros(batch_size, max_length, self.index_dim)}

    def forward(
        self, x: Tensor, tokens: Tokens, window: int | None, state: State | None, shared: Shared | None = None
    ) -> tuple[Tensor, Shared]:
        q, keys = self.project(x, tokens, state, shared)
        selection = shared.selection if self.share_selection and shared is not None else None
        if selection is None:
            selection = self.index(x.detach(), tokens)
            if state is not None:
                store(state["index_k"], selection.k, tokens)
        if tokens.dense:
            o, lse = attend(q, keys, tokens, None), None
        else:
            selection = self.selected(selection, tokens, state)
            indices = selection.indices
            assert indices is not None
            if keys.places is None and q.shape[1] <= MAX_STEP:
                lengths, slots = tokens.lengths, tokens.slots
                o, lse = ops.loop_decode_attention(q, keys.k, keys.v, lengths, slots=slots, indices=indices), None
            else:
                o, lse = attend_to(indices, q, whole(keys, tokens), tokens)
        loss = self.loss(selection, q, keys.k, lse, tokens) if tokens.trained else None
        return self.output(o, x), Shared(keys if self.share_keys else None, selection=selection, loss=loss)

    def step_layers(self, tokens: Tokens, state: State, shared: Shared | None) -> list[nn.Module] | None:
        layers = None if tokens.dense else super().step_layers(tokens, state, shared)
        if layers is None or (self.share_selection and shared is not None):
            return layers
        return [*layers, self.index_q_proj, self.index_k_proj, self.index_weights_proj]

    def block_step(self, h: Tensor, weights: StepWeights, tokens: Tokens, state: State, **_: Any) -> Tensor | None:
        if self.share_selection or self.pool:
            return None
        cache, offsets = state["index_k"][:, : tokens.visible], tokens.index[:, 0].contiguous()
        index, topk = (cache, *tokens.rope(self.index_dim), offsets), min(self.topk, tokens.visible)
        return super().block_step(h, weights, tokens, state, index=index, topk=topk, index_scale=self.index_scale)

    def step(
        self, projected: list[Tensor], tokens: Tokens, window: int | None, state: State, shared: Shared | None
    ) -> tuple[Tensor, Shared]:
        selection = shared.selection if self.share_selection and shared is not None else None
        if selection is None:
            *projected, q_idx, k_idx, weights = projected
            selection = self.step_index(q_idx, k_idx, weights, tokens, state)
        q, keys, gate = self.step_keys(projected, tokens, state, shared)
        selection = self.selected(selection, tokens, state)
        lengths, slots = tokens.lengths, tokens.slots
        o = ops.loop_decode_attention(q, keys.k, keys.v, lengths, slots=slots, indices=selection.indices).flatten(-2)
        o = o if gate is None else o * gate.sigmoid()
        return o, Shared(keys if self.share_keys else None, selection=selection)

    def step_index(self, q: Tensor, k: Tensor, weights: Tensor, tokens: Tokens, state: State) -> Selection:
        """:meth:`index`, with the keys into the state: one head of them, without values."""
        cache = state["index_k"][:, :, None]
        where = *tokens.rope(self.index_dim), places_in(cache, tokens)
        q, k = q.view(*q.shape[:-1], self.index_heads, self.index_dim), k[:, :, None]
        q = ops.rope_cache_(cache, cache[..., :0], q, k, k[..., :0], *where, slots=tokens.slots)
        return Selection(q, state["index_k"], weights, None)

    def selected(self, selection: Selection, tokens: Tokens, state: State | None) -> Selection:
        """With its indices."""
        if selection.indices is not None:
            return selection
        past = selection.k if state is None else tokens.of(state["index_k"][:, : tokens.visible])
        return selection._replace(indices=self.select(selection, past, tokens))

    def project(self, x: Tensor, tokens: Tokens, state: State | None, shared: Shared | None) -> tuple[Tensor, Keys]:
        """With a state its caches, which indices count in: new keys may have padding before them."""
        q, keys = super().project(x, tokens, state, shared)
        if state is None or "k" not in state or tokens.dense:
            return q, keys
        return q, Keys(state["k"], state["v"], None)

    def index(self, x: Tensor, tokens: Tokens) -> Selection:
        angles = tokens.rope(self.index_dim)
        q = rotate(self.index_q_proj(x).unflatten(-1, (self.index_heads, self.index_dim)), *angles)
        k = rotate(self.index_k_proj(x)[:, :, None], *angles)[:, :, 0]
        return Selection(q, k, self.index_weights_proj(x), None)

    def select(self, index: Selection, k: Tensor, tokens: Tokens) -> Tensor:
        """int32 ``[B, T, topk]``, out of the index keys k ``[B, S, DI]``; nothing for padding."""
        indices = ops.lightning_indexer(
            *(tokens.pack(t) for t in (index.q, k, index.weights)),
            topk=min(self.topk, tokens.visible),
            scale=self.index_scale,
            pool=self.pool,
            cu_seqlens=tokens.bounds,
            q_offset=tokens.offset,
        ).view(*index.q.shape[:2], -1)
        return indices if tokens.pads is None else indices.masked_fill(tokens.pads[..., None], -1)

    def loss(self, index: Selection, q: Tensor, k: Tensor, lse: Tensor | None, tokens: Tokens) -> Tensor:
        pack, indices = tokens.pack, index.indices
        lse = denominators(q, k, tokens) if lse is None else lse
        q_idx, k_idx, w, q, k, lse = map(pack, (index.q, index.k, index.weights, q, k, lse))
        chosen, scale = None if indices is None else pack(indices), self.index_scale
        loss = ops.indexer_loss(q_idx, k_idx, w, q, k, lse, chosen, index_scale=scale, cu_seqlens=tokens.bounds)
        if indices is not None or tokens.pads is None:
            return loss
        return loss * (tokens.pads.numel() / (~tokens.pads).sum())  # of padding it is 0, but it was counted


def attend_to(indices: Tensor, q: Tensor, keys: Keys, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """o ``[B, T, heads, head_dim]`` and lse ``[B, T, heads]`` of attention to the selected keys."""
    o, lse = ops.dsa_attention(
        *(tokens.pack(t) for t in (q, keys.k, keys.v, indices)),
        cu_seqlens=tokens.bounds,
        q_offset=tokens.offset,
        return_lse=True,
    )
    return o.view(q.shape), lse.view(q.shape[:3])


@torch.no_grad()
def denominators(q: Tensor, k: Tensor, tokens: Tokens) -> Tensor:
    """lse ``[B, T, heads]`` of attention to all that each token sees; infinite for padding, which sees nothing."""
    parts, places = [], tokens.index[:, None]
    for part in torch.arange(q.shape[1], device=q.device).split(BLOCK):
        seen = (places <= tokens.index[:, part, None]) & (places >= tokens.first[:, part, None])
        logits = torch.einsum("bthgd,bshd->bthgs", q[:, part].unflatten(2, (k.shape[2], -1)), k).float()
        logits = (logits * q.shape[-1] ** -0.5).masked_fill(~seen[:, :, None, None], -torch.inf)
        parts.append(logits.logsumexp(-1).flatten(2))
    lse = torch.cat(parts, 1)
    return lse.masked_fill(lse == -torch.inf, torch.inf)
