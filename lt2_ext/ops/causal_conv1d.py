"""Short causal depthwise convolution over tokens, with the state that streaming and decode carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import autocast, check, checks_enabled, no_double_backward

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
        ValueError: a wrong shape, dtype or activation.
        RuntimeError: on the CPU, offsets in ``cu_seqlens`` that do not ascend within ``0 .. T``; an unsupported device.
    """
    op = "causal_conv1d"
    (x,) = autocast(x, x)
    silu = _check_inputs(op, x, weight, bias, activation)
    check(x.dim() == 3, op, "x", "have shape [B, T, D]", list(x.shape))
    sequences = x.shape[0]
    if cu_seqlens is not None:
        check(x.shape[0] == 1, op, "x", "have B = 1 with cu_seqlens", list(x.shape))
        check(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 0, op, "cu_seqlens", "have shape [N + 1]",
              list(cu_seqlens.shape))  # fmt: skip
        check(cu_seqlens.dtype in (torch.int32, torch.int64), op, "cu_seqlens", "be int32 or int64", cu_seqlens.dtype)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shape = [sequences, *weight.shape]
        check(list(initial_state.shape) == shape, op, "initial_state", f"have shape [N, D, W] = {shape}",
              list(initial_state.shape))  # fmt: skip
        initial_state = initial_state.to(x.dtype)
    bias = None if bias is None else bias.float()
    y, final_state = _fwd(x, weight.float(), bias, initial_state, cu_seqlens, silu, output_final_state)
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
        ValueError: a wrong shape, dtype or activation; under ``lt2_ext.set_checks(True)`` also a slot used twice.
        RuntimeError: inputs that require a gradient; an unsupported device.
    """
    op = "causal_conv1d_step_"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, x, weight, bias)):
        raise RuntimeError(f"{op}: inference only, call it under torch.no_grad()")
    silu = _check_inputs(op, x, weight, bias, activation)
    check(x.dim() in (2, 3), op, "x", "have shape [B, t, D] or [B, D]", list(x.shape))
    check(state.dim() == 3 and state.shape[1:] == weight.shape, op, "state",
          f"have shape [slots, D, W] = [slots, {weight.shape[0]}, {weight.shape[1]}]", list(state.shape))  # fmt: skip
    check(state.dtype == x.dtype, op, "state", f"have the dtype of x ({x.dtype})", state.dtype)
    if slots is None:
        check(x.shape[0] <= state.shape[0], op, "x", f"have at most {state.shape[0]} rows (slots)", x.shape[0])
    else:
        check(slots.shape == x.shape[:1], op, "slots", f"have shape [B] = [{x.shape[0]}]", list(slots.shape))
        check(slots.dtype == torch.int64, op, "slots", "be int64", slots.dtype)
        if checks_enabled() and not torch.compiler.is_compiling():
            used = slots[(slots >= 0) & (slots < state.shape[0])]
            check(used.unique().numel() == used.numel(), op, "slots", "name no slot twice", slots.tolist())
    one_token = x.dim() == 2
    y = _step(state, x.unsqueeze(1) if one_token else x, weight.float(), None if bias is None else bias.float(),
              slots, silu)  # fmt: skip
    return y.squeeze(1) if one_token else y


def _check_inputs(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether the activation is SiLU."""
    check(activation in ("silu", "swish", None), op, "activation", 'be "silu", "swish" or None', repr(activation))
    on_cpu = x.device.type == "cpu"
    known = (torch.float32, torch.bfloat16) if on_cpu else (torch.float32, torch.bfloat16, torch.float16)
    names = "float32 or bfloat16" if on_cpu else "float32, bfloat16 or float16"
    check(x.dtype in known, op, "x", f"be {names} on {x.device.type}", x.dtype)
    D = x.shape[-1]
    check(weight.dim() == 2 and weight.shape[0] == D, op, "weight", f"have shape [D, W] = [{D}, W]", list(weight.shape))
    check(1 <= weight.shape[1] <= MAX_WIDTH, op, "weight", f"have 1 <= W <= {MAX_WIDTH}", list(weight.shape))
    check(weight.is_floating_point(), op, "weight", "have a float dtype", weight.dtype)
    if bias is not None:
        check(list(bias.shape) == [D], op, "bias", f"have shape [D] = [{D}]", list(bias.shape))
        check(bias.is_floating_point(), op, "bias", "have a float dtype", bias.dtype)
    return activation is not None


@torch.library.register_fake("lt2::causal_conv1d_fwd")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    silu: bool, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    torch._check(x.dim() == 3 and weight.dim() == 2 and weight.shape[0] == x.shape[2])
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, *weight.shape) if output_final_state else (0,)
    return x.new_empty(x.shape), x.new_empty(shape)


@torch.library.register_fake("lt2::causal_conv1d_bwd")
def _(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dbias = weight.new_empty(0 if bias is None else bias.shape)
    dinitial_state = x.new_empty(0 if initial_state is None else initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial_state


@torch.library.register_fake("lt2::causal_conv1d_step_")
def _(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, silu, output_final_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (silu, output_final_state)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    silu, output_final_state = ctx.options
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = _bwd(dy, dfinal_state if output_final_state else None, *tensors, silu)
    needed = ctx.needs_input_grad
    return *(grad if needs else None for grad, needs in zip(grads, needed, strict=False)), None, None, None


torch.library.register_autograd("lt2::causal_conv1d_fwd", _backward, setup_context=_setup_context)
no_double_backward("causal_conv1d_bwd")
