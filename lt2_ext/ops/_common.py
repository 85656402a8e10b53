"""What every op module needs: argument checks with uniform messages, the debug switch, autocast, registration."""

from __future__ import annotations

import os
from typing import NoReturn

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


def check_shape(op: str, argument: str, t: Tensor, axes: str, **sizes: int) -> None:
    """Check that ``t`` has the axes named like ``"[B, T, D]"``, those in ``sizes`` of that size."""
    names, got = axes[1:-1].split(", "), list(t.shape)
    if len(got) != len(names) or any(sizes.get(n, size) != size for n, size in zip(names, got, strict=True)):
        known = f" = [{', '.join(str(sizes.get(n, n)) for n in names)}]" if sizes else ""
        check(False, op, argument, f"have shape {axes}{known}", got)


def autocast(like: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast on the device of ``like``, as they are when it is not active."""
    device = like.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def no_double_backward(op: str) -> None:
    """Register a clear error as the derivative of backward op ``lt2::<op>``."""

    def backward(ctx: object, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"lt2::{op}: double backward is not supported")

    torch.library.register_autograd(f"lt2::{op}", backward)
