"""How the next token is chosen."""

from __future__ import annotations

import torch
from torch import Tensor


def check_options(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for what ``LT2.generate`` does not take."""
    for name, ok, rule, value in (
        ("max_new_tokens", max_new_tokens >= 0, "be >= 0", max_new_tokens),
        ("temperature", temperature >= 0, "be >= 0", temperature),
        ("top_k", top_k is None or top_k >= 1, "be >= 1 or None", top_k),
        ("top_p", top_p is None or 0 < top_p <= 1, "be in (0, 1] or None", top_p),
    ):
        if not ok:
            raise ValueError(f"LT2.generate: {name} must {rule}, got {value}")


def pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token per row of ``logits`` [B, vocab]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = p.cumsum(dim=-1) - p >= top_p  # the likelier ones suffice; never true of the likeliest
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
