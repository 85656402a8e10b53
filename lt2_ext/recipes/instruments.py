"""What the log says about loops and mixers: the size of the residual stream, the norms of gradients, attention to the
first token, how many directions the loops write along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lt2_ext.models import LT2
from lt2_ext.models.mixers import Attention, LinearMixer

PROBED = 256  # tokens that are looked at


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


@torch.no_grad()
def probe(model: LT2, tokens: Tensor) -> dict[str, list[float]]:
    """Of each loop, on tokens ``[1, T]``; what the model has no layers for is left out.

    ``first_token_mass``: of ``full`` attention how much falls on the first token, mean over layers, heads and the
    second half of the tokens; 0 in a loop that has none. ``write_rank``: along how many directions a token has written
    up to this loop: of the singular values s of its unit keys in all loops so far ``(sum s^2)^2 / sum s^4``, which is 1
    where the keys coincide and their number where they are orthogonal; mean over tokens, heads and linear layers.
    """
    loops = model.config.loop_count
    masses: list[list[Tensor]] = [[] for _ in range(loops)]
    calls: Counter[nn.Module] = Counter()
    writers: dict[nn.Module, list[Tensor]] = {}

    def attends(mixer: nn.Module, arguments: tuple[Any, ...], results: object) -> None:
        x, where, window, state, shared = arguments
        if window is None and type(mixer) is Attention:
            q, keys = mixer.project(x, where, state, shared)
            p = attention(q, keys.k)
            masses[calls[mixer]].append(p[:, p.shape[1] // 2 :, 0].mean())
        calls[mixer] += 1

    def writes(mixer: LinearMixer) -> Any:
        original = mixer.inputs

        def inputs(*arguments: Any) -> dict[str, Any]:
            made = original(*arguments)
            writers.setdefault(mixer, []).append(nn.functional.normalize(made["k"].float(), dim=-1))
            return made

        return mock.patch.object(mixer, "inputs", inputs)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Attention):
                stack.callback(module.register_forward_hook(attends).remove)
            elif isinstance(module, LinearMixer):
                stack.enter_context(writes(module))
        model(tokens[:, :PROBED])
    found = {}
    if any(masses):
        found["first_token_mass"] = [float(sum(loop) / max(len(loop), 1)) for loop in masses]
    if writers:
        found["write_rank"] = [
            sum(float(effective_rank(torch.stack(of[: loop + 1], -2))) for of in writers.values()) / len(writers)
            for loop in range(loops)
        ]
    return found


def effective_rank(rows: Tensor) -> Tensor:
    """``(sum s^2)^2 / sum s^4`` of the singular values s of rows ``[.., n, K]``, mean."""
    gram = rows @ rows.mT
    return (gram.diagonal(dim1=-2, dim2=-1).sum(-1).square() / gram.square().sum((-2, -1)).clamp(min=1e-12)).mean()


def attention(q: Tensor, k: Tensor) -> Tensor:
    """Mean over heads of the attention of each token to all that it sees, ``[B, T, T]``."""
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * q.shape[-1] ** -0.5
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1).mean(1)


def kind_of(name: str, layer_types: list[str]) -> str:
    """What a weight belongs to, by its name in the model."""
    parts = name.split(".")
    if parts[0] != "layers":
        return parts[0]
    return {"mixer": layer_types[int(parts[1])], "mlp": "mlp"}.get(parts[2], "norm")
