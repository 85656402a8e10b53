"""dsa_attention on CUDA: shapes of the Hopper kernels and of split selections, streams, graphs, large offsets."""

import pytest
import torch
from test_dsa_attention import (
    BF16,
    FP16,
    FP32,
    SHAPES,
    any_indices,
    check_against_oracle,
    inputs,
    on,
    with_gradients,
)

from lt2_ext.ops import dsa_attention
from lt2_ext.testing import check_close

pytestmark = pytest.mark.cuda
halves = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
# B, T, S, HQ, H, D, DV, topk
MASKED = [
    (1, 64, 64, 1, 1, 64, 64, 16),
    (1, 128, 128, 2, 1, 128, 128, 40),
    (2, 200, 333, 4, 2, 64, 64, 50),
    (2, 257, 130, 4, 1, 128, 128, 77),
    (1, 513, 900, 3, 3, 64, 64, 900),
    (1, 640, 640, 8, 2, 128, 128, 64),
    (3, 70, 700, 2, 2, 128, 128, 12),
]
# Selections so sparse that the keys of neighbouring queries are gathered together.
GATHERED = [
    (1, 64, 1000, 1, 1, 64, 64, 20),
    (2, 130, 2000, 8, 2, 128, 128, 40),
    (1, 300, 2500, 4, 4, 64, 64, 30),
    (2, 70, 3000, 16, 1, 128, 128, 60),
    (1, 90, 3000, 64, 1, 64, 64, 7),
    (1, 200, 700, 6, 2, 128, 128, 12),
]


@halves
@pytest.mark.parametrize("shape", MASKED + GATHERED, ids=str)
def test_masked_tiles_against_the_oracle(shape, dtype):
    B, T, S, HQ, H, D, DV, topk = shape
    check_against_oracle(inputs(B, T, S, HQ, H, D, DV, dtype), any_indices(B, T, S, topk), "cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float16(shape):
    B, T, S, HQ, H, D, DV, topk = shape
    check_against_oracle(inputs(B, T, S, HQ, H, D, DV, FP16), any_indices(B, T, S, topk), "cuda")


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 8), (8, 256), (192, 136)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (10, 1), (40, 2)], ids=str)
def test_few_queries_with_long_selections(heads, dims, dtype):
    x = inputs(2, 2, 1500, *heads, *dims, dtype)
    check_against_oracle(x, any_indices(2, 2, 1500, 1100), "cuda", q_offset=torch.tensor([1490, 800]))


@halves
def test_long_selections_overlap_by_tiles(dtype):
    """Whole tiles without any selected key, and queries whose keys are all in the last tile."""
    indices = torch.full((1, 700, 20), -1, dtype=torch.int32)
    rows = torch.arange(700)[:, None]
    indices[0] = rows - torch.arange(20)
    indices[0, 300:400] = torch.arange(20)
    indices[0, 500:] = -1
    check_against_oracle(inputs(1, 700, 700, 2, 1, 64, 64, dtype), indices, "cuda")


@halves
def test_masked_documents(dtype):
    cu = torch.tensor([3, 3, 150, 151, 400, 400, 590])
    cu_k = torch.tensor([1, 7, 107, 140, 380, 385, 695])
    x, indices = inputs(1, 600, 700, 4, 2, 64, 64, dtype), any_indices(1, 600, 200, 60)
    for q_offset in (None, torch.tensor([0, 3, 30, 2, -1, 60])):
        check_against_oracle(x, indices, "cuda", cu_seqlens=cu, cu_seqlens_k=cu_k, q_offset=q_offset)
        check_against_oracle(x, indices[..., :9], "cuda", cu_seqlens=cu, cu_seqlens_k=cu_k, q_offset=q_offset)


