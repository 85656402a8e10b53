"""What the log says about loops and mixers: the size of the residual stream, the norms of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lt2_ext.models import LT2


@contextmanager
def watch_loops(model: LT2) -> Iterator[list[Tensor]]:
    """The root mean square of the residual stream after each loop of the forward pass that happens inside."""
    sizes: list[Tensor] = []
    loop_input: list[Tensor] = []

    def before(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        loop_input.append(arguments[0].detach())

    def after(block: nn.Module, arguments: tuple[Any, ...], results: tuple[Tensor, Any]) -> None:
        h = results[0].detach().float()
        if model.rho is not None:
            h = h + model.rho[len(sizes)].detach() * loop_input[-1]
        sizes.append(h.square().mean().sqrt())

    handles = [
        model.layers[0].register_forward_pre_hook(before),
        model.layers[-1].register_forward_hook(after),
    ]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def grad_norms(model: LT2) -> dict[str, float]:
    """Norm of the gradient of each kind of weight: the mixers by name, ``mlp``, ``norm``, ``embed``, ``rho``, ..."""
    groups: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            groups.setdefault(kind_of(name, model.config.layer_types), []).append(p.grad)
    return {kind: float(nn.utils.get_total_norm(grads)) for kind, grads in sorted(groups.items())}


def kind_of(name: str, layer_types: list[str]) -> str:
    """What a weight belongs to, by its name in the model."""
    parts = name.split(".")
    if parts[0] != "layers":
        return parts[0]
    return {"mixer": layer_types[int(parts[1])], "mlp": "mlp"}.get(parts[2], "norm")
