"""What every op module needs: argument checks with uniform messages, the debug switch, autocast, registration."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

_checks = os.environ.get("LT2_CHECKS", "0") == "1"


def set_checks(enabled: bool) -> None:
    """Turn data-dependent argument checks on or off (also: environment ``LT2_CHECKS=1``).

    They read tensor values (``g <= 0``, index ranges), so on a GPU they synchronise; the kernels are memory-safe
    either way.
    """
    global _checks
    _checks = enabled


def checks_enabled() -> bool:
    return _checks


def check(condition: bool, op: str, argument: str, rule: str, got: object) -> None:
    """Raise ``ValueError("op: argument must rule, got ...")`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{op}: {argument} must {rule}, got {got}")


def autocasts(device: str) -> bool:
    """Whether autocast is active on a device; torch has none for meta tensors, and raises."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast on the device of ``like``, as they are when it is not active."""
    device = like.device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def as_float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def inference_only(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: inference only, call it under torch.no_grad()")


def check_slots(op: str, slots: Tensor | None, state: Tensor) -> None:
    if slots is not None and checks_enabled() and not torch.compiler.is_compiling():
        used = slots[(slots >= 0) & (slots < state.shape[0])]
        check(used.unique().numel() == used.numel(), op, "slots", "name no slot twice", slots.tolist())


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Check that the first of the tensors has a dtype that kernels take, and the others the same."""
    (name, first), *others = tensors.items()
    on_cpu = first.device.type == "cpu"
    known = (torch.float32, torch.bfloat16) if on_cpu else (torch.float32, torch.bfloat16, torch.float16)
    if first.dtype in known and all(t.dtype == first.dtype for _, t in others):
        return  # before any message is put together: a decode step takes microseconds
    names = "float32 or bfloat16" if on_cpu else "float32, bfloat16 or float16"
    check(first.dtype in known, op, name, f"be {names} on {first.device.type}", first.dtype)
    for other, t in others:
        check(t.dtype == first.dtype, op, other, f"have the dtype of {name} ({first.dtype})", t.dtype)


def check_float(op: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        check(t.is_floating_point(), op, name, "have a float dtype", t.dtype)


_functions: dict[Callable[..., Any], type[torch.autograd.Function]] = {}


def differentiable(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give ``lt2::<name>`` a derivative, in the form of :func:`torch.library.register_autograd`."""
    op = getattr(torch.ops.lt2, name).default
    torch.library.register_autograd(f"lt2::{name}", backward, setup_context=setup_context)
    function = _functions[op] = type(name, (torch.autograd.Function,), {"generate_vmap_rule": True})
    forward = functools.partial(_below_autograd, op)
    for step, f in (("forward", forward), ("setup_context", setup_context), ("backward", backward)):
        setattr(function, step, staticmethod(f))


def _below_autograd(op: Callable[..., Any], *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def run(op: Callable[..., Any], *arguments: Any) -> Any:
    """``op(*arguments)`` without what torch.library has around operators with a derivative, which takes longer than a
    kernel does for one token. A compiler gets the operator itself."""
    if torch.compiler.is_compiling():
        return op(*arguments)
    if not torch.is_grad_enabled():
        return _below_autograd(op, *arguments)
    return _functions[op].apply(*arguments) if op in _functions else op(*arguments)


def fake(op: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function of the arguments of ``lt2::<op>`` that gives empty outputs. A derivative of ``.._bwd`` is an
    error."""
    if op.endswith("_bwd"):
        differentiable(op, lambda ctx, inputs, output: None, functools.partial(_no_double_backward, op))
    return torch.library.register_fake(f"lt2::{op}")


def wanted(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """For all inputs: the gradients of the first ones, where they are needed; None for the others."""
    needed = ctx.needs_input_grad
    return tuple(g if n else None for g, n in zip((*grads, *[None] * (len(needed) - len(grads))), needed, strict=True))


def _no_double_backward(op: str, ctx: object, *grads: Tensor) -> NoReturn:
    raise RuntimeError(f"lt2::{op}: double backward is not supported")