@halves
def test_a_key_that_is_named_twice_in_a_masked_tile(dtype):
    x, indices = inputs(2, 150, 200, 4, 2, 64, 64, dtype), any_indices(2, 150, 200, 40)
    indices[1, 140, 30] = indices[1, 140, 7] = 5
    check_against_oracle(x, indices, "cuda")
    check_against_oracle(x, torch.randint(0, 30, (2, 150, 40), dtype=torch.int32), "cuda")
    x, indices = inputs(1, 150, 900, 4, 2, 64, 64, dtype), any_indices(1, 150, 900, 20)
    indices[0, 140, 13] = indices[0, 140, 7] = 5
    check_against_oracle(x, indices, "cuda")


def test_a_scale_that_is_not_positive():
    x, indices = inputs(1, 130, 130, 2, 1, 64, 64, BF16), any_indices(1, 130, 130, 40)
    for scale in (-0.3, 0.0):
        check_against_oracle(x, indices, "cuda", scale=scale)


@halves
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("topk", [40, 5])
def test_keys_reach_only_the_queries_that_select_them(topk, poison, dtype):
    x, indices = inputs(1, 200, 200, 4, 2, 64, 64, dtype), any_indices(1, 200, 200, topk)
    key = 90
    for query in (110, 150):
        if not bool((indices[0, query] == key).any()):
            indices[0, query, 0] = key
    cotangents = on("cuda", {"o": torch.randn(1, 200, 4, 64).to(dtype), "lse": torch.randn(1, 200, 4)})
    clean = with_gradients(dsa_attention, on("cuda", x), indices.cuda(), cotangents)
    for tensor in (x["k"], x["v"]):
        tensor[:, key] = poison
    dirty = with_gradients(dsa_attention, on("cuda", x), indices.cuda(), cotangents)
    others = ((indices != key) | (torch.arange(200)[:, None] < key)).all(-1)[0].cuda()
    assert 0 < int(others.sum()) < 200
    for name in ("o", "lse", "dq"):
        got, want = (r[name][:, others].masked_fill(~r[name][:, others].isfinite(), 0) for r in (dirty, clean))
        check_close(name, got, want.double(), dtype=dtype)
        assert torch.equal(dirty[name][:, others].isfinite(), clean[name][:, others].isfinite())
    assert not bool(dirty["o"][:, ~others].isfinite().any(-1).all())


def against_float32(x, indices):
    """The kernels for float32 gather for each query alone; others check them against the oracle."""
    dtype, shape = x["q"].dtype, x["q"].shape
    cotangents = on("cuda", {"o": torch.randn(shape).to(dtype), "lse": torch.randn(shape[:3])})
    single = {n: t.float() for n, t in x.items()}
    want = with_gradients(dsa_attention, single, indices, cotangents | {"o": cotangents["o"].float()})
    for name, got in with_gradients(dsa_attention, x, indices, cotangents).items():
        check_close(name, got, want[name].double(), kind="grad" if name.startswith("d") else "out", dtype=dtype)


@halves
@pytest.mark.parametrize("topk", [90, 40], ids=["masks", "unions"])
def test_neighbours_that_select_many_keys_together(topk, dtype):
    """Gradients are computed by tiles of all keys where they are not too many for the selection."""
    against_float32(on("cuda", inputs(1, 300, 3000, 2, 2, 128, 128, dtype)), any_indices(1, 300, 3000, topk).cuda())


@pytest.mark.parametrize("T, HQ, H, D", [(32768, 16, 16, 128), (32768, 16, 4, 128), (16384, 64, 1, 64)])
def test_gradients_of_keys_in_bands(T, HQ, H, D):
    """There is not room for all shares of the keys' gradients at once; the first keys are in every tile."""
    rows = torch.arange(T)[:, None]
    others = torch.randint(0, T, (T, 28))
    indices = torch.cat([rows - torch.arange(92), torch.arange(8).expand(T, 8), others], 1)
    indices[:, 100:].masked_fill_(others > rows - 92, -1)
    indices[:, 92:100].masked_fill_(rows < 100, -1)
    indices = indices.int().sort(-1).values
    indices[:, 1:].masked_fill_(indices[:, 1:] == indices[:, :-1], -1)
    against_float32(on("cuda", inputs(1, T, T, HQ, H, D, D, BF16)), indices[None].cuda())


