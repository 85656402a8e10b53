"""The causal depthwise convolution as an equation, in the dtype of x. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`lt2_ext.ops.causal_conv1d`: ``y_t = act(bias + sum_w weight[:, w] * x_{t-W+1+w})``."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        ys, states = [x[:, : offsets[0]] * 0], []
        for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            state = None if initial_state is None else initial_state[n : n + 1]
            y, last = causal_conv1d(x[:, begin:end], weight, bias, state, True, activation)
            ys.append(y)
            states.append(last)
        ys.append(x[:, offsets[-1] :] * 0)
        final_state = torch.cat(states) if states else x.new_zeros(0, *weight.shape)
        return torch.cat(ys, 1), final_state if output_final_state else None
    B, T, D = x.shape
    W = weight.shape[1]
    before = x.new_zeros(B, D, W) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([before, x.transpose(1, 2)], 2)  # [B, D, W + T]
    z = sum(weight[:, w, None].to(x.dtype) * inputs[:, :, w + 1 : w + 1 + T] for w in range(W))
    if bias is not None:
        z = z + bias[:, None].to(x.dtype)
    y = (z if activation is None else F.silu(z)).transpose(1, 2)
    return y, inputs[:, :, T:] if output_final_state else None
