"""Short causal depthwise convolution over tokens, with the state that streaming and decode carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _common
from ._common import as_float, autocast, check, check_dtypes, check_slots, fake, inference_only, run, wanted

_fwd = torch.ops.lt2.causal_conv1d_fwd.default
_bwd = torch.ops.lt2.causal_conv1d_bwd.default
_step = torch.ops.lt2.causal_conv1d_step_.default

MAX_WIDTH = 16


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution: ``y_t = act(bias + sum_w weight[:, w] * x_{t-W+1+w})`` per channel.

    Inputs before the first token of a sequence come from ``initial_state``, or are zero. A state holds the last W
    inputs of a sequence, oldest first, as in fla (the convolution needs W - 1 of them); a sequence without tokens
    passes it through. Under autocast x is cast to the autocast dtype.

    Args:
        x: ``[B, T, D]`` float32 or bfloat16 (on CUDA also float16); any strides.
        weight: ``[D, W]`` of any float dtype, ``1 <= W <= 16``; used in float32.
        bias: ``[D]`` of any float dtype; used in float32.
        initial_state: ``[N, D, W]``, cast to the dtype of x. N is B, or the number of sequences in ``cu_seqlens``.
        output_final_state: also return the state after the last token.
        activation: ``"silu"`` (or ``"swish"``), or None.
        cu_seqlens: ``[N + 1]`` int32 or int64, ascending offsets of the sequences in the only row (``B == 1``). Tokens
            of no sequence give ``y = 0`` and have no gradient.

    Returns:
        ``y`` ``[B, T, D]`` in the dtype of x, and the final state ``[N, D, W]`` in the dtype of x, or None.
        Differentiable in x, weight, bias and initial_state, also through the final state; gradients do not depend on
        the number of threads.

    Raises:
        ValueError: a wrong activation, or dtypes that the operator does not take.
        RuntimeError: a wrong shape; an unsupported device; on the CPU, offsets in ``cu_seqlens`` that do not ascend
            within ``0 .. T``.
    """
    op = "causal_conv1d"
    (x,) = autocast(x, x)
    silu = _check_inputs(op, x, weight, bias, activation)
    if initial_state is not None:
        shape = [x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, *weight.shape]
        check(list(initial_state.shape) == shape, op, "initial_state", f"have shape [N, D, W] = {shape}",
              list(initial_state.shape))  # fmt: skip
        initial_state = initial_state.to(x.dtype)
    y, final_state = run(_fwd, x, weight.float(), as_float(bias), initial_state, cu_seqlens, silu, output_final_state)
    return y, final_state if output_final_state else None


def causal_conv1d_step_(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Convolve the next tokens of each row, updating a pool of states in place.

    The equation of :func:`causal_conv1d`, bit for bit. Inference only: there is no derivative, so inputs that require
    one are an error in grad mode.

    Args:
        state: ``[slots, D, W]`` in the dtype of x, any strides: the last W inputs of each sequence, oldest first.
        x: ``[B, t, D]``, or ``[B, D]`` for one token; dtypes of :func:`causal_conv1d`. Not affected by autocast.
        weight, bias: ``[D, W]`` (``1 <= W <= 16``) and ``[D]`` of any float dtype; used in float32.
        slots: ``[B]`` int64, the state of each row, no valid one twice. A row whose slot is -1 (or not in the pool)
            writes nothing and gives ``y = 0``. None: row b uses slot b.
        activation: ``"silu"`` (or ``"swish"``), or None.

    Returns:
        ``y`` in the shape and dtype of x.

    Raises:
        ValueError: a wrong activation or dtype; under ``lt2_ext.set_checks(True)`` also a slot used twice.
        RuntimeError: a wrong shape; inputs that require a gradient; an unsupported device.
    """
    op = "causal_conv1d_step_"
    inference_only(op, state, x, weight, bias)
    silu = _check_inputs(op, x, weight, bias, activation)
    check(x.dim() in (2, 3), op, "x", "have shape [B, t, D] or [B, D]", list(x.shape))
    check(slots is not None or x.shape[0] <= len(state), op, "x", f"have at most {len(state)} rows (slots)", len(x))
    check_slots(op, slots, state)
    one_token = x.dim() == 2
    y = _step(state, x.unsqueeze(1) if one_token else x, weight.float(), as_float(bias), slots, silu)
    return y.squeeze(1) if one_token else y


def _check_inputs(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether the activation is SiLU."""
    check(activation in ("silu", "swish", None), op, "activation", 'be "silu", "swish" or None', repr(activation))
    check_dtypes(op, x=x)
    for name, t in (("weight", weight), ("bias", bias)):
        check(t is None or t.is_floating_point(), op, name, "have a float dtype", None if t is None else t.dtype)
    return activation is not None


@fake("causal_conv1d_fwd")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    silu: bool, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    torch._check(x.dim() == 3 and weight.dim() == 2 and weight.shape[0] == x.shape[2])
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, *weight.shape) if output_final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(shape)


@fake("causal_conv1d_bwd")
def _(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dbias = weight.new_empty(0 if bias is None else bias.shape)
    dinitial_state = x.new_empty(0 if initial_state is None else initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial_state


fake("causal_conv1d_step_")(lambda state, x, *_: x.new_empty(x.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:-2])
    ctx.options = inputs[-2:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    silu, output_final_state = ctx.options
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    return wanted(ctx, *run(_bwd, dy, dfinal_state if output_final_state else None, *tensors, silu))


_common.differentiable("causal_conv1d_fwd", _setup_context, _backward)
