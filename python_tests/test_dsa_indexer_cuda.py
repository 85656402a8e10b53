"""lightning_indexer on CUDA: the shapes of its kernels, graphs, streams, memory, offsets that nobody checked."""

import pytest
import torch
from test_dsa_indexer import BF16, FP32, Indexer, check_close, check_exact, integers, normals

from lt2_ext import ops

FP16 = torch.float16
pytestmark = pytest.mark.cuda


@pytest.fixture
def indexer():
    return Indexer("cuda")


def on_cuda(x):
    return {n: t.cuda() for n, t in x.items()}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("DI", [64, 128])
@pytest.mark.parametrize("HI", [1, 2, 3, 4, 5, 7, 8, 11, 16, 17])
def test_heads(indexer, HI, DI, dtype):
    x = integers(1, 150, 150, HI, DI, dtype)
    for topk in (3, 40, 200):
        check_exact(indexer, x, topk=topk)
    check_exact(indexer, x, topk=40, activation=None)
    check_close(indexer, normals(1, 150, 300, HI, DI, dtype), topk=64)


@pytest.mark.parametrize("topk", [1, 64, 256, 512, 700, 1024, 2048, 5000])
@pytest.mark.parametrize("HI", [1, 4, 8, 16])
def test_widths(indexer, HI, topk):
    check_exact(indexer, integers(1, 200, 6000, HI, 64, BF16), topk=topk)
    check_exact(indexer, integers(1, 2100, 2100, HI, 64, BF16), topk=topk)


@pytest.mark.parametrize("T", [1, 2, 5, 8, 9, 33, 64])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_decode(indexer, T, dtype):
    x = integers(5, T, 3001, 8, 64, dtype)
    check_exact(indexer, x, topk=300, q_offset=torch.tensor([3000 - T, 0, 77, 2047, 1000]))


