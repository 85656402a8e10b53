"""Gated DeltaNet (as in Qwen3-Next and flash-linear-attention)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lt2_ext import ops

from ._linear import LinearMixer
from ._mixer import Shared, State, StepWeights, Writes

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens

PIECE = 4  # on CUDA the fused step takes states in aligned pieces of this many elements


class GatedDeltaNet(LinearMixer):
    """``q, k, v = silu(conv(W x))``, then per value head ``S <- e^g S; S <- S + beta k (v - k^T S)^T; o = q^T S`` with
    ``g = -exp(A_log) softplus(W_a x + dt_bias)`` and ``beta = sigmoid(W_b x)``, and last
    ``W_o (rmsnorm(o) * silu(W_z x))``.

    With ``state_reuse="gdn:read"`` o also gets ``gate q^T S'`` with the S' that the loop before had at the same token;
    the gate, one number per head, starts at zero.
    """

    rule = staticmethod(ops.chunk_gated_delta_rule)
    short_conv, gate, erases, decay = True, "silu", True, (0, 16)

    def build(self, config: LT2Config) -> None:
        self.a_proj = nn.Linear(config.hidden_size, self.value_heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, self.value_heads, bias=False)
        reads = config.reuse.gdn == "read" and config.loop_count > 1
        self.read_gate = nn.Parameter(torch.empty(self.value_heads)) if reads else None

    def geometry(self, config: LT2Config) -> tuple[int, int, int, int]:
        heads = config.linear_num_key_heads, config.linear_num_value_heads
        return *heads, config.linear_key_head_dim, config.linear_value_head_dim

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.read_gate is not None:
            nn.init.zeros_(self.read_gate)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> dict[str, Any]:
        switches = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
        gates = {"g": self.a_proj(x), "beta": self.b_proj(x), "A_log": self.A_log, "dt_bias": self.dt_bias}
        return {"q": q, "k": k, "v": v, **gates, **dict.fromkeys(switches, True)}

    def recur(
        self, inputs: dict[str, Any], start: Tensor | None, tokens: Tokens, keep: bool, shared: Shared | None
    ) -> tuple[Tensor, Tensor | None, Shared | None]:
        o, matrix, _ = super().recur(inputs, start, tokens, keep, None)
        if self.read_gate is None:
            return o, matrix, None
        names = ("k", "v", "g", "beta")
        if shared is not None and shared.writes is not None:
            *earlier, before = shared.writes
            read, _, _ = super().recur(inputs | dict(zip(names, earlier, strict=True)), before, tokens, False, None)
            o = o + (self.read_gate[:, None] * read).to(o.dtype)
        start = None if start is None else start.clone()  # the next loop reads from what this one overwrites
        k, v, a, b = (inputs[name] for name in names)
        return o, matrix, Shared(writes=Writes(k, v, a, b, start))

    def step_layers(self, tokens: Tokens, state: State, shared: Shared | None) -> list[nn.Module] | None:
        if self.z_proj is None or self.read_gate is not None or (self.value_dim % PIECE and tokens.index.is_cuda):
            return None
        return [self.qkv_proj, self.z_proj, self.a_proj, self.b_proj]

    def step_floats(self) -> list[nn.Parameter]:
        return [self.conv_weight, self.norm_weight]

    def decode(
        self, x: Tensor, qkv: Tensor, z: Tensor | None, tokens: Tokens, state: State, shared: Shared | None
    ) -> tuple[Tensor, Shared | None]:
        if z is None or self.step_layers(tokens, state, shared) is None:
            return self.scan(x, qkv, z, tokens, state, shared)
        return self.step([qkv, z, self.a_proj(x), self.b_proj(x)], tokens, None, state, None)

    def block_step(self, h: Tensor, weights: StepWeights, tokens: Tokens, state: State) -> Tensor | None:
        first, _, norm, rest, eps = weights
        conv, head_norm = map(tokens.as_float, self.step_floats())
        pools, small = (state["matrix"], state["conv"]), (conv, self.A_log, self.dt_bias, head_norm)
        return ops.gdn_block_step_(h, *pools, norm, first, small, rest, slots=tokens.slots, eps=eps)

    def step(
        self, projected: list[Tensor], tokens: Tokens, window: int | None, state: State, shared: Shared | None
    ) -> tuple[Tensor, Shared | None]:
        conv, norm = map(tokens.as_float, self.step_floats())
        x = [state["matrix"], state["conv"], *projected, conv, self.A_log, self.dt_bias, norm]
        return ops.gdn_decode_fused_(*x, slots=tokens.slots, eps=self.eps), None
