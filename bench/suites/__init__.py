"""The suites: named shapes with everything that is run on them; ``cases(device, quick)`` of each module gives the rows
of its table. May import: lt2_ext, torch, peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Forward = Callable[[Tensors], Tensors]
Call = Callable[[], Tensors]  # what is timed; its outputs by name, gradients as d<input>
Build = Callable[[Tensors], Call]  # prepares a call on given inputs, outside the measured time

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One row: an operation on one shape in one dtype."""

    op: str
    shape: str
    dtype: torch.dtype  # of the inputs; picks tolerance and matmul ceiling
    flops: float  # matrix FLOPs of the algorithm
    moved: float  # bytes, every input and output once
    inputs: Callable[[], Tensors]
    ours: Build
    torch: Build
    oracle: Forward  # float64 outputs on the same (rounded) inputs
    peers: Mapping[str, Build] = field(default_factory=dict)  # keys: a name in peers.PEERS, perhaps followed by " ..."
    graph: bool = False  # on CUDA in a graph, as in a decode loop: eager, it would be the launch that is timed
    eager: bool = False  # never captured in a graph by the clock: what is compared decides that for itself
    tolerance: float | None = None  # of every output; None: the table's
    beside_torch: bool = False  # in 16 bits: at most so much worse than plain torch as the table allows, instead
    headline: bool = False  # ours and the peers get every round, whatever it takes
    compared: Callable[[Tensors, Tensors], Tensors] | None = None  # what to check of (inputs, outputs); None: outputs
    tokens: int = 0  # that a call reads or makes, where that is a model's
    checked: Callable[[], Tensors] | None = None  # smaller inputs for the oracle, where ``inputs`` are too large for it


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating-point tensors in another dtype."""
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def timed(forward: Forward, trained: tuple[str, ...] = ()) -> Build:
    """A Build from a function of the inputs: without autograd, or with the gradients of the inputs ``trained``, where
    ``grad_o`` among the inputs is the cotangent of output ``o``, and so on."""

    def build(x: Tensors) -> Call:
        if not trained:
            return torch.no_grad()(lambda: forward(x))
        leaves = {n: x[n].detach().requires_grad_() for n in trained}

        def call() -> Tensors:
            out = forward({**x, **leaves})
            cotangents = [x[f"grad_{n}"] for n in out]
            grads = torch.autograd.grad(list(out.values()), list(leaves.values()), cotangents)
            return {**out, **{f"d{n}": g for n, g in zip(trained, grads, strict=True)}}

        return call

    return build


def oracle(forward: Forward, trained: tuple[str, ...] = ()) -> Forward:
    """The outputs of ``forward`` in float64."""
    return lambda x: timed(forward, trained)(cast(x, torch.float64))()


def generator(device: torch.device) -> Callable[..., Tensor]:
    """``randn(*shape)`` on ``device``, the same numbers each time."""
    state = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, device=device, generator=state)
