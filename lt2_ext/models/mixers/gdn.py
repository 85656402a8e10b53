"""Gated DeltaNet (as in Qwen3-Next and flash-linear-attention): a linear-time mixer with a matrix state per head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2_ext import ops

from ._mixer import Mixer, Shared, State

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens

# The in-place step op takes up to this many tokens, and on CUDA states in aligned pieces of this many elements;
# everything else runs the chunked op from the stored state.
MAX_STEP, PIECE = 8, 4


class GatedDeltaNet(Mixer):
    """``q, k, v = silu(conv(W x))``, then per value head ``S <- e^g S; S <- S + beta k (v - k^T S)^T; o = q^T S`` with
    ``g = -exp(A_log) softplus(W_a x + dt_bias)`` and ``beta = sigmoid(W_b x)``, and last
    ``W_o (rmsnorm(o) * silu(W_z x))``.

    A_log and dt_bias stay fp32 whatever dtype the model is moved to: bf16 has too few digits for decays near 1.
    """

    def __init__(self, config: LT2Config) -> None:
        super().__init__(config)
        d, self.eps = config.hidden_size, config.rms_norm_eps
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.qkv_sizes = (keys, keys, values)
        self.qkv_proj = nn.Linear(d, 2 * keys + values, bias=False)
        self.z_proj = nn.Linear(d, values, bias=False)
        self.a_proj = nn.Linear(d, self.value_heads, bias=False)
        self.b_proj = nn.Linear(d, self.value_heads, bias=False)
        self.o_proj = nn.Linear(values, d, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, config.linear_conv_kernel_dim))
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))
        self.A_log = nn.Parameter(torch.empty(self.value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads, dtype=torch.float32))

    def reset_parameters(self) -> None:
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.ones_(self.norm_weight)
        with torch.no_grad():
            self.A_log.uniform_(0, 16).clamp_(min=1e-4).log_()
            step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            step += torch.log(-torch.expm1(-step))  # softplus(dt_bias) is the step: the inverse is x + log(1 - e^-x)

    def new_state(self, batch_size: int, max_length: int, window: int | None) -> State:
        matrix = (batch_size, self.value_heads, self.key_dim, self.value_dim)
        return {
            "matrix": self.A_log.new_zeros(matrix),
            "conv": self.conv_weight.new_zeros((batch_size, *self.conv_weight.shape)),
        }

    def forward(
        self, x: Tensor, tokens: Tokens, window: int | None, state: State | None, shared: Shared | None = None
    ) -> tuple[Tensor, Shared | None]:
        qkv, a, b = self.qkv_proj(x), self.a_proj(x), self.b_proj(x)
        z = self.z_proj(x).unflatten(-1, (self.value_heads, self.value_dim))
        if state is not None and x.shape[1] <= MAX_STEP and (self.value_dim % PIECE == 0 or not x.is_cuda):
            pools, decay = (state["matrix"], state["conv"]), (self.A_log, self.dt_bias)
            o = ops.gdn_decode_fused_(
                *pools, qkv, z, a, b, self.conv_weight, *decay, self.norm_weight, slots=tokens.slots, eps=self.eps
            )
        else:
            past = {name: tokens.of(t) for name, t in (state or {}).items()}
            keep, cu_seqlens = state is not None, tokens.cu_seqlens
            qkv, conv = ops.causal_conv1d(
                qkv,
                self.conv_weight,
                initial_state=past.get("conv"),
                output_final_state=keep,
                cu_seqlens=cu_seqlens,
            )
            o, matrix = ops.chunk_gated_delta_rule(
                *self._heads(qkv),
                g=a,
                beta=b,
                initial_state=past.get("matrix"),
                output_final_state=keep,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                A_log=self.A_log,
                dt_bias=self.dt_bias,
                use_beta_sigmoid_in_kernel=True,
                cu_seqlens=cu_seqlens,
            )
            if state is not None and conv is not None and matrix is not None:
                tokens.put(state["conv"], conv)
                tokens.put(state["matrix"], matrix)
            o = F.rms_norm(o.float(), (self.value_dim,), self.norm_weight.float(), self.eps) * F.silu(z.float())
        return self.o_proj(o.to(x.dtype).flatten(-2)), None

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, channels] -> q, k [B, T, key_heads, key_dim], v [B, T, value_heads, value_dim]."""
        q, k, v = qkv.split(self.qkv_sizes, dim=-1)
        keys = (self.key_heads, self.key_dim)
        return q.unflatten(-1, keys), k.unflatten(-1, keys), v.unflatten(-1, (self.value_heads, self.value_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedDeltaNet:
        """Every ``.to()``, ``.half()``, ``.cuda()`` passes here: the decay parameters move, but stay fp32."""
        decay = {id(t) for p in (self.A_log, self.dt_bias) for t in (p, p.grad)}

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            keep = id(t) in decay and moved.dtype != torch.float32
            return t.to(moved.device, torch.float32) if keep else moved

        return super()._apply(move, recurse)
