"""Sparse attention in plain PyTorch, and the dense attention that it replaces."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import Tensors


def indexer_torch(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, topk: int, chunk: int = 512) -> torch.Tensor:
    """A chunk of queries at a time, so that the scores of all never are in memory."""
    selected = []
    T, before = q.shape[1], k.shape[1] - q.shape[1]
    for begin in range(0, T, chunk):
        end = min(begin + chunk, T)
        seen = before + end
        dots = torch.einsum("bqhd,bkd->bqhk", q[:, begin:end], k[:, :seen]).relu_()
        scores = torch.einsum("bqhk,bqh->bqk", dots.float(), w[:, begin:end])
        positions = torch.arange(before + begin, seen, device=q.device)
        future = torch.arange(seen, device=q.device) > positions[:, None]
        values, indices = scores.masked_fill_(future, -torch.inf).topk(min(topk, seen), -1)
        indices = indices.masked_fill(values == -torch.inf, -1)
        selected.append(F.pad(indices, (0, topk - indices.shape[-1]), value=-1).int())
    return torch.cat(selected, 1)


def loss_torch(
    q_idx: torch.Tensor, k_idx: torch.Tensor, w_idx: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    lse: torch.Tensor, indices: torch.Tensor, chunk: int = 64,
) -> torch.Tensor:  # fmt: skip
    total, G = q_idx.new_zeros((), dtype=torch.float32), q.shape[2] // k.shape[2]
    for begin in range(0, q.shape[1], chunk):
        part = slice(begin, begin + chunk)
        picked = indices[0, part].long()
        unseen, rows = picked < 0, picked.clamp_min(0).flatten()
        keys, index_keys = (t[0].index_select(0, rows).unflatten(0, picked.shape) for t in (k, k_idx))
        logits = q[0, part].unflatten(1, (-1, G)) @ keys.permute(0, 2, 3, 1)  # [chunk, H, G, topk]
        p = (logits.flatten(1, 2).float() * q.shape[3] ** -0.5 - lse[0, part, :, None]).exp().mean(1)
        dots = (q_idx[0, part] @ index_keys.mT).float() * q_idx.shape[3] ** -0.5
        scores = (dots.relu() * w_idx[0, part, :, None]).sum(1).masked_fill(unseen, -torch.inf)
        log_model = scores.log_softmax(-1).masked_fill(unseen, 0)
        p = p.masked_fill(unseen, 0).detach()
        total = total + (torch.xlogy(p, p) - p * log_model).sum()
    return total / q.shape[1]


def gather_torch(x: Tensors, chunk: int = 64) -> Tensors:
    """The selected keys and values copied together for a chunk of queries at a time."""
    q, k, v = x["q"][0], x["k"][0], x["v"][0]
    G = q.shape[1] // k.shape[1]
    parts = []
    for begin in range(0, len(q), chunk):
        indices = x["indices"][0, begin : begin + chunk].long()
        shape = (*indices.shape, *k.shape[1:])
        rows = indices.clamp_min(0).flatten()
        keys, values = (t.index_select(0, rows).view(shape).transpose(1, 2) for t in (k, v))  # [chunk, H, topk, D]
        queries = q[begin : begin + chunk].unflatten(1, (-1, G))  # [chunk, H, G, D]
        unseen = (indices < 0)[:, None, None]
        logits = (queries @ keys.mT * q.shape[-1] ** -0.5).masked_fill(unseen, -torch.inf)
        parts.append((logits.softmax(-1) @ values).flatten(1, 2))
    return {"o": torch.cat(parts)[None]}


DENSE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # the first that takes the case


def dense_torch(x: Tensors) -> Tensors:
    """What it replaces: all keys, selected or not."""
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    with sdpa_kernel(DENSE, set_priority=True):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return {"o": o.transpose(1, 2)}


def step_torch(x: Tensors) -> Tensors:
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    with sdpa_kernel(DENSE, set_priority=True):
        o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return {"o": o.transpose(1, 2)}
