"""Next-token cross entropy without the logits: a block of rows at a time, so that memory does not grow with the
vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**26  # logits that exist at one time


def cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``F.cross_entropy(h @ weight.T, labels, ignore_index=-100)``, fp32, a mean over the labels that are not -100.

    h [rows, D], weight [vocab, D], labels [rows]. The product runs in the dtype of h (that of autocast, if active), all
    else in fp32. The gradients come with the forward pass, from the same logits, and are kept for backward.
    """
    return _CrossEntropy.apply(h, weight, labels, torch.is_grad_enabled())  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor, grad_enabled: bool) -> Tensor:
        device = "cpu" if h.is_meta else h.device.type  # autocast knows no meta
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        exact = torch.promote_types(dtype, torch.float32)
        need_h, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        dh = torch.empty_like(h) if need_h else None
        dweight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        with torch.autocast(device, enabled=False):
            inputs, w = h.to(dtype), weight.to(dtype)
            valid = labels != -100
            targets, share = labels.long().masked_fill(~valid, 0), valid.to(exact) / valid.sum()
            loss = h.new_zeros((), dtype=exact)
            rows = max(1, BLOCK // weight.shape[0])
            for start in range(0, h.shape[0], rows):
                block = slice(start, start + rows)
                x, target, part = inputs[block], targets[block, None], share[block, None]
                p = (x @ w.T).to(exact)
                p -= p.amax(dim=1, keepdim=True)
                own = p.gather(1, target)
                total = p.exp_().sum(dim=1, keepdim=True)
                loss = loss + ((total.log() - own) * part).sum()  # in place torch 2.11 compiles it to no gradient
                if need_h or need_weight:
                    p *= part / total
                    dlogits = p.scatter_add_(1, target, -part).to(dtype)
                    if dh is not None:
                        dh[block] = dlogits @ w
                    if dweight is not None:
                        dweight += dlogits.T @ x
        ctx.save_for_backward(dh, None if dweight is None else dweight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = (None if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None
