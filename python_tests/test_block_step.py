"""The step of a block in one operator gives the bits of the operators that it is made of."""

import pytest
import torch

from lt2_ext import ops

FP32, BF16 = torch.float32, torch.bfloat16
HIDDEN, WIDE = 64, 96


@pytest.fixture(params=[FP32, BF16], ids=["fp32", "bf16"])
def randn(request, device):
    if request.param == FP32 and device == "cuda":
        pytest.skip("linear_step has no float32 kernel for CUDA")

    def randn(*shape, dtype=request.param):
        return (torch.randn(*shape, device=device) * 0.3).to(dtype)

    return randn


def block(randn, mixed, *projected):
    rest = randn(HIDDEN, mixed), randn(HIDDEN), randn(WIDE, HIDDEN), randn(WIDE, HIDDEN), randn(HIDDEN, WIDE)
    return randn(HIDDEN), [randn(n, HIDDEN) for n in projected], list(rest)


@pytest.mark.parametrize("slots", [None, [2, 0]])
def test_gated_delta_net(randn, slots, device):
    B, t, H, HV, K, V, W = 2, 3, 2, 4, 16, 24, 4
    D, slots = 2 * H * K + HV * V, None if slots is None else torch.tensor(slots, device=device)
    h, (norm, first, rest) = randn(B, t, HIDDEN), block(randn, HV * V, D, HV * V, HV, HV)
    pools = randn(3, HV, K, V, dtype=FP32)[: 3 if slots is not None else B], randn(3, D, W)
    pools = pools[0], pools[1][: len(pools[0])]
    small = [randn(*s, dtype=FP32) for s in ((D, W), (HV,), (HV,), (V,))]
    theirs = [p.clone() for p in pools]
    out = ops.gdn_block_step_(h, *pools, norm, first, small, rest, slots=slots, eps=1e-5)
    qkv, z, a, b = ops.linear_step(h, first, norm_weight=norm, eps=1e-5)
    o = ops.gdn_decode_fused_(*theirs, qkv, z.view(B, t, HV, V), a, b, *small, slots=slots, eps=1e-5)
    assert torch.equal(out, ops.mlp_step(o.flatten(-2), h, rest, eps=1e-5))
    assert all(torch.equal(p, q) for p, q in zip(pools, theirs, strict=True))


@pytest.mark.cuda
def test_a_chain_in_a_graph():
    """Blocks that share a state, and slots that are written right before each, with launches that overlap."""

    def randn(*shape, dtype=BF16):
        return (torch.randn(*shape, device="cuda") * 0.3).to(dtype)

    B, H, K, V, W = 2, 2, 96, 192, 4
    D, slots = 2 * H * K + H * V, torch.zeros(B, dtype=torch.int64, device="cuda")
    small = [randn(*s, dtype=FP32) for s in ((D, W), (H,), (H,), (V,))]
    layers = [(block(randn, H * V, D, H * V, H, H), torch.tensor([i % 3, (i + 1) % 3]).cuda()) for i in range(12)]
    pools = randn(3, H, K, V, dtype=FP32), randn(3, D, W)
    h, start = randn(B, 1, HIDDEN), [p.clone() for p in pools]

    def run(after=lambda: None):
        out = h
        for pool, first in zip(pools, start, strict=True):
            pool.copy_(first)
        for (norm, first, rest), where in layers:
            slots.copy_(where)
            after()
            out = ops.gdn_block_step_(out, *pools, norm, first, small, rest, slots=slots, eps=1e-5)
            after()
        return out

    expected = run(torch.cuda.synchronize), *(p.clone() for p in pools)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(50):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip((out, *pools), expected, strict=True))


