"""What tests, benchmarks and ``lt2 doctor`` share: errors, the tolerance table, inputs. May import: torch only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# o and states; gradients of what is multiplied; gradients of decays and strengths (dg, dbeta, dA_log, ddt_bias).
Kind = Literal["out", "grad", "gate_grad"]

# Largest ||x - ref|| / ||ref|| against the float64 oracle on the rounded inputs, by dtype of the inputs:
# (usually, with equal keys or strong gates).
_HALF: dict[Kind, tuple[float, float]] = {"out": (5e-3, 5e-3), "grad": (1e-2, 1e-2), "gate_grad": (2e-2, 3e-2)}
TOLERANCE: dict[torch.dtype, dict[Kind, tuple[float, float]]] = {
    torch.float32: {"out": (1e-5, 1e-4), "grad": (1e-4, 1e-4), "gate_grad": (3e-4, 3e-4)},
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
}
# And at most this many times the error of plain torch in the same dtype, plus a floor. The float32 floor of gate_grad
# is a tenth of its column: those are sums over all later tokens, whose errors add up where the sum cancels.
PLAIN_FACTOR: dict[Kind, float] = {"out": 2, "grad": 3, "gate_grad": 3}
PLAIN_FLOOR: dict[torch.dtype, dict[Kind, float]] = {
    torch.float32: {"out": 1e-6, "grad": 1e-6, "gate_grad": 3e-5},
    torch.bfloat16: dict.fromkeys(PLAIN_FACTOR, 1e-3),
    torch.float16: dict.fromkeys(PLAIN_FACTOR, 1e-3),
}
# A reference below this norm (a decay of e^-100 and the like) underflows in float32: compared absolutely.
SMALLEST_NORM = 1e-30

STRONG_GATES = ("strong16", "-8", "-30", "-100", "mixed", "reset")


def rel_err(out: Tensor, ref: Tensor) -> float:
    """``||out - ref|| / ||ref||`` (Frobenius); infinite if ``out`` is not finite or has another shape."""
    if out.shape != ref.shape or not bool(torch.isfinite(out).all()):
        return float("inf")
    difference = (out.double() - ref.double().to(out.device)).norm().item()
    return difference / max(ref.double().norm().item(), SMALLEST_NORM)


def check_close(
    name: str,
    out: Tensor,
    ref: Tensor,
    plain: Tensor | None = None,
    kind: Kind = "out",
    dtype: torch.dtype | None = None,
    hard: bool = False,
) -> float:
    """Raise AssertionError unless ``out`` is as close to ``ref`` as the tolerance table asks; return the error.

    Args:
        name: for the message.
        out, ref: result and float64 oracle.
        plain: the same in plain torch; None leaves out the comparison with its error.
        kind: column of the table.
        dtype: of the operator's inputs. None: that of ``out``.
        hard: equal keys or strong gates.
    """
    dtype = out.dtype if dtype is None else dtype
    error = rel_err(out, ref)
    limit = TOLERANCE[dtype][kind][hard]
    reason = f"{dtype} {kind}" + (" (hard)" if hard else "")
    if plain is not None:
        factor, floor = PLAIN_FACTOR[kind], PLAIN_FLOOR[dtype][kind]
        relative = factor * rel_err(plain, ref) + floor
        if relative < limit:
            limit, reason = relative, f"{factor} x plain torch + {floor}"
    if not error <= limit:
        raise AssertionError(f"{name}: relative error {error:.3e} exceeds {limit:.3e} ({reason})")
    return error


def gate_values(regime: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Log decays: ``zero``, ``small``, ``logsigmoid``, ``strong16``, ``mixed`` (a token of -100 among zeros), ``reset``
    (some -inf), or a number."""
    if regime in ("zero", "mixed", "reset"):
        g = torch.zeros(shape, device=device) if regime != "reset" else F.logsigmoid(torch.randn(shape, device=device))
        if regime != "zero":
            g[:, 5::13] = -100.0 if regime == "mixed" else float("-inf")
        return g
    if regime == "small":
        return -1e-3 * torch.rand(shape, device=device)
    if regime == "logsigmoid":
        return F.logsigmoid(torch.randn(shape, device=device))
    if regime == "strong16":
        return -16 * F.softplus(torch.randn(shape, device=device))
    return torch.full(shape, float(regime), device=device)


