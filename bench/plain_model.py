"""The looped model as one writes it in an afternoon: torch operators, and for every (loop, layer) caches that grow by
concatenation. It computes what ``LT2`` computes from the same weights. May import: torch, lt2_ext.models, peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peers import Unsupported, allow_fla_backward
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lt2_ext.models import LT2
from lt2_ext.models.mixers import Attention, GatedDeltaNet, SparseAttention

Cache = dict[str, Tensor]  # of one (loop, layer)
# q, k [B, T, H, K], v [B, T, HV, V], raw a, b [B, T, HV], A_log, dt_bias, state or None -> o, state
DeltaRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

LONGEST = 512


def torch_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token of the gated delta rule."""
    assert q.shape[1] == 1
    assert state is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    shape, group = (q.shape[0], v.shape[2], -1), v.shape[2] // q.shape[2]
    q, k = (F.normalize(x.to(wide), dim=-1).repeat_interleave(group, dim=2).view(shape) for x in (q, k))
    decay = (-A_log.exp() * F.softplus(a.to(wide) + dt_bias)).exp().view(shape)
    state = state * decay[..., None]
    change = b.to(wide).sigmoid().view(shape) * (v.to(wide).view(shape) - (state * k[..., None]).sum(-2))
    state = state + k[..., None] * change[..., None, :]
    o = (state * q[..., None]).sum(-2) * q.shape[-1] ** -0.5
    return o[:, None].to(v.dtype), state


