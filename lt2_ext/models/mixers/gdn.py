"""Gated DeltaNet (as in Qwen3-Next and flash-linear-attention): a linear-time mixer with a matrix state per head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2_ext import ops

from ._mixer import Mixer, Shared, State, Writes

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

    With ``state_reuse="gdn:read"`` o also gets ``gate q^T S'`` with the S' that the loop before had at the same token;
    the gate, one number per head, starts at zero.

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
        reads = config.reuse.gdn == "read" and config.loop_count > 1
        self.read_gate = nn.Parameter(torch.empty(self.value_heads)) if reads else None

    def reset_parameters(self) -> None:
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.ones_(self.norm_weight)
        if self.read_gate is not None:
            nn.init.zeros_(self.read_gate)
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
        small = x.shape[1] <= MAX_STEP and (self.value_dim % PIECE == 0 or not x.is_cuda)
        if state is not None and small and self.read_gate is None:
            pools, decay = (state["matrix"], state["conv"]), (self.A_log, self.dt_bias)
            o = ops.gdn_decode_fused_(
                *pools, qkv, z, a, b, self.conv_weight, *decay, self.norm_weight, slots=tokens.slots, eps=self.eps
            )
            return self.o_proj(o.to(x.dtype).flatten(-2)), None
        past = {name: tokens.of(t) for name, t in (state or {}).items()}
        qkv, conv = ops.causal_conv1d(
            qkv,
            self.conv_weight,
            initial_state=past.get("conv"),
            output_final_state=state is not None,
            cu_seqlens=tokens.cu_seqlens,
        )
        q, k, v = self._heads(qkv)
        writes = Writes(k, v, a, b, past.get("matrix"))
        o, matrix = self._rule(q, writes, tokens, state is not None)
        if self.read_gate is not None:
            if shared is not None and shared.writes is not None:
                read, _ = self._rule(q, shared.writes, tokens, False)
                o = o + (self.read_gate[:, None] * read).to(o.dtype)
            if writes.start is not None:  # the next loop reads from what the line below overwrites
                writes = writes._replace(start=writes.start.clone())
        if state is not None and conv is not None and matrix is not None:
            tokens.put(state["conv"], conv)
            tokens.put(state["matrix"], matrix)
        o = F.rms_norm(o.float(), (self.value_dim,), self.norm_weight.float(), self.eps) * F.silu(z.float())
        return self.o_proj(o.to(x.dtype).flatten(-2)), None if self.read_gate is None else Shared(writes=writes)

    def _rule(self, q: Tensor, writes: Writes, tokens: Tokens, keep: bool) -> tuple[Tensor, Tensor | None]:
        """What q reads from the state that these writes make, and if wanted its end."""
        k, v, a, b, start = writes
        return ops.chunk_gated_delta_rule(
            q,
            k,
            v,
            g=a,
            beta=b,
            initial_state=start,
            output_final_state=keep,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            cu_seqlens=tokens.cu_seqlens,
        )

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
