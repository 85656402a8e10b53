"""The causal depthwise convolution as an equation, in the dtype of x. Differentiable."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """One sequence per row, x ``[B, T, D]``; also the last W inputs, ``[B, D, W]``."""
    T, W = x.shape[1], weight.shape[1]
    inputs = torch.cat([state.to(x.dtype), x.transpose(1, 2)], 2)  # [B, D, W + T]
    windows = inputs.unfold(2, W, 1)[:, :, 1:]  # [B, D, T, W]
    z = (windows * weight[:, None].to(x.dtype)).sum(-1)
    if bias is not None:
        z = z + bias[:, None].to(x.dtype)
    return (z if activation is None else F.silu(z)).transpose(1, 2), inputs[:, :, T:]


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
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    states = x.new_zeros(sequences, *weight.shape) if initial_state is None else initial_state
    if cu_seqlens is None:
        y, final_state = convolve(x, weight, bias, states, activation)
    else:
        offsets = cu_seqlens.tolist()
        ys, finals = [x[:, : offsets[0]] * 0], [states[:0]]
        for n, (begin, end) in enumerate(pairwise(offsets)):
            y, final_state = convolve(x[:, begin:end], weight, bias, states[n : n + 1], activation)
            ys.append(y)
            finals.append(final_state)
        y, final_state = torch.cat([*ys, x[:, offsets[-1] :] * 0], 1), torch.cat(finals)
    return y, final_state if output_final_state else None