def beta_values(regime: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Writing strengths: ``sigmoid`` of normal numbers, ``negative`` (twice that), or a number."""
    if regime in ("sigmoid", "negative"):
        return torch.randn(shape, device=device).sigmoid() * (2 if regime == "negative" else 1)
    return torch.full(shape, float(regime), device=device)


def key_values(regime: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Keys ``[B, T, H, K]``: ``random`` (normalised), ``equal`` (one normalised key per head), ``onehot``, ``rank2``
    (normalised, in a plane), ``zero_rows`` (every third is zero), ``long`` (of norm 3)."""
    B, T, H, K = shape
    if regime == "equal":
        return F.normalize(torch.randn(B, 1, H, K, device=device), dim=-1).expand(shape).contiguous()
    if regime == "onehot":
        return F.one_hot(torch.randint(K, (B, T, H), device=device), K).float()
    if regime == "rank2":
        basis = torch.randn(B, H, 2, K, device=device)
        return F.normalize(torch.einsum("bthr,bhrk->bthk", torch.randn(B, T, H, 2, device=device), basis), dim=-1)
    k = F.normalize(torch.randn(shape, device=device), dim=-1)
    if regime == "zero_rows":
        k[:, ::3] = 0
    elif regime == "long":
        k *= 3
    elif regime != "random":
        raise ValueError(f"unknown keys {regime!r}")
    return k


def gdn_inputs(
    B: int = 1,
    T: int = 64,
    H: int = 2,
    K: int = 64,
    V: int = 64,
    HV: int | None = None,
    sequences: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    gate: str = "logsigmoid",
    beta: str = "sigmoid",
    keys: str = "random",
) -> dict[str, Tensor]:
    """Arguments ``q, k, v`` (in ``dtype``), ``g, beta, initial_state`` (float32) of the gated delta rule.

    See :func:`gate_values`, :func:`beta_values`, :func:`key_values` for the regimes; ``sequences`` is N for varlen.
    """
    HV = H if HV is None else HV
    return {
        "q": F.normalize(torch.randn(B, T, H, K, device=device), dim=-1).to(dtype),
        "k": key_values(keys, (B, T, H, K), device).to(dtype),
        "v": torch.randn(B, T, HV, V, device=device).to(dtype),
        "g": gate_values(gate, (B, T, HV), device),
        "beta": beta_values(beta, (B, T, HV), device),
        "initial_state": torch.randn(B if sequences is None else sequences, HV, K, V, device=device),
    }


def with_gradients(
    op: Callable[..., tuple[Tensor, Tensor | None]],
    tensors: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    **options: Any,
) -> dict[str, Tensor]:
    """``o``, ``final_state`` and the gradients ``d<name>`` of all ``tensors`` by ``sum(output * cotangent)``.

    ``cotangents`` has one or both of ``o`` and ``final_state``; an output without one is not in the loss.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    o, state = op(**leaves, output_final_state=True, **options)
    assert state is not None
    outputs = {"o": o, "final_state": state}
    used = list(cotangents)
    grads = torch.autograd.grad(
        [outputs[n] for n in used],
        list(leaves.values()),
        [cotangents[n].to(outputs[n].dtype) for n in used],
        materialize_grads=True,
    )
    return {n: t.detach() for n, t in outputs.items()} | {f"d{n}": t for n, t in zip(leaves, grads, strict=True)}


def gradient_kind(name: str) -> Kind:
    """Column of the tolerance table for a result of :func:`with_gradients`."""
    if name in ("o", "final_state"):
        return "out"
    return "grad" if name in ("dq", "dk", "dv", "dinitial_state") else "gate_grad"
