"""FlexAttention with the masks of this repository: windows, and the keys that each query selects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import Tensors, Unsupported
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 128


def selection_mask(indices: Tensor, S: int) -> BlockMask:
    """FlexAttention's mask of the keys that each query names."""
    T, named = len(indices), indices >= 0
    keys = indices.long().clamp_min(0)
    counts = torch.zeros(-(-T // BLOCK), -(-S // BLOCK), dtype=torch.int64, device=indices.device)
    rows = (torch.arange(T, device=indices.device) // BLOCK)[:, None].expand_as(keys)
    counts.index_put_((rows, keys // BLOCK), named.long(), accumulate=True)

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.int().argsort(dim=1, descending=True, stable=True)
        return chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    selected = bits_of(keys, named, S) if T * (S + 1) >= 2**31 else bytes_of(keys, named, S)
    full = counts == BLOCK * BLOCK
    partial = (counts > 0) & ~full
    return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK, selected, (T, S))


def bytes_of(keys: Tensor, named: Tensor, S: int) -> Callable[..., Tensor]:
    pairs = torch.zeros(len(keys), S + 1, dtype=torch.bool, device=keys.device)
    pairs.scatter_(1, keys.masked_fill(~named, S), True)
    return lambda b, h, q, k: pairs[q, k]


def bits_of(keys: Tensor, named: Tensor, S: int) -> Callable[..., Tensor]:
    """For more than 2^31 pairs: with a byte for each FlexAttention reads where nothing is (torch 2.11)."""
    words = torch.zeros(len(keys), S // 32 + 1, dtype=torch.int64, device=keys.device)
    words = words.scatter_add_(1, keys >> 5, named.long() << (keys & 31)).int()
    return lambda b, h, q, k: (words[q, k >> 5] >> (k & 31)) & 1 > 0


def attention(x: Tensors, mask: Callable[..., Tensor] | None = None) -> Callable[[Tensors], Tensors]:
    """Attention of q over the keys of k and v that the mask lets through, or that `indices` names."""
    T, S, device = x["q"].shape[1], x["k"].shape[1], x["q"].device
    if mask is None:
        blocks = selection_mask(x["indices"][0], S)
    else:
        blocks = torch.compile(create_block_mask)(mask, None, None, T, S, device=device)
    attend = torch.compile(flex_attention)

    def forward(x: Tensors) -> Tensors:
        if device.type == "cpu" and torch.is_grad_enabled():
            raise Unsupported("no backward on the CPU")
        q, k, v = (x[n].transpose(1, 2) for n in "qkv")
        return {"o": attend(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)}

    return forward
