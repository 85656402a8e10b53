"""The two-level lightning_indexer on CUDA: the shapes of its kernels, rows in memory, graphs, memory, bad offsets."""

import pytest
import torch
from test_dsa_indexer import BF16, FP32, Indexer, check_close, check_exact, integers, normals

from lt2_ext import ops

FP16 = torch.float16
pytestmark = pytest.mark.cuda


@pytest.fixture
def indexer():
    return Indexer("cuda", pool=64, oversample=2)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("DI", [8, 64, 72, 128])
@pytest.mark.parametrize("HI", [1, 2, 5, 8, 9, 16, 17])
def test_heads(indexer, HI, DI, dtype):
    x = integers(1, 150, 700, HI, DI, dtype)
    for topk in (3, 40, 200):
        check_exact(indexer, x, topk=topk)
    check_exact(indexer, x, topk=40, activation=None)
    check_close(indexer, normals(1, 150, 700, HI, DI, dtype), topk=64, blocks_within=1e-5 if dtype == FP32 else 2**-7)


@pytest.mark.parametrize("pool", [32, 64, 96, 128, 1024])
@pytest.mark.parametrize("topk", [1, 64, 256, 700, 2048, 9000])
def test_widths(topk, pool):
    """9000: the scores of a query do not fit into shared memory."""
    for oversample in (1, 4):
        indexer = Indexer("cuda", pool=pool, oversample=oversample)
        if pool != 96:
            check_exact(indexer, integers(1, 20, 20000, 4, 64, BF16), topk=topk)
        check_close(indexer, normals(1, 30, 6000, 4, 64, FP32), topk=topk)


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_decode(indexer, T, dtype):
    x = integers(5, T, 3001, 8, 64, dtype)
    check_exact(indexer, x, topk=300, q_offset=torch.tensor([3000 - T, 0, 77, 2047, 1000]))


def test_infinities_and_nan(indexer):
    x = integers(1, 600, 600, 3, 64, BF16)
    x["k_idx"][0, ::97, 5] = torch.inf
    x["k_idx"][0, ::211, 9] = torch.nan
    x["w_idx"] = x["w_idx"].float()
    for activation in ("relu", None):
        check_exact(indexer, x, topk=50, activation=activation)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents(indexer, dtype):
    cu = torch.tensor([2, 2, 35, 36, 100, 100, 900], dtype=dtype)
    cu_k = torch.tensor([0, 7, 7, 390, 470, 490, 1500], dtype=dtype)
    for HI in (3, 8):
        x = integers(1, 905, 1507, HI, 64, BF16)
        for q_offset in (None, torch.tensor([0, 3, 380, 2, -1, 900])):
            check_exact(indexer, x, topk=65, cu_seqlens=cu, cu_seqlens_k=cu_k, q_offset=q_offset)


def test_rows_that_are_not_aligned(indexer):
    for dtype in (FP32, BF16):
        x = {n: t.cuda() for n, t in integers(1, 100, 600, 4, 64, dtype).items()}
        odd = torch.zeros(1, 600, 65, dtype=dtype, device="cuda")[..., 1:].copy_(x["k_idx"])
        assert torch.equal(indexer(**x, topk=50), indexer(**x | {"k_idx": odd}, topk=50))


def test_long_and_short_calls_select_the_same(indexer):
    x = {n: t.cuda() for n, t in normals(1, 4200, 4200, 8, 64, BF16).items()}
    whole = indexer(**x, topk=512)
    for begin, end in ((0, 1), (1, 50), (4000, 4001), (4001, 4009), (2000, 4200)):
        piece = {"q_idx": x["q_idx"][:, begin:end], "k_idx": x["k_idx"][:, :end], "w_idx": x["w_idx"][:, begin:end]}
        assert torch.equal(whole[:, begin:end], indexer(**piece, topk=512))


@pytest.mark.parametrize("T, dtype", [(1, BF16), (3000, BF16), (300, FP32)])
def test_cuda_graph(T, dtype):
    x, y = ({n: t.cuda() for n, t in normals(2, T, 3000, 4, 64, dtype).items()} for _ in range(2))
    offset = torch.tensor([3000 - T, 2000 - T], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.lightning_indexer(**x, topk=100, q_offset=offset, pool=64)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = ops.lightning_indexer(**x, topk=100, q_offset=offset, pool=64)
    torch.cuda.current_stream().wait_stream(stream)
    for n in x:
        x[n].copy_(y[n])
    offset.sub_(500)
    graph.replay()
    assert torch.equal(out, ops.lightning_indexer(**y, topk=100, q_offset=offset, pool=64))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_memory_does_not_grow_with_the_square(dtype):
    x = {n: t.cuda() for n, t in normals(1, 60000, 60000, 1, 64, dtype).items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ops.lightning_indexer(**x, topk=64, pool=64)
    assert torch.cuda.max_memory_allocated() - before < out.numel() * 4 + (8 << 20)
    assert bool((out[0, 59000:, 1:] > out[0, 59000:, :-1]).all())


@pytest.mark.parametrize("offsets", [[0, 5], [0, 3, 2], [-9, 4], [2**31 - 1, -(2**31)], [3, 1, 4, 0]])
@pytest.mark.parametrize("T", [4, 600])
def test_offsets_outside_of_the_tokens_are_memory_safe(indexer, offsets, T):
    x = normals(1, T, T, 2, 64, BF16)
    cu = torch.tensor(offsets)
    out = indexer(**x, topk=7, cu_seqlens=cu, q_offset=torch.full_like(cu[1:], 2**62))
    assert bool(((out >= -1) & (out < T)).all())


def test_queries_too_large_for_shared_memory_are_refused(indexer):
    with pytest.raises(RuntimeError, match=r"lightning_indexer: HI \* \(DI \+ 1\) must be at most 8188 with a pool"):
        indexer(**normals(1, 4, 4, 64, 128), topk=3)