@pytest.mark.parametrize("S, topk", [(700, 64), (40000, 1), (40000, 2048), (40000, 45000)])
@pytest.mark.parametrize("HI, DI", [(1, 128), (5, 64), (16, 64)])
def test_a_step_over_many_keys(indexer, HI, DI, S, topk):
    check_exact(indexer, integers(2, 1, S, HI, DI, BF16), topk=topk, q_offset=torch.tensor([S - 1, S // 3]))
    check_close(indexer, normals(1, 2, S, HI, DI, BF16), topk=topk)


@pytest.mark.parametrize("T", [1, 130, 2200])
@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "sawtooth", "steep", "narrow", "infinite"])
def test_orders_of_scores(indexer, order, T):
    """Each key better than all before it; the best first; all alike; far better at the end; all about the same."""
    S = 6000
    rank = torch.arange(S)
    steep = rank // 8 + 300 * (rank - 5200).clamp(min=0)
    orders = {"ascending": rank, "descending": -rank, "equal": 0 * rank, "steep": steep, "narrow": rank * 31 % 499}
    rank = orders.get(order, rank % 97)
    q = torch.zeros(1, T, 1, 64)
    q[..., :4] = 1
    k = torch.zeros(1, S, 64)
    k[0, :, 0], k[0, :, 1], k[0, :, 2] = rank // 4096 * 4096, rank % 4096 // 64 * 64, rank % 64
    if order == "narrow":
        k[..., 3] = 2**21
    if order == "infinite":
        k[0, ::7, 3], k[0, ::5, 3] = torch.inf, -torch.inf
    for topk in (1, 100, 512, 2048):
        check_exact(indexer, {"q_idx": q.to(BF16), "k_idx": k.to(BF16)}, topk=topk, activation=None, scale=1.0)


@pytest.mark.parametrize("topk, best", [(100, 75), (300, 200)])
def test_a_sample_that_misleads(indexer, topk, best):
    """The best keys are where the sample is taken, but fewer than are wanted."""
    x = integers(1, 2200, 6000, 1, 64, BF16)
    x["q_idx"][..., 0], x["k_idx"][..., 0], x["w_idx"] = 64, 0, x["w_idx"].abs() + 1
    x["k_idx"][0, : 16 * best : 16, 0] = 64
    check_exact(indexer, x, topk=topk)


def test_infinities_and_nan(indexer):
    x = integers(1, 300, 300, 3, 64, BF16)
    x["k_idx"][0, ::7, 5] = torch.inf
    x["k_idx"][0, ::11, 9] = torch.nan
    x["w_idx"] = x["w_idx"].float()
    for activation in ("relu", None):
        check_exact(indexer, x, topk=50, activation=activation)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents(indexer, dtype):
    cu = torch.tensor([2, 2, 35, 36, 100, 100, 900], dtype=dtype)
    cu_k = torch.tensor([0, 7, 7, 90, 170, 190, 1500], dtype=dtype)
    for HI in (3, 8):
        x = integers(1, 905, 1507, HI, 64, BF16)
        for q_offset in (None, torch.tensor([0, 3, 80, 2, -1, 900])):
            check_exact(indexer, x, topk=65, cu_seqlens=cu, cu_seqlens_k=cu_k, q_offset=q_offset)


def test_long_and_short_calls_select_the_same():
    x = on_cuda(normals(1, 4200, 4200, 8, 64, BF16))
    whole = ops.lightning_indexer(**x, topk=512)
    for begin, end in ((0, 1), (1, 50), (3, 7), (2999, 3000), (4000, 4001), (4001, 4009), (2000, 4200)):
        piece = {"q_idx": x["q_idx"][:, begin:end], "k_idx": x["k_idx"][:, :end], "w_idx": x["w_idx"][:, begin:end]}
        assert torch.equal(whole[:, begin:end], ops.lightning_indexer(**piece, topk=512))


@pytest.mark.parametrize("T, dtype", [(1, BF16), (3000, BF16), (1, FP32), (300, FP32)])
def test_cuda_graph(T, dtype):
    x, y = on_cuda(normals(2, T, 3000, 4, 64, dtype)), on_cuda(normals(2, T, 3000, 4, 64, dtype))
    offset = torch.tensor([3000 - T, 2000 - T], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.lightning_indexer(**x, topk=100, q_offset=offset)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = ops.lightning_indexer(**x, topk=100, q_offset=offset)
    torch.cuda.current_stream().wait_stream(stream)
    for n in x:
        x[n].copy_(y[n])
    offset.sub_(500)
    graph.replay()
    assert torch.equal(out, ops.lightning_indexer(**y, topk=100, q_offset=offset))


def test_current_stream():
    x = on_cuda(normals(1, 2000, 2000, 8, 64, BF16))
    want = ops.lightning_indexer(**x, topk=128)
    y = {n: torch.zeros_like(t) for n, t in x.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for n in x:
            y[n].copy_(x[n])
        out = ops.lightning_indexer(**y, topk=128)
    stream.synchronize()
    assert torch.equal(out, want)


@pytest.mark.parametrize("HI, topk, T", [(8, 64, 3000), (4, 500, 2200), (16, 64, 1100), (8, 64, 1)])
def test_the_same_every_time_beside_other_work(HI, topk, T):
    x = on_cuda(normals(1, T, max(T, 3000), HI, 64, BF16))
    first = ops.lightning_indexer(**x, topk=topk)
    noise, side = torch.zeros(2, 8 << 20, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # whose first selection may still use what is noise now
    for _ in range(250):
        with torch.cuda.stream(side):
            noise[0].copy_(noise[1])
        assert torch.equal(ops.lightning_indexer(**x, topk=topk), first)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_memory_does_not_grow_with_the_square(dtype):
    """60000 x 60000 scores are 14 GB."""
    x = on_cuda(normals(1, 60000, 60000, 1, 64, dtype))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ops.lightning_indexer(**x, topk=64)
    assert torch.cuda.max_memory_allocated() - before < out.numel() * 4 + (512 << 20)
    assert bool((out[0, 59000:, 1:] > out[0, 59000:, :-1]).all())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_more_than_2_31_elements(dtype):
    """The last batch row lies beyond 2^31 elements, as do its indices."""
    B, S, topk = 2200, 16384, 2048
    k = torch.zeros(B, S, 64, dtype=dtype, device="cuda")
    last = normals(1, 530, S, 2, 64, dtype)
    k[-1] = last["k_idx"][0].cuda()
    q = torch.zeros(B, 530, 2, 64, dtype=dtype, device="cuda")
    q[-1] = last["q_idx"][0].cuda()
    out = ops.lightning_indexer(q, k, topk=topk)
    alone = ops.lightning_indexer(q[-1:].clone(), k[-1:].clone(), topk=topk)
    assert out.numel() > 2**31
    assert torch.equal(out[-1], alone[0])
    assert out[-2, -1].tolist() == list(range(topk))


@pytest.mark.parametrize("offsets", [[0, 5], [0, 3, 2], [-9, 4], [2**31 - 1, -(2**31)], [3, 1, 4, 0]])
@pytest.mark.parametrize("T", [4, 600])
def test_offsets_outside_of_the_tokens_are_memory_safe(offsets, T):
    x = on_cuda(normals(1, T, T, 2, 64, BF16))
    cu = torch.tensor(offsets, device="cuda")
    out = ops.lightning_indexer(**x, topk=7, cu_seqlens=cu, q_offset=torch.full_like(cu[1:], 2**62))
    assert bool(((out >= -1) & (out < T)).all())
