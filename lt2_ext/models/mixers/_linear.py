"""What the mixers with a matrix state per head share: projections, short convolution, recurrence, norm, streaming."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt2_ext import ops

from ._mixer import Mixer, Shared, State

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens

MAX_STEP = 8  # tokens that an in-place step takes; longer pieces run the chunked op from the stored state


class LinearMixer(Mixer):
    """``q, k, v = W x``, perhaps ``silu(conv(.))`` of it; a recurrence over a state ``[K, V]`` per value head; an
    RMSNorm of what each head reads, perhaps times a gate of x; ``W_o`` of that.

    A mixer says which of these it has in the attributes below, and in :meth:`inputs` what enters its recurrence.

    Attributes:
        rule: A chunked op of :mod:`lt2_ext.ops`; ``step_``: the one that decodes in place. Both take what
            :meth:`inputs` gives, by name.
        expand: K and V of all heads together, in units of hidden_size.
        short_conv: There is a convolution of ``linear_conv_kernel_dim`` taps.
        gate: Activation of the output gate by its name in torch.nn.functional, or None: there is none.
        whole_norm: The norm is one over all heads.
        erases: The rule is a delta rule.
        decay: There are A_log and dt_bias: initial decays are ``exp(-A dt)``, A uniform in this range and dt
            log-uniform in 1e-3 .. 1e-1. They stay fp32 whatever dtype the model is moved to: bf16 has too few digits
            for decays near 1.
    """

    rule: ClassVar[Callable[..., tuple[Tensor, Tensor | None]]]
    step_: ClassVar[Callable[..., Tensor]]
    expand: ClassVar[tuple[float, float]] = (1, 1)
    short_conv: ClassVar[bool] = False
    gate: ClassVar[str | None] = None
    whole_norm: ClassVar[bool] = False
    erases: ClassVar[bool] = False
    decay: ClassVar[tuple[float, float] | None] = None

    def __init__(self, config: LT2Config) -> None:
        super().__init__(config)
        d, self.eps = config.hidden_size, config.rms_norm_eps
        self.key_heads, self.value_heads, self.key_dim, self.value_dim = self.geometry(config)
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.qkv_sizes = (keys, keys, values)
        self.qkv_proj = nn.Linear(d, 2 * keys + values, bias=False)
        self.z_proj: nn.Module | None = None if self.gate is None else nn.Linear(d, values, bias=False)
        self.build(config)
        self.o_proj = nn.Linear(values, d, bias=False)
        if self.short_conv:
            self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, config.linear_conv_kernel_dim))
        self.norm_weight = nn.Parameter(torch.empty(values if self.whole_norm else self.value_dim))
        if self.decay is not None:
            self.A_log = nn.Parameter(torch.empty(self.value_heads, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(self.decay_channels(), dtype=torch.float32))

    def geometry(self, config: LT2Config) -> tuple[int, int, int, int]:
        """Key heads, value heads, K and V of each."""
        heads, (K, V) = config.linear_num_key_heads, self.expand
        return heads, heads, self.per_head(config, K, 256), self.per_head(config, V, 512)

    def per_head(self, config: LT2Config, factor: float, most: int) -> int:
        """The share of a head in ``factor hidden_size`` channels, at most ``most``."""
        width, heads = int(factor * config.hidden_size), config.linear_num_key_heads
        if width % heads or not 0 < width // heads <= most:
            rule = f"divide {factor} hidden_size = {width} into heads of 1..{most}"
            raise ValueError(f"{type(self).__name__}: linear_num_key_heads must {rule}, got {heads}")
        return width // heads

    def build(self, config: LT2Config) -> None:
        """Make what :meth:`inputs` needs beside q, k and v."""

    def decay_channels(self) -> int:
        """Of dt_bias."""
        return self.value_heads

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> dict[str, Any]:
        """Arguments of ``rule`` and ``step_``: q, k ``[B, T, key_heads, K]``, v ``[B, T, value_heads, V]``, and from x
        decays and strengths, where the rule has them. g is a log decay."""
        return {"q": q, "k": k, "v": v}

    def finish(self, o: Tensor, v: Tensor, z: Tensor | None) -> Tensor:
        """What each head read, ``[B, T, value_heads, V]``, and z of the same shape -> input of ``o_proj``."""
        if z is not None and self.gate == "silu" and not self.whole_norm:
            return ops.gated_rmsnorm(o, z.to(o.dtype), self.norm_weight, self.eps)
        shape, o = o.shape, (o.flatten(-2) if self.whole_norm else o).float()
        o = F.rms_norm(o, self.norm_weight.shape, self.norm_weight.float(), self.eps).view(shape)
        return o if z is None or self.gate is None else o * getattr(F, self.gate)(z.float())

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm_weight)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.short_conv:
            bound = self.conv_weight.shape[1] ** -0.5
            nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.decay is not None:
            with torch.no_grad():
                self.A_log.uniform_(*self.decay).clamp_(min=1e-4).log_()
                step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
                step += torch.log(-torch.expm1(-step))  # softplus of it is the step: the inverse is x + log(1 - e^-x)

    def new_state(self, batch_size: int, max_length: int, window: int | None) -> State:
        matrix = (batch_size, self.value_heads, self.key_dim, self.value_dim)
        state = {"matrix": self.norm_weight.new_zeros(matrix, dtype=torch.float32)}
        if self.short_conv:
            state["conv"] = self.conv_weight.new_zeros((batch_size, *self.conv_weight.shape))
        return state

    def forward(
        self, x: Tensor, tokens: Tokens, window: int | None, state: State | None, shared: Shared | None = None
    ) -> tuple[Tensor, Shared | None]:
        qkv = self.qkv_proj(x)
        z = None if self.z_proj is None else self.z_proj(x).unflatten(-1, (self.value_heads, self.value_dim))
        if state is None or tokens.segment or x.shape[1] > MAX_STEP:
            o, shared = self.scan(x, qkv, z, tokens, state, shared)
        else:
            o, shared = self.decode(x, qkv, z, tokens, state, shared)
        return self.o_proj(o.to(x.dtype).flatten(-2)), shared

    def scan(
        self, x: Tensor, qkv: Tensor, z: Tensor | None, tokens: Tokens, state: State | None, shared: Shared | None
    ) -> tuple[Tensor, Shared | None]:
        """All tokens at once."""
        past = {name: tokens.of(t) for name, t in (state or {}).items()}
        if self.short_conv:
            qkv, conv = ops.causal_conv1d(
                qkv,
                self.conv_weight,
                initial_state=past.get("conv"),
                output_final_state=state is not None,
                cu_seqlens=tokens.cu_seqlens,
            )
        inputs = self.inputs(x, *self.heads(qkv), tokens)
        o, matrix, shared = self.recur(inputs, past.get("matrix"), tokens, state is not None, shared)
        if state is not None and matrix is not None:
            new = {"matrix": matrix} | ({"conv": conv} if self.short_conv and conv is not None else {})
            if tokens.segment:
                shared = Shared(state=new)
            else:
                for name, t in new.items():
                    tokens.put(state[name], t)
        return self.finish(o, inputs["v"], z), shared

    def recur(
        self, inputs: dict[str, Any], start: Tensor | None, tokens: Tokens, keep: bool, shared: Shared | None
    ) -> tuple[Tensor, Tensor | None, Shared | None]:
        """What is read from ``start`` on, the state at the end if wanted, and what later loops may use."""
        options = {"initial_state": start, "output_final_state": keep, "cu_seqlens": tokens.cu_seqlens}
        return *self.rule(**inputs, **options), None

    def decode(
        self, x: Tensor, qkv: Tensor, z: Tensor | None, tokens: Tokens, state: State, shared: Shared | None
    ) -> tuple[Tensor, Shared | None]:
        """A few tokens of each sequence, in place."""
        if self.short_conv:
            qkv = ops.causal_conv1d_step_(state["conv"], qkv, self.conv_weight, slots=tokens.slots)
        inputs = self.inputs(x, *self.heads(qkv), tokens)
        o = self.step_(state["matrix"], **inputs, slots=tokens.slots)
        return self.finish(o, inputs["v"], z), None

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, channels] -> q, k [B, T, key_heads, K], v [B, T, value_heads, V]."""
        q, k, v = qkv.split(self.qkv_sizes, dim=-1)
        keys = (self.key_heads, self.key_dim)
        return q.unflatten(-1, keys), k.unflatten(-1, keys), v.unflatten(-1, (self.value_heads, self.value_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearMixer:
        """Every ``.to()``, ``.half()``, ``.cuda()`` passes here: the decay parameters move, but stay fp32."""
        decay = () if self.decay is None else (self.A_log, self.dt_bias)
        kept = {id(t) for p in decay for t in (p, p.grad)}

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            keep = id(t) in kept and moved.dtype != torch.float32
            return t.to(moved.device, torch.float32) if keep else moved

        return super()._apply(move, recurse)