@halves
@pytest.mark.parametrize("topk", [128, 16])
def test_the_same_bits_every_time(topk, dtype):
    x, indices = on("cuda", inputs(2, 700, 700, 8, 2, 128, 128, dtype)), any_indices(2, 700, 700, topk).cuda()
    cotangents = on("cuda", {"o": torch.randn(2, 700, 8, 128).to(dtype), "lse": torch.randn(2, 700, 8)})
    first = with_gradients(dsa_attention, x, indices, cotangents)
    for _ in range(3):
        again = with_gradients(dsa_attention, x, indices, cotangents)
        assert all(torch.equal(again[n], t) for n, t in first.items())
    x = {n: t.float() for n, t in x.items()}
    cotangents = {n: t.float() for n, t in cotangents.items()}
    first = with_gradients(dsa_attention, x, indices, cotangents)
    again = with_gradients(dsa_attention, x, indices, cotangents)
    assert all(torch.equal(again[n], t) for n, t in first.items())


@pytest.mark.parametrize("T, topk", [(1, 300), (200, 300), (200, 30)])
def test_replays_of_a_cuda_graph(T, topk):
    x = on("cuda", inputs(2, T, 1200, 4, 2, 64, 64, BF16))
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    indices = any_indices(2, T, 1200, topk).cuda()
    grad = torch.randn(2, T, 4, 64, device="cuda").to(BF16)

    def step():
        o = dsa_attention(**leaves, indices=indices)
        return o, *torch.autograd.grad(o, list(leaves.values()), grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for duplicate in (False, True, False):
        indices.copy_(any_indices(2, T, 1200, topk))
        if duplicate:
            indices[1, :, 7] = indices[1, :, 9] = 2
        for t in leaves.values():
            t.data.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_runs_on_the_current_stream():
    x, indices = on("cuda", inputs(1, 300, 300, 4, 2, 64, 64, BF16)), any_indices(1, 300, 300, 80).cuda()
    want = dsa_attention(**x, indices=indices)
    side = torch.cuda.Stream()
    late = {n: torch.zeros_like(t) for n, t in x.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for n, t in late.items():
            t.copy_(x[n])
        got = dsa_attention(**late, indices=indices)
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("T", [2, 100])
def test_offsets_beyond_32_bits(T):
    stride = 2**31 + 64
    pool = torch.zeros(stride + 300 * 128, dtype=BF16, device="cuda")
    x = on("cuda", inputs(2, T, 300, 2, 2, 64, 64, BF16))
    indices = any_indices(2, T, 300, 60).cuda()
    want = dsa_attention(**x, indices=indices)
    far = pool.as_strided((2, 300, 2, 64), (stride, 128, 64, 1))
    for n in "kv":
        far.copy_(x[n])
        assert torch.equal(dsa_attention(**x | {n: far}, indices=indices), want)


def test_wrong_offsets_are_memory_safe():
    x, indices = on("cuda", inputs(1, 100, 100, 2, 1, 64, 64, BF16)), any_indices(1, 100, 100, 30).cuda()
    leaves = {n: t.requires_grad_() for n, t in x.items()}
    for offsets in ([-5, 50, 400], [90, 20, 100], [2**40, -(2**40), 7]):
        cu = torch.tensor(offsets, device="cuda")
        o = dsa_attention(**leaves, indices=indices, cu_seqlens=cu, q_offset=torch.tensor([2**60, -(2**60)]).cuda())
        o.sum().backward()
        torch.cuda.synchronize()


def test_unsupported_sizes_are_named():
    x = on("cuda", inputs(1, 4, 4, 2, 1, 264, 8))
    with pytest.raises(RuntimeError, match="dsa_attention: the CUDA kernels take D and DV up to 256"):
        dsa_attention(**x, indices=torch.zeros(1, 4, 3, dtype=torch.int32).cuda())