def reference_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Any number of tokens, one after the other: for short sequences."""
    if q.shape[1] > LONGEST:
        raise Unsupported(f"beyond {LONGEST} tokens")
    outputs = []
    for i in range(q.shape[1]):
        if state is None:
            wide = torch.promote_types(v.dtype, torch.float32)
            state = v.new_zeros((v.shape[0], v.shape[2], q.shape[-1], v.shape[-1]), dtype=wide)
        o, state = torch_step(*(x[:, i : i + 1] for x in (q, k, v, a, b)), A_log, dt_bias, state)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def fla_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    allow_fla_backward(q)
    f: Any = fused_recurrent_gated_delta_rule if q.shape[1] <= 8 else chunk_gated_delta_rule
    gate = {"g": a, "beta": b, "A_log": A_log, "dt_bias": dt_bias, "initial_state": state}
    switches = ("output_final_state", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "use_qk_l2norm_in_kernel")
    o, state = f(q, k, v, **gate, **dict.fromkeys(switches, True))
    return o, state


class PlainModel:
    """checkpointed: keep only the input of each (loop, block) for the backward pass; no caches."""

    def __init__(self, model: LT2, delta_rule: DeltaRule, checkpointed: bool = False) -> None:
        self.model, self.config, self.delta_rule, self.checkpointed = model, model.config, delta_rule, checkpointed
        reuse = model.config.reuse  # what later loops take from the first
        self.reused = ["k", "v"] * (reuse.kv == "first") + ["chosen"] * (reuse.index == "share")

    def __call__(
        self, ids: Tensor, caches: Iterable[Iterable[Cache]] | None = None, past: int = 0, keep: int = 0
    ) -> Tensor:
        """Logits of the last ``keep`` tokens, 0: of all. caches: for each (loop, layer), replaced by longer ones."""
        model, config = self.model, self.config
        if caches is None:
            caches = (({} for _ in model.layers) for _ in range(config.loop_count))
        h, first = model.embed_tokens(ids), [Cache() for _ in model.layers]
        for loop, row in enumerate(caches):
            start = h
            for block, cache, kept in zip(model.layers, row, first, strict=True):
                cache |= kept
                if self.checkpointed:
                    h = checkpoint(lambda h, b=block: self.block(b, h, {}, 0), h, use_reentrant=False)
                else:
                    h = self.block(block, h, cache, past)
                if loop == 0:
                    kept |= {f"first_{name}": cache[name] for name in self.reused if name in cache}
            if model.rho is not None:
                h = h + model.rho[loop].to(h.dtype) * start
            if config.inter_loop_norm or loop == config.loop_count - 1:
                h = self.norm(model.norm, h)
        weight = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
        return F.linear(h[:, -keep:], weight)

    def block(self, block: nn.Module, h: Tensor, cache: Cache, past: int) -> Tensor:
        x = self.norm(block.mixer_norm, h)
        mixers = {GatedDeltaNet: self.gdn, SparseAttention: self.sparse, Attention: self.attention}
        h = h + self.norm(block.mixer_post_norm, mixers[type(block.mixer)](block.mixer, x, cache, past))
        x, mlp = self.norm(block.mlp_norm, h), block.mlp
        return h + self.norm(block.mlp_post_norm, mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Identity):
            return x
        return F.rms_norm(x, x.shape[-1:], module.weight, self.config.rms_norm_eps)

    def rotate(self, x: Tensor, past: int) -> Tensor:
        """x [B, T, heads, dim], halves paired."""
        wide = torch.promote_types(x.dtype, torch.float32)
        dim, places = x.shape[-1], torch.arange(past, past + x.shape[1], device=x.device, dtype=wide)
        frequency = self.config.rope_theta ** (-torch.arange(0, dim, 2, device=x.device, dtype=wide) / dim)
        cos, sin = (f(places[:, None, None] * frequency) for f in (torch.cos, torch.sin))
        one, two = x.to(wide).chunk(2, dim=-1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1).to(x.dtype)

    def heads(self, mixer: Attention, x: Tensor, cache: Cache, past: int) -> tuple[Tensor, Tensor, Tensor]:
        q = self.rotate(mixer.q_proj(x).unflatten(-1, (mixer.heads, -1)), past)
        if "first_k" in cache:
            return q, cache["first_k"], cache["first_v"]
        k = self.rotate(mixer.k_proj(x).unflatten(-1, (mixer.kv_heads, -1)), past)
        v = mixer.v_proj(x).unflatten(-1, (mixer.kv_heads, -1))
        return q, grow(cache, "k", k), grow(cache, "v", v)

    def output(self, mixer: Attention, o: Tensor, x: Tensor) -> Tensor:
        o = o.flatten(-2)
        return mixer.o_proj(o if mixer.gate_proj is None else o * torch.sigmoid(mixer.gate_proj(x)))

    def attention(self, mixer: Attention, x: Tensor, cache: Cache, past: int) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.heads(mixer, x, cache, past))
        causal = past == 0  # else one token
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=mixer.heads != mixer.kv_heads)
        return self.output(mixer, o.transpose(1, 2), x)

    def sparse(self, mixer: SparseAttention, x: Tensor, cache: Cache, past: int) -> Tensor:
        """Attention to what is gathered; of many tokens with a mask."""
        q, k, v = self.heads(mixer, x, cache, past)
        chosen, grouped = self.choose(mixer, x, cache, past), mixer.heads != mixer.kv_heads
        if past == 0:
            visible = torch.ones(2 * x.shape[1:2], dtype=torch.bool, device=x.device).tril()
            mask = torch.zeros_like(visible).expand(len(x), -1, -1).scatter(-1, chosen, True) & visible
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=grouped)
        else:
            places = chosen[:, 0, :, None, None]
            k, v = (t.gather(1, places.expand(-1, -1, *t.shape[2:])).transpose(1, 2) for t in (k, v))
            o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=grouped)
        return self.output(mixer, o.transpose(1, 2), x)

    def choose(self, mixer: SparseAttention, x: Tensor, cache: Cache, past: int) -> Tensor:
        """Keys with the highest index scores, of all keys, [B, T, topk]."""
        if "first_chosen" in cache:
            return cache["first_chosen"]
        index_q = self.rotate(mixer.index_q_proj(x).unflatten(-1, (mixer.index_heads, -1)), past)
        index_k = grow(cache, "index_k", self.rotate(mixer.index_k_proj(x)[:, :, None], past)[:, :, 0])
        weights = mixer.index_weights_proj(x) * (mixer.index_heads * mixer.index_dim) ** -0.5
        scores = torch.zeros((), device=x.device)
        for j in range(mixer.index_heads):  # heads x T x S does not fit in memory
            products = torch.einsum("btd,bsd->bts", index_q[:, :, j], index_k).relu()
            scores = scores + products * weights[:, :, j, None]
        if past == 0:
            visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=x.device).tril()
            scores = scores.masked_fill(~visible, -torch.inf)
        cache["chosen"] = scores.topk(min(mixer.topk, scores.shape[-1]), dim=-1).indices
        return cache["chosen"]

    def gdn(self, mixer: GatedDeltaNet, x: Tensor, cache: Cache, past: int) -> Tensor:
        wide, width = torch.promote_types(x.dtype, torch.float32), mixer.conv_weight.shape[1]
        qkv = mixer.qkv_proj(x).transpose(1, 2)
        window = cache.get("conv", qkv.new_zeros(*qkv.shape[:2], width))
        inputs = torch.cat((window[..., 1:], qkv), dim=-1)
        cache["conv"] = inputs[..., -width:]
        qkv = F.silu(F.conv1d(inputs, mixer.conv_weight[:, None], groups=inputs.shape[1])).transpose(1, 2)
        q, k, v = qkv.split(mixer.qkv_sizes, dim=-1)
        q, k = (t.unflatten(-1, (mixer.key_heads, -1)) for t in (q, k))
        v, z = (t.unflatten(-1, (mixer.value_heads, -1)) for t in (v, mixer.z_proj(x)))
        decay = mixer.a_proj(x), mixer.b_proj(x), mixer.A_log, mixer.dt_bias
        o, cache["matrix"] = self.delta_rule(q, k, v, *decay, cache.get("matrix"))
        o = F.rms_norm(o.to(wide), o.shape[-1:], mixer.norm_weight.to(wide), mixer.eps) * F.silu(z.to(wide))
        return mixer.o_proj(o.to(x.dtype).flatten(-2))


def grow(cache: Cache, name: str, new: Tensor) -> Tensor:
    """The cached rows and the new ones, [B, past + T, ..]."""
    cache[name] = torch.cat((cache[name], new), dim=1) if name in cache else new
    return cache[name]
