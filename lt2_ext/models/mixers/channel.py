"""Linear mixers with a decay of its own for every key channel."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from lt2_ext import ops

from ._linear import LinearMixer

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens


class GLA(LinearMixer):
    """Gated linear attention (arXiv 2312.06635): ``S <- Diag(a) S + k v^T``, ``a = sigmoid(W_2 W_1 x + b)^(1/16)``."""

    rule, step_ = staticmethod(ops.chunk_gla), staticmethod(partial(ops.kda_step_, delta=False))
    expand, gate = (0.5, 1), "silu"
    rank, temperature = 16, 16

    def build(self, config: LT2Config) -> None:
        low, keys = nn.Linear(config.hidden_size, self.rank, bias=False), self.key_heads * self.key_dim
        self.f_proj = nn.Sequential(low, nn.Linear(self.rank, keys, bias=True))

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> dict[str, Any]:
        g = F.logsigmoid(self.f_proj(x).float()) / self.temperature
        return {"q": q, "k": k, "v": v, "g": g.view(k.shape)}


class HGRN2(LinearMixer):
    """``S <- Diag(a) S + (1 - a) v^T`` with ``a = sigmoid(W_f x)`` and ``q = silu(W_q x)``, then an RMSNorm over all
    heads (arXiv 2404.07904). W_f stands where other mixers have the projection of k."""

    rule, step_ = staticmethod(ops.chunk_gla), staticmethod(partial(ops.kda_step_, delta=False))
    whole_norm = True

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> dict[str, Any]:
        return {"q": F.silu(q), "k": (-k).sigmoid(), "v": v, "g": F.logsigmoid(k.float())}


class KimiDeltaAttention(LinearMixer):
    """``S <- Diag(a) S; S <- S + beta k (v - k^T S)^T`` with unit q and k, ``beta = sigmoid(W_b x)`` and ``a =
    exp(-exp(A_log) softplus(W_2 W_1 x + dt_bias))``; the output gate is a sigmoid of low rank (arXiv 2510.26692)."""

    rule, step_ = staticmethod(ops.chunk_kda), staticmethod(ops.kda_step_)
    short_conv, gate, erases, decay = True, "sigmoid", True, (1, 16)

    def build(self, config: LT2Config) -> None:
        d, rank, values = config.hidden_size, self.value_dim, self.value_heads * self.value_dim
        low = [nn.Linear(d, rank, bias=False) for _ in range(2)]
        self.f_proj = nn.Sequential(low[0], nn.Linear(rank, self.decay_channels(), bias=False))
        self.z_proj = nn.Sequential(low[1], nn.Linear(rank, values, bias=True))
        self.b_proj = nn.Linear(d, self.value_heads, bias=False)

    def decay_channels(self) -> int:
        return self.key_heads * self.key_dim

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> dict[str, Any]:
        step = F.softplus(self.f_proj(x).float() + self.dt_bias).view(k.shape)
        gates = {"g": -self.A_log.exp()[:, None] * step, "beta": self.b_proj(x).float().sigmoid()}
        return {"q": q, "k": k, "v": v, **gates, "use_qk_l2norm_in_kernel": True}
