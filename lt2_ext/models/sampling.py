"""How the next token is chosen."""

from __future__ import annotations

import torch
from torch import Tensor


def check_options(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, op: str = "LT2.generate"
) -> None:
    """Raise ValueError for what ``LT2.generate`` and ``Engine.add`` do not take."""
    for name, ok, rule, value in (
        ("max_new_tokens", max_new_tokens >= 0, "be >= 0", max_new_tokens),
        ("temperature", temperature >= 0, "be >= 0", temperature),
        ("top_k", top_k is None or top_k >= 1, "be >= 1 or None", top_k),
        ("top_p", top_p is None or 0 < top_p <= 1, "be in (0, 1] or None", top_p),
    ):
        if not ok:
            raise ValueError(f"{op}: {name} must {rule}, got {value}")


def pick(logits: Tensor, options: Tensor | None) -> Tensor:
    """One token per row of ``logits`` fp32 [B, vocab].

    options fp32 ``[4, B]``: a number drawn uniformly from [0, 1), temperature, top_k and top_p of each row (the size of
    the vocabulary and 1: all tokens). None, and temperature 0: the likeliest token.
    """
    likeliest = logits.argmax(dim=-1)
    if options is None:
        return likeliest
    draw, temperature, top_k, top_p = options[..., None]
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.masked_fill(temperature == 0, 1)
    p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    p = p.masked_fill(torch.arange(p.shape[1], device=p.device) >= top_k, 0)
    p = p / p.sum(dim=-1, keepdim=True)
    p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)  # the likelier ones suffice; never true of the likeliest
    below = p.cumsum(dim=-1)
    place = (below <= draw * below[:, -1:]).sum(dim=-1, keepdim=True)
    last = ((p > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # neither rounding nor NaN must reach beyond it
    drawn = order.gather(1, torch.minimum(place, last))[:, 0]
    return torch.where(temperature[:, 0] == 0, likeliest, drawn)