@pytest.mark.parametrize("slots", [None, [2, 0]])
def test_attention(randn, slots, device):
    B, t, HQ, H, D, S = 2, 2, 4, 2, 16, 40
    slots = None if slots is None else torch.tensor(slots, device=device)
    h, (norm, first, rest) = randn(B, t, HIDDEN), block(randn, HQ * D, HQ * D, H * D, H * D)
    caches = [randn(3 if slots is not None else B, S, H, D) for _ in "kv"]
    angles = [randn(B, t, D // 2, dtype=FP32) for _ in ("cos", "sin")]
    places, lengths = torch.tensor([[4, 5], [38, 39]], device=device), torch.tensor([6, 40], device=device)
    theirs = [c.clone() for c in caches]
    out = ops.attention_block_step_(h, *caches, norm, first, [*angles, places, lengths], rest, slots=slots, eps=1e-5)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in ops.linear_step(h, first, norm_weight=norm, eps=1e-5))
    q = ops.rope_cache_(*theirs, q, k, v, *angles, places, slots=slots)
    o = ops.loop_decode_attention(q, *theirs, lengths, slots=slots)
    assert torch.equal(out, ops.mlp_step(o.flatten(-2), h, rest, eps=1e-5))
    assert all(torch.equal(p, q) for p, q in zip(caches, theirs, strict=True))


@pytest.mark.parametrize("slots", [None, [4, 0, 2], [4, -1, 2]])
@pytest.mark.parametrize("t, S, topk", [(1, 40, 48), (1, 300, 7), (1, 9000, 600), (2, 300, 20)])
@pytest.mark.parametrize("HI, DI", [(3, 16), (4, 64), (16, 64), (16, 128)])
def test_attention_to_what_an_index_selects(randn, HI, DI, t, S, topk, slots, device):
    B, HQ, H, D = 3, 4, 2, 64
    slots = None if slots is None else torch.tensor(slots, device=device)
    sizes = HQ * D, H * D, H * D, HI * DI, DI, HI
    h, (norm, first, rest) = randn(B, t, HIDDEN), block(randn, HQ * D, *sizes)
    caches = [randn(5 if slots is not None else B, S, *shape) for shape in ((H, D), (H, D), (DI,))]
    angles = [[randn(B, t, n // 2, dtype=FP32) for _ in ("cos", "sin")] for n in (D, DI)]
    offsets = torch.tensor([2, S // 2, S - t], device=device)
    places, lengths = offsets[:, None] + torch.arange(t, device=device), offsets + t
    theirs = [c.clone() for c in caches]
    index, options = [caches[2], *angles[1], offsets], {"slots": slots, "eps": 1e-5}
    where, scale = [*angles[0], places, lengths], {"topk": topk, "index_scale": DI**-0.5}
    out = ops.attention_block_step_(h, *caches[:2], norm, first, where, rest, index=index, **scale, **options)
    *x, weights = ops.linear_step(h, first, norm_weight=norm, eps=1e-5, floats=1)
    q, k, v, q_idx, k_idx = (y.unflatten(-1, (-1, n)) for y, n in zip(x, (D, D, D, DI, DI), strict=True))
    keys = theirs[2][:, :, None]
    q_idx = ops.rope_cache_(keys, keys[..., :0], q_idx, k_idx, k_idx[..., :0], *angles[1], places, slots=slots)
    q = ops.rope_cache_(*theirs[:2], q, k, v, *angles[0], places, slots=slots)
    past = theirs[2] if slots is None else theirs[2][slots]
    indices = ops.lightning_indexer(q_idx, past, weights, topk=topk, scale=DI**-0.5, q_offset=offsets)
    o = ops.loop_decode_attention(q, *theirs[:2], lengths, slots=slots, indices=indices)
    assert torch.equal(out, ops.mlp_step(o.flatten(-2), h, rest, eps=1e-5))
    assert all(torch.equal(p, q) for p, q in zip(caches, theirs, strict=True))


@pytest.mark.cuda
def test_sparse_blocks_in_a_graph():
    """Tokens one after the other, through three layers, with launches that overlap: as with launches that wait."""

    def randn(*shape, dtype=BF16):
        return (torch.randn(*shape, device="cuda") * 0.3).to(dtype)

    B, H, D, HI, DI, S, topk = 2, 4, 128, 16, 64, 5000, 500
    sizes = [H * D] * 3 + [HI * DI, DI, HI]
    layers = [(block(randn, H * D, *sizes), [randn(B, S, *n) for n in ((H, D), (H, D), (DI,))]) for _ in range(3)]
    start = [[c.clone() for c in caches] for _, caches in layers]
    angles = [randn(B, 1, n // 2, dtype=FP32) for n in (D, D, DI, DI)]
    h, first = randn(B, 1, HIDDEN), torch.tensor([4097, 2040], device="cuda")

    def run(after=lambda: None):
        out = h
        for (_, caches), old in zip(layers, start, strict=True):
            for cache, c in zip(caches, old, strict=True):
                cache.copy_(c)
        for token in range(6):
            offsets = first + token
            where, at = [*angles[:2], offsets[:, None].contiguous(), offsets + 1], [*angles[2:], offsets]
            after()
            for (norm, projections, rest), (k, v, index) in layers:
                options = {"index": [index, *at], "topk": topk, "index_scale": 0.03}
                out = ops.attention_block_step_(out, k, v, norm, projections, where, rest, **options)
                after()
        return out

    expected = run(torch.cuda.synchronize), *(c.clone() for _, caches in layers for c in caches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(30):
        graph.replay()
        ours = out, *(c for _, caches in layers for c in caches)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_inputs_that_require_a_gradient(randn):
    h, (norm, first, rest) = randn(1, 1, HIDDEN).requires_grad_(), block(randn, 64, 64, 64, 64)
    cache, angle, one = randn(1, 4, 4, 16), randn(1, 1, 8, dtype=FP32), torch.ones(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="attention_block_step_: inference only"):
        ops.attention_block_step_(h, cache, cache, norm, first, [angle, angle, one, one[0]], rest)
