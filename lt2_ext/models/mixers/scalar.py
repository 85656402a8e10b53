"""Linear mixers whose decay is one number per head, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2_ext import ops

from ._linear import LinearMixer
from .attention import rotate

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens


class LinearAttention(LinearMixer):
    """``S <- S + k v^T`` with ``q, k = 1 + elu(.)``; a RMSNorm in place of the normaliser (arXiv 2006.16236)."""

    rule, step_ = staticmethod(ops.chunk_simple_gla), staticmethod(ops.simple_gla_step_)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> dict[str, Any]:
        return {"q": F.elu(q) + 1, "k": F.elu(k) + 1, "v": v}


class RetNet(LinearMixer):
    """``S <- gamma_h S + k v^T`` with ``gamma_h = 1 - 2^(-5-h)`` and rotary q and k (arXiv 2307.08621)."""

    rule, step_ = staticmethod(ops.chunk_simple_gla), staticmethod(ops.simple_gla_step_)
    expand, gate = (1, 2), "silu"

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> dict[str, Any]:
        def log_decay() -> Tensor:
            head = torch.arange(self.value_heads, device=x.device, dtype=torch.float32)
            return torch.log1p(-torch.exp2(-5 - head)).expand(*x.shape[:2], -1)

        angles = tokens.rope(self.key_dim)
        g = tokens.once(("retnet", self.value_heads), log_decay)
        return {"q": rotate(q, *angles), "k": rotate(k, *angles), "v": v, "g": g}


class Mamba2(LinearMixer):
    """Mamba-2 as state space duality has it: ``S <- exp(-A dt) S + dt B x^T; y = C^T S + D x`` with one B and C for all
    heads and ``dt = softplus(W_dt u + dt_bias)``, then ``W_o rmsnorm(y * silu(W_z u))`` (arXiv 2405.21060)."""

    rule, step_ = staticmethod(ops.chunk_simple_gla), staticmethod(ops.simple_gla_step_)
    short_conv, gate, whole_norm, decay, state_dim = True, "silu", True, (1, 16), 64

    def build(self, config: LT2Config) -> None:
        self.dt_proj = nn.Linear(config.hidden_size, self.value_heads, bias=False)
        self.D = nn.Parameter(torch.empty(self.value_heads))

    def geometry(self, config: LT2Config) -> tuple[int, int, int, int]:
        return 1, config.linear_num_key_heads, self.state_dim, self.per_head(config, 2, 512)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.D)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> dict[str, Any]:
        dt = F.softplus(self.dt_proj(x).float() + self.dt_bias)
        return {"q": q, "k": k, "v": v, "g": -self.A_log.exp() * dt, "beta": dt, "scale": 1.0}

    def finish(self, o: Tensor, v: Tensor, z: Tensor | None) -> Tensor:
        assert z is not None
        return super().finish((o + self.D.float()[:, None] * v.float()) * F.silu(z.float()), v, None)


class DeltaNet(LinearMixer):
    """``S <- S + beta k (v - k^T S)^T`` with unit q and k and ``beta = sigmoid(W_b x)`` (arXiv 2406.06484)."""

    rule, step_ = staticmethod(ops.chunk_delta_rule), staticmethod(ops.delta_rule_step_)
    short_conv, erases = True, True

    def build(self, config: LT2Config) -> None:
        self.b_proj = nn.Linear(config.hidden_size, self.value_heads, bias=False)

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> dict[str, Any]:
        return {"q": q, "k": k, "v": v, "beta": self.b_proj(x).float().sigmoid(), "use_qk_l2norm_in_kernel": True}
