"""The same selections and outputs as others: DeepSeek-V3.2 in transformers, sparse attention as fla has it."""

import pytest
import torch
from torch import Tensor

from lt2_ext.ops import dsa_attention, lightning_indexer
from lt2_ext.testing import check_close


@pytest.mark.parametrize("heads, dim, rope, topk", [(4, 16, 8, 7), (1, 8, 8, 3), (16, 64, 32, 20), (3, 24, 8, 60)])
def test_the_indexer_of_deepseek_v32(heads, dim, rope, topk):
    module = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    config = pytest.importorskip("transformers.models.deepseek_v32").DeepseekV32Config(
        hidden_size=32, q_lora_rank=24, index_n_heads=heads, index_head_dim=dim, qk_rope_head_dim=rope, index_topk=topk
    )
    theirs, T = module.DeepseekV32Indexer(config, layer_idx=0), 50
    torch.nn.init.normal_(theirs.k_norm.weight)
    x, q_latent = torch.randn(2, T, 32), torch.randn(2, T, 24)
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, rope, 2) / rope)
    cos, sin = (f(torch.cat([angles, angles], -1))[None] for f in (torch.cos, torch.sin))
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    want = theirs(x, q_latent, (cos, sin), visible[None], None)

    def rotated(y: Tensor) -> Tensor:  # [B, T, H, D], the first `rope` of D
        front, back = module.apply_rotary_pos_emb(y[..., :rope], y[..., :rope], cos, sin, 2)[0], y[..., rope:]
        return torch.cat([front, back], -1)

    q = rotated(theirs.wq_b(q_latent).unflatten(-1, (heads, dim)))
    k = rotated(theirs.k_norm(theirs.wk(x))[:, :, None])[:, :, 0]
    weights = theirs.weights_proj(x) * heads**-0.5
    got = lightning_indexer(q, k, weights, topk=topk)
    dots = torch.einsum("bthd,bsd->bths", q.double(), k.double()).relu() * dim**-0.5
    scores = (dots * weights[..., None]).sum(2)
    for b in range(2):
        for t in range(T):
            theirs_now = [s for s in want[b, t].tolist() if s <= t]  # of fewer visible keys, it names masked ones, too
            ours_now = [s for s in got[b, t].tolist() if s >= 0]
            assert len(set(ours_now)) == len(set(theirs_now)) == min(topk, t + 1)
            # Of equal scores, and relu makes many zeros, each may choose its own.
            ours_scores, theirs_scores = (sorted(scores[b, t, s].item() for s in c) for c in (ours_now, theirs_now))
            assert ours_scores == pytest.approx(theirs_scores, rel=1e-5, abs=1e-6)


def naive(
    q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, w_idx: Tensor | None, topk: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """All scores and all logits in memory, one sequence and one head after the other; o and indices padded with -1."""
    B, T, HQ, D = q.shape
    o, indices = torch.zeros(B, T, HQ, v.shape[-1], dtype=q.dtype), torch.full((B, T, topk), -1)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for b in range(B):
        scores = torch.zeros(T, T, dtype=q_idx.dtype)
        for j in range(q_idx.shape[2]):
            dots = q_idx[b, :, j] @ k_idx[b].T
            scores = scores + (dots.clamp(min=0) if relu else dots) * (1 if w_idx is None else w_idx[b, :, j, None])
        best = scores.masked_fill(future, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :topk]
        unseen = torch.ones(T, T, dtype=torch.bool).scatter(1, best, False) | future
        for t in range(T):
            row = (~unseen[t]).nonzero()[:, 0]
            indices[b, t, : len(row)] = row
        for h in range(HQ):
            logits = q[b, :, h] @ k[b, :, h // (HQ // k.shape[2])].T * D**-0.5
            o[b, :, h] = logits.masked_fill(unseen, -torch.inf).softmax(-1) @ v[b, :, h // (HQ // k.shape[2])]
    return o, indices


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("HQ, H", [(4, 4), (6, 2), (4, 1)])
def test_sparse_attention_as_fla_has_it(HQ, H, weighted, relu):
    B, T, HI, topk = 2, 45, 3, 8
    leaves = [torch.randn(B, T, n, d).requires_grad_() for n, d in ((HQ, 16), (H, 16), (H, 24))]
    index = torch.randn(B, T, HI, 8), torch.randn(B, T, 8), torch.randn(B, T, HI) if weighted else None
    indices = lightning_indexer(*index, topk=topk, activation="relu" if relu else None)
    o = dsa_attention(*leaves, indices)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want, selected = naive(*exact, *(None if t is None else t.double() for t in index), topk, relu)
    assert torch.equal(indices.long(), selected)
    check_close("o", o, want)
    cotangent = torch.randn_like(o)
    grads, exact_grads = torch.autograd.grad(o, leaves, cotangent), torch.autograd.grad(want, exact, cotangent.double())
    for name, got, ref in zip(("dq", "dk", "dv"), grads, exact_grads, strict=True):
        check_close(name, got, ref, kind="grad")
