"""What looping can do in principle, measured on real modules and operators: ranks, reach, reflections. And a figure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lt2_ext import ops
from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.lt2 import Block
from lt2_ext.models.mixers import LinearMixer, Mixer

WINDOW = 16


def new_model(pattern: str, loops: int, layers: int = 1, **changes: Any) -> LT2:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "layer_pattern": pattern,
        "loop_count": loops,
        "window_size": WINDOW,
    }
    return LT2(LT2Config(**shape | changes))


def repeat_keys(model: LT2) -> LT2:
    """The model whose blocks add nothing: every loop reads the same hidden states, so its keys coincide."""
    with torch.no_grad():
        for block in blocks(model):
            output_of(block.mixer).zero_()
            block.mlp.down_proj.weight.zero_()
    return model


def blocks(model: LT2) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def output_of(mixer: Mixer) -> Tensor:
    return mixer.get_parameter("o_proj.weight")


def mix_share(model: LT2, ids: Tensor, share: float) -> LT2:
    """The model with its mixers' outputs scaled so that, in the first loop, they are ``share`` of what follows: the
    residual stream keeps 1 - share. Its SwiGLUs add nothing, for they move nothing between tokens."""
    sizes: list[Tensor] = []

    def watch(module: nn.Module, arguments: tuple[Any, ...], results: tuple[Tensor, Any]) -> None:
        sizes.append(results[0].norm())

    handle = blocks(model)[0].mixer.register_forward_hook(watch)
    with torch.no_grad():
        for block in blocks(model):
            block.mlp.down_proj.weight.zero_()
        model(ids)
        handle.remove()
        residual = model.embed_tokens(ids).norm()
        for block in blocks(model):
            output_of(block.mixer).mul_(share / (1 - share) * residual / sizes[0])
    return model


@torch.no_grad()
def effective_operators(model: LT2, ids: Tensor) -> Tensor:
    """What the loops of the first layer, a delta rule, do in turn to what a state holds, ``[tokens, heads, K, K]``:
    ``prod_tau (I - beta_tau k_tau k_tau^T)`` of each token, by the operator itself: the loops are its time axis, the
    identity its first state, and nothing is written."""
    mixer = blocks(model)[0].mixer
    assert isinstance(mixer, LinearMixer)
    steps: list[tuple[Tensor, Tensor]] = []
    original = mixer.inputs

    def watch(*arguments: Any) -> dict[str, Any]:
        inputs = original(*arguments)
        steps.append((inputs["k"][0], inputs["beta"][0]))
        return inputs

    with mock.patch.object(mixer, "inputs", watch):
        model(ids)
    k, beta = (torch.stack(t, 1) for t in zip(*steps, strict=True))  # [tokens, loops, heads, K], [.., heads]
    return operators(k, beta)


def operators(k: Tensor, beta: Tensor) -> Tensor:
    """``prod_t (I - beta_t k_t k_t^T)`` of unit keys, for k ``[B, T, H, K]``: ``[B, H, K, K]``."""
    B, T, H, K = k.shape
    identity = torch.eye(K).expand(B, H, K, K)
    unit = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    nothing = torch.zeros(B, T, H, K)
    _, state = ops.chunk_delta_rule(unit, unit, nothing, beta, initial_state=identity, output_final_state=True)
    assert state is not None
    return state


def change_ranks(E: Tensor, tolerance: float = 4e-7) -> Tensor:
    """Of ``E - I``, ``[..]``; rounding of the operator alone gives it singular values of up to 6e-8."""
    return torch.linalg.matrix_rank(E - torch.eye(E.shape[-1]), atol=tolerance, rtol=0.0)


def influence(model: LT2, ids: Tensor) -> Tensor:
    """Of each token of ids ``[1, T]`` on the last hidden state: the norm of a derivative, by distance ``[T]``."""
    embedded = model.embed_tokens(ids).detach().requires_grad_()
    captured: list[Tensor] = []
    handles = [
        model.embed_tokens.register_forward_hook(lambda *_: embedded),
        model.norm.register_forward_hook(lambda module, arguments, result: captured.append(result)),
        model.layers[-1].register_forward_hook(lambda module, arguments, result: captured.append(result[0])),
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    out = captured[-1][0, -1]
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(ids.shape[1])
    for _ in range(8):  # random directions: the mean of their squares is that of the Jacobian
        direction = torch.randn(out.shape, generator=generator)
        (grad,) = torch.autograd.grad(out @ direction, embedded, retain_graph=True)
        total += grad[0].square().sum(-1)
    return (total / 8).sqrt().flip(0)


def reach(effect: Tensor) -> int:
    """How many tokens have any influence."""
    return int(effect.nonzero().max()) + 1


def horizon(effect: Tensor, part: float = 0.9) -> int:
    """Within how many tokens ``part`` of the influence of all other tokens lies."""
    others = effect[1:].square()
    return int((others.cumsum(0) < part * others.sum()).sum()) + 2


def reflections(Q: Tensor) -> Tensor:
    """Unit vectors ``[K, K]`` whose reflections, one after the other, are the orthogonal matrix Q ``[K, K]``; a row of
    zeros is no reflection (Cartan and Dieudonne: K are enough)."""
    K, rest, rows = len(Q), Q.clone(), []
    for i in range(K):
        e = torch.eye(K, dtype=Q.dtype)[i]
        difference = rest[:, i] - e
        unit = difference / difference.norm() if difference.norm() > 1e-12 else torch.zeros_like(e)
        rest = rest - 2 * torch.outer(unit, unit @ rest)
        rows.append(unit)
    return torch.stack(rows[::-1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lt2_ext.recipes.theory", description=__doc__)
    parser.add_argument("--plot", type=Path, default=Path("theory.png"), help="figure, default theory.png")
    draw(parser.parse_args(argv).plot)
    return 0


def draw(path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as e:
        raise SystemExit("the figure needs matplotlib (pip install matplotlib)") from e
    figure, (ranks, far, near, signs) = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    ids, loops = torch.arange(40)[None] % 64, range(1, 9)
    for name, change in (("keys of a random model", lambda m: m), ("equal keys", repeat_keys)):
        y = [change_ranks(effective_operators(change(new_model("delta", T)), ids)).float().mean() for T in loops]
        ranks.plot(loops, y, "o-", ms=4, label=name)
    ranks.plot(loops, loops, ":", color="gray", label="T")
    ranks.set(title="Rank of what T loops of a delta rule erase", xlabel="loops T")

    ids = torch.arange(8 * WINDOW + 8)[None] % 64
    effects = {T: influence(new_model("window", T), ids).detach() for T in loops}
    capped = {T: influence(mix_share(new_model("window", T), ids, 0.05), ids).detach() for T in loops}
    far.plot(loops, [reach(effects[T]) for T in loops], "o-", ms=4, label="any influence")
    far.plot(loops, [T * (WINDOW - 1) + 1 for T in loops], ":", color="gray", label="T (w - 1) + 1")
    far.plot(loops, [horizon(effects[T]) for T in loops], "s-", ms=4, label="90 %, as initialised")
    far.plot(loops, [horizon(capped[T]) for T in loops], "^-", ms=4, label="90 %, residual share 0.95")
    far.set(title=f"Tokens that a window of {WINDOW} reaches", xlabel="loops T")
    for T in (1, 2, 4, 8):
        near.semilogy(capped[T].clamp(min=1e-12) / capped[T][0], label=f"{T} loops")
    near.set(title="Influence by distance, residual share 0.95", xlabel="tokens back", ylim=(1e-9, 2))

    beta = torch.linspace(-6, 6, 61)
    for neg, label in ((False, "beta = sigmoid"), (True, "beta = 2 sigmoid (allow_neg_eigval)")):
        signs.plot(beta, 1 - beta.sigmoid() * (1 + neg), label=label)
    signs.axhline(0, color="gray", lw=0.8)
    signs.set(title="Eigenvalue along k of one step", xlabel="raw beta", ylim=(-1.1, 1.1))
    for axis in (ranks, far, near, signs):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
