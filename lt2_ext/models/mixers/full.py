"""Softmax attention: multi-head or grouped-query, rotary positions, optional output gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2_ext import ops

from ._mixer import Mixer

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens

# The decode op reads the cache once for a few queries; longer pieces are a job for SDPA.
MAX_STEP = 8


class FullAttention(Mixer):
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

    def new_state(self, batch_size: int, max_length: int) -> dict[str, Tensor]:
        shape = (batch_size, max_length, self.kv_heads, self.head_dim)
        return {"k": self.k_proj.weight.new_zeros(shape), "v": self.v_proj.weight.new_zeros(shape)}

    def forward(self, x: Tensor, tokens: Tokens, state: dict[str, Tensor] | None) -> Tensor:
        cos, sin = tokens.rope
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)), cos, sin)
        k = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if state is not None:
            state["k"][tokens.rows, tokens.positions] = k
            state["v"][tokens.rows, tokens.positions] = v
        if state is None or tokens.from_start:
            o = self._attend(q, k, v, tokens.mask)
        elif x.shape[1] <= MAX_STEP:
            o = ops.loop_decode_attention(q, state["k"], state["v"], tokens.lengths)
        else:
            o = self._attend(q, state["k"][:, : tokens.visible], state["v"][:, : tokens.visible], tokens.mask)
        o = o.flatten(-2)
        if self.gate_proj is not None:
            o = o * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(o)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B, T, heads, D], k and v [B, S, kv_heads, D], mask [B or 1, 1, T, S] or None for causal."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = self.heads != self.kv_heads
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return o.transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, D], halves paired (i, i + D/2); cos and sin fp32 [B or 1, T, 1, D/2]."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
