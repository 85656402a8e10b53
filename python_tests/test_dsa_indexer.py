"""lightning_indexer against the oracle, and the oracle against its definition."""

import subprocess
import sys

import pytest
import torch

from lt2_ext import ops
from lt2_ext.reference import dsa

FP32, BF16 = torch.float32, torch.bfloat16
both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
# B, T, S, HI, DI, topk
SHAPES = [
    (1, 1, 1, 1, 8, 1),
    (2, 1, 333, 4, 64, 16),
    (2, 31, 33, 3, 24, 5),
    (1, 65, 65, 16, 8, 64),
    (2, 100, 40, 2, 16, 7),
    (1, 129, 700, 17, 128, 130),
    (1, 257, 257, 5, 40, 300),
    (1, 40, 1500, 1, 8, 1),
]


class Indexer:
    """The operator with its arguments on the device, its result on the CPU."""

    def __init__(self, device, **pool):
        self.device, self.pool = device, pool

    def __call__(self, **x):
        x = {n: t.to(self.device) if isinstance(t, torch.Tensor) else t for n, t in x.items()}
        return ops.lightning_indexer(**x, **self.pool).cpu()


@pytest.fixture(params=[{}, {"pool": 32, "oversample": 1}, {"pool": 128}], ids=["exact", "pool32", "pool128"])
def indexer(device, request):
    return Indexer(device, **request.param)


def integers(B, T, S, HI, DI, dtype=FP32):
    """Scores are small integers, exact in any precision, and full of ties."""
    q, k, w = torch.randint(-2, 3, (B, T, HI, DI)), torch.randint(-2, 3, (B, S, DI)), torch.randint(-2, 3, (B, T, HI))
    return {"q_idx": q.to(dtype), "k_idx": k.to(dtype), "w_idx": w.to(dtype)}


def normals(B, T, S, HI, DI, dtype=FP32):
    q, k, w = torch.randn(B, T, HI, DI), torch.randn(B, S, DI), torch.randn(B, T, HI)
    return {"q_idx": q.to(dtype), "k_idx": k.to(dtype), "w_idx": w}


def exact(x, **options):
    return dsa.lightning_indexer(**{n: t.double() for n, t in x.items()}, **options)


def check_exact(indexer, x, **options):
    options = {"scale": 0.5} | options
    out = indexer(**x, **options)
    assert out.dtype == torch.int32
    assert torch.equal(out, exact(x, **options, **indexer.pool))
    return out


def check_close(indexer, x, topk, blocks_within=1e-5):
    """Keys whose scores are within rounding of the threshold may be swapped, and so may blocks."""
    out, ref = indexer(**x, topk=topk), exact(x, topk=topk, **indexer.pool)
    for b, row in enumerate(out):
        q, k, w = (x[n][b].double() for n in ("q_idx", "k_idx", "w_idx"))
        scores, size = dsa.index_scores(q, k, w), dsa.index_scores(q.abs(), k.abs(), w.abs()).amax(1)
        picked, visible = torch.zeros(scores.shape, dtype=torch.int8), torch.ones(scores.shape, dtype=torch.bool)
        visible = visible.tril(scores.shape[1] - len(q))
        picked = torch.cat([picked, picked[:, :1]], 1).scatter_add_(
            1, row.long().masked_fill(row < 0, scores.shape[1]), torch.ones_like(row, dtype=torch.int8)
        )[:, :-1]
        assert int(picked.max()) <= 1
        picked = picked > 0
        assert torch.equal(picked.sum(1), visible.sum(1).clamp(max=topk))
        sure, possible = blocks_of(q, k, w, visible, topk, blocks_within, **indexer.pool)
        assert not bool((picked & ~possible).any())
        worst = scores.masked_fill(~picked, torch.inf).amin(1)
        missed = scores.masked_fill(picked | ~sure, -torch.inf).amax(1)
        assert bool((missed <= worst + 1e-5 * size).all())
    if blocks_within < 1e-3:
        assert (out == ref).float().mean() > 0.999


def blocks_of(q, k, w, visible, topk, within, pool=None, oversample=4):
    """The keys that must be eligible, and those that may be."""
    if pool is None:
        return visible, visible
    full, blocks = len(k) // pool, -(-oversample * topk // pool)
    means = k[: full * pool].unflatten(0, (full, pool)).mean(1)
    newest = (visible.sum(1, keepdim=True) - 1).clamp_min(0) // pool
    older = torch.arange(full + 1) < newest
    scores = torch.nn.functional.pad(dsa.index_scores(q, means, w), (0, 1)).masked_fill(~older, -torch.inf)
    margin = within * dsa.index_scores(q.abs(), means.abs(), w.abs()).amax(1, keepdim=True) if full else within
    if blocks <= full:
        last = scores.topk(blocks).values[:, -1:]
        sure, possible = scores > last + margin, scores >= last - margin
    else:
        sure = possible = older
    sure, possible = (visible & (m & older | (torch.arange(full + 1) == newest)).repeat_interleave(pool, 1)[:, : len(k)]
                      for m in (sure, possible))  # fmt: skip
    return sure, possible


def one_score_per_key(scores):
    """Arguments whose score of every key is given: the last query sees them all."""
    k = torch.zeros(1, len(scores), 8)
    k[0, :, 0] = torch.tensor(scores)
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    return {"q_idx": q, "k_idx": k}


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", None])
def test_selects_exactly_what_the_oracle_selects(indexer, shape, activation, dtype):
    *sizes, topk = shape
    check_exact(indexer, integers(*sizes, dtype), topk=topk, scale=0.5, activation=activation)


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_scores_differ_only_within_rounding_of_the_threshold(indexer, shape, dtype):
    *sizes, topk = shape
    means_are_rounded = indexer.device == "cuda" and dtype == BF16
    check_close(indexer, normals(*sizes, dtype), topk=topk, blocks_within=2**-7 if means_are_rounded else 1e-5)


def test_the_oracle_is_the_definition():
    scores = torch.randint(-3, 4, (40, 30)).double()
    scores[torch.rand(40, 30) < 0.1] = torch.nan
    scores[torch.rand(40, 30) < 0.1] = -torch.inf
    scores[(scores == 0) & (torch.rand(40, 30) < 0.5)] = -0.0
    visible = torch.arange(30) <= torch.arange(-5, 35)[:, None]
    for t, row in enumerate(dsa.select(scores, visible, 8).tolist()):
        eligible = [s for s in range(30) if visible[t, s] and not scores[t, s].isnan()]
        best = sorted(sorted(eligible, key=lambda s: (-scores[t, s].item(), s))[:8])
        assert row == best + [-1] * (8 - len(best))


def test_the_result_is_ascending_unique_and_padded_at_the_tail(indexer):
    out = indexer(**normals(2, 90, 90, 4, 16), topk=20)
    for t in range(90):
        n = min(t + 1, 20)
        assert bool((out[:, t, n:] == -1).all())
        assert bool((out[:, t, 1:n] > out[:, t, : n - 1]).all())
        assert bool((out[:, t, :n] >= 0).all())
        assert bool((out[:, t, :n] <= t).all())


def test_of_equal_scores_the_smaller_index_wins(indexer):
    x = one_score_per_key([0.0] * 500)
    assert indexer(**x, topk=70).flatten().tolist() == list(range(70))
    x = one_score_per_key([1.0, 3.0, -2.0, 3.0, 1.0, -5.0, 3.0, 1.0])
    assert indexer(**x, topk=4).flatten().tolist() == [0, 1, 3, 6]
    assert indexer(**one_score_per_key([-1.0, -2.0, -3.0, 0.0]), topk=2).flatten().tolist() == [0, 1]


def test_minus_zero_equals_zero(indexer):
    x = one_score_per_key([-0.0, 0.0] * 100)
    assert indexer(**x, topk=9, activation=None).flatten().tolist() == list(range(9))
    x["w_idx"] = torch.full((1, 1, 1), -1.0)  # relu, then times -1
    x["k_idx"][0, :, 0] = torch.tensor([1.0, -1.0] * 100)
    assert indexer(**x, topk=3).flatten().tolist() == [1, 3, 5]


def test_nan_is_never_selected_and_infinities_are_ordinary(indexer):
    inf, nan = float("inf"), float("nan")
    x = one_score_per_key([nan, -inf, 2.0, nan, inf, -inf, -nan, 1.0])
    x["q_idx"][..., 1:] = 0
    select = {k: indexer(**x, topk=k, activation=None).flatten().tolist() for k in (1, 3, 4, 8)}
    assert select == {1: [4], 3: [2, 4, 7], 4: [1, 2, 4, 7], 8: [1, 2, 4, 5, 7, -1, -1, -1]}
    x["k_idx"][:] = nan
    assert indexer(**x, topk=3).flatten().tolist() == [-1] * 3


def test_a_nan_query_selects_nothing_and_leaves_its_neighbours_alone(indexer):
    x = integers(1, 40, 40, 2, 8)
    clean = indexer(**x, topk=6)
    x["q_idx"][0, 17, 1, 3] = torch.nan
    out = indexer(**x, topk=6)
    assert bool((out[0, 17] == -1).all())
    others = torch.arange(40) != 17
    assert torch.equal(out[:, others], clean[:, others])


def test_extreme_scores(indexer):
    big = torch.finfo(FP32).max
    x = one_score_per_key([-big, big, 1e-45, -1e-45, 0.0, float("inf"), -float("inf"), big])
    for k in range(1, 9):
        check_exact(indexer, x, topk=k, activation=None, scale=1.0)


@pytest.mark.parametrize("q_offset", [None, 0, 3, -4, 200, -(2**63), 2**63 - 1])
def test_positions(indexer, q_offset):
    x = integers(2, 40, 50, 2, 8)
    out = indexer(**x, topk=12, scale=1.0, q_offset=q_offset)
    safe = q_offset if q_offset is None else max(-1000, min(1000, q_offset))
    assert torch.equal(out, exact(x, topk=12, scale=1.0, q_offset=safe, **indexer.pool))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_row_has_its_position(indexer, dtype):
    x = integers(4, 3, 90, 2, 8)
    check_exact(indexer, x, topk=12, q_offset=torch.tensor([5, 87, -2, 40], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offset", ["none", "int", "tensor"])
def test_packed_documents(indexer, dtype, offset):
    cu = torch.tensor([2, 2, 35, 36, 100, 100, 140], dtype=dtype)  # slack on both sides, empty documents
    cu_k = torch.tensor([0, 7, 7, 90, 170, 190, 200], dtype=dtype)
    x = integers(1, 150, 210, 3, 16)
    q_offset = {"none": None, "int": 4, "tensor": torch.tensor([0, 3, 80, 2, -1, 9])}[offset]
    out = check_exact(indexer, x, topk=9, cu_seqlens=cu, cu_seqlens_k=cu_k, q_offset=q_offset)
    assert bool((out[0, :2] == -1).all())
    assert bool((out[0, 140:] == -1).all())
    check_exact(indexer, integers(1, 150, 150, 3, 16), topk=9, cu_seqlens=cu, q_offset=q_offset)


@pytest.mark.parametrize("B, T, S", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(indexer, B, T, S):
    out = indexer(**normals(B, T, S, 2, 8), topk=3)
    assert out.shape == (B, T, 3)
    assert bool((out == -1).all())
    cu = torch.zeros(1, dtype=torch.int64)
    assert bool((indexer(**normals(1, 4, 4, 2, 8), topk=3, cu_seqlens=cu) == -1).all())


def test_weights_default_to_ones_and_may_have_any_dtype(indexer):
    x = integers(1, 50, 50, 3, 8)
    for dtype in (torch.float64, torch.float16, BF16):
        assert torch.equal(
            indexer(**x, topk=6), indexer(**x | {"w_idx": x["w_idx"].to(dtype)}, topk=6)
        )
    x["w_idx"] = torch.ones(1, 50, 3)
    out = indexer(**x, topk=6)
    del x["w_idx"]
    assert torch.equal(out, indexer(**x, topk=6))


@both_dtypes
def test_threads_and_splits_change_nothing(indexer, dtype, threads):
    x = normals(2, 150, 150, 4, 32, dtype)
    threads(1)
    whole = indexer(**x, topk=20)
    threads(3)
    assert torch.equal(whole, indexer(**x, topk=20))
    for begin, end in ((0, 1), (1, 50), (50, 150)):
        piece = {"q_idx": x["q_idx"][:, begin:end], "k_idx": x["k_idx"][:, :end], "w_idx": x["w_idx"][:, begin:end]}
        assert torch.equal(whole[:, begin:end], indexer(**piece, topk=20))


def test_strided_arguments(indexer, device):
    x = {n: t.to(device) for n, t in normals(2, 33, 70, 4, 16).items()}
    strided = {
        "q_idx": torch.randn(2, 4, 33, 48, device=device)[..., 16:32].transpose(1, 2).copy_(x["q_idx"]),
        "k_idx": torch.randn(70, 2, 17, device=device)[..., 1:].transpose(0, 1).copy_(x["k_idx"]),
        "w_idx": torch.randn(4, 33, 2, device=device).permute(2, 1, 0).copy_(x["w_idx"]),
    }
    assert torch.equal(indexer(**x, topk=9), indexer(**strided, topk=9))
    no_unit_stride = x | {"k_idx": x["k_idx"].mT.contiguous().mT}
    assert torch.equal(indexer(**x, topk=9), indexer(**no_unit_stride, topk=9))


def test_the_future_and_other_documents_change_nothing(indexer):
    cu = torch.tensor([0, 40, 100])
    x = normals(1, 100, 100, 2, 16)
    whole, packed = indexer(**x, topk=10), indexer(**x, topk=10, cu_seqlens=cu)
    future = x | {"k_idx": torch.cat([x["k_idx"][:, :60], torch.full((1, 40, 16), 1e4)], 1)}
    assert torch.equal(whole[:, :60], indexer(**future, topk=10)[:, :60])
    other = {n: torch.cat([torch.full_like(t[:, :40], torch.nan), t[:, 40:]], 1) for n, t in x.items()}
    assert torch.equal(packed[:, 40:], indexer(**other, topk=10, cu_seqlens=cu)[:, 40:])


def test_a_selection_has_no_gradient(indexer):
    x = {n: t.requires_grad_() for n, t in normals(1, 20, 20, 2, 8).items()}
    out = indexer(**x, topk=4)
    assert not out.requires_grad
    with torch.no_grad():
        assert torch.equal(out, indexer(**x, topk=4))


def test_opcheck(device):
    q, k, w = (t.to(device) for t in normals(1, 9, 70, 2, 8).values())
    cu_seqlens = torch.tensor([0, 2, 9], device=device)
    op = torch.ops.lt2.lightning_indexer.default
    torch.library.opcheck(op, (q, k, w, None, None, torch.tensor([3], device=device), 5, 0.5, True, 0, 0))
    torch.library.opcheck(op, (q, k, None, None, None, None, 5, 0.5, False, 32, 1))
    torch.library.opcheck(op, (q, k, w, cu_seqlens, cu_seqlens, None, 80, 0.5, True, 0, 0))


def test_autocast_casts_queries_and_keys(indexer, device):
    x = normals(1, 60, 60, 2, 16)
    low = x | {n: x[n].to(BF16) for n in ("q_idx", "k_idx")}
    with torch.autocast(device, BF16):
        out = indexer(**x, topk=7)
    assert torch.equal(out, indexer(**low, topk=7))


def test_memory_does_not_grow_with_the_square():
    """24000 x 24000 scores are 2.3 GB."""
    code = """
import resource, torch
from lt2_ext.ops import lightning_indexer
q, k = torch.randn(1, 24000, 1, 8), torch.randn(1, 24000, 8)
lightning_indexer(q[:, :100], k[:, :100], topk=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lightning_indexer(q, k, topk=8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000  # KB


WRONG = [
    ({"q_idx": torch.zeros(1, 4, 2, 12)}, "q_idx must have HI >= 1 and DI a multiple of 8"),
    ({"q_idx": torch.zeros(1, 4, 8)}, "q_idx must have 4 dimensions"),
    ({"q_idx": torch.zeros(1, 4, 2, 8).half()}, "q_idx must be float32 or bfloat16"),
    ({"k_idx": torch.zeros(1, 4, 16)}, r"k_idx must have shape \[B, S, DI\] = \[1, 4, 8\]"),
    ({"k_idx": torch.zeros(1, 4, 8).to(BF16)}, "k_idx must have the dtype of q_idx"),
    ({"w_idx": torch.zeros(1, 4, 3)}, r"w_idx must have shape \[B, T, HI\]"),
    ({"w_idx": torch.zeros(1, 4, 2, dtype=torch.int32)}, "w_idx must have a float dtype"),
    ({"topk": 0}, "topk must be at least 1, got 0"),
    ({"activation": "gelu"}, "activation must be"),
    ({"pool": 48}, "pool must be None or a multiple of 32, got 48"),
    ({"pool": -64}, "pool must be None or a multiple of 32, got -64"),
    ({"pool": 64, "oversample": 0}, "oversample must be at least 1, got 0"),
    ({"q_offset": torch.zeros(2, dtype=torch.int64)}, r"q_offset must have shape \[N\] = \[1\], got \[2\]"),
    ({"q_offset": torch.zeros(1)}, "q_offset must be int32 or int64"),
    ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens must be int32 or int64"),
    ({"cu_seqlens_k": torch.zeros(2, dtype=torch.int64)}, "cu_seqlens_k must come with cu_seqlens"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[f"{next(iter(w))}-{i}" for i, (w, _) in enumerate(WRONG)])
def test_wrong_arguments_are_named(wrong, message):
    x = normals(1, 4, 4, 2, 8) | {"topk": 2}
    with pytest.raises((ValueError, RuntimeError), match=f"lightning_indexer: {message}"):
        ops.lightning_indexer(**x | wrong)


@pytest.mark.parametrize("offsets", [[0, 5], [0, 3, 2], [-1, 4]])
def test_offsets_outside_of_the_tokens_are_refused(offsets):
    with pytest.raises(RuntimeError, match="lightning_indexer: cu_seqlens must ascend within"):
        ops.lightning_indexer(**normals(1, 4, 4, 2, 8), topk=2, cu_seqlens=torch.tensor(offsets))


def ranked(q, k, w, t, blocks, pool):
    """Blocks by the definition, for query t that sees t + 1 keys."""
    newest = t // pool
    means = [k[n * pool : (n + 1) * pool].mean(0) for n in range(newest)]
    scores = [float(w[t] @ (q[t] @ m * 0.5).relu()) for m in means]
    scores = [-torch.inf if s != s else s for s in scores]
    return [*sorted(range(newest), key=lambda n: (-scores[n], n))[:blocks], newest]


def test_the_pooled_oracle_is_the_definition():
    x = integers(1, 300, 300, 2, 8)
    x["k_idx"][0, 70, 3] = torch.nan
    q, k, w = (t[0].double() for t in x.values())
    scores = dsa.index_scores(q, k, w, 0.5)
    indices = exact(x, topk=40, scale=0.5, pool=32, oversample=2)[0]
    for t in range(300):
        blocks = ranked(q, k, w, t, 3, 32)
        eligible = [s for n in blocks for s in range(32 * n, min(32 * n + 32, t + 1)) if not scores[t, s].isnan()]
        best = sorted(sorted(eligible, key=lambda s: (-scores[t, s].item(), s))[:40])
        assert indices[t].tolist() == best + [-1] * (40 - len(best))


@both_dtypes
@pytest.mark.parametrize("pool", [32, 64, 128])
def test_with_all_blocks_the_pooled_search_is_the_exact_one(device, dtype, pool):
    """To the last bit where both are of one kernel; on CUDA where scores are exact."""
    x = (normals if device == "cpu" else integers)(1, 400, 500, 3, 24, dtype)
    for topk, oversample in ((500, 1), (130, 4), (77, 9)):
        out = Indexer(device, pool=pool, oversample=oversample)(**x, topk=topk)
        assert torch.equal(out, Indexer(device)(**x, topk=topk))


@pytest.mark.parametrize("pool", [32, 128])
def test_up_to_topk_visible_keys_all_are_selected(device, pool):
    x = normals(2, 300, 300, 2, 16)
    x["k_idx"][:, 40] = torch.nan  # its block comes last, but it comes
    out = Indexer(device, pool=pool, oversample=1)(**x, topk=200)
    for t in range(200):
        seen = [s for s in range(t + 1) if s != 40]
        assert out[0, t].tolist() == seen + [-1] * (200 - len(seen))


def test_the_released_code_counts_key_0_again_and_again():
    q_idx, k_idx = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 8)
    indices = dsa.released_indexer(q_idx, k_idx, 4)
    assert indices[0, 1].tolist() == [0, 0, 0, 1]
    q, k, v = torch.randn(3, 1, 6, 1, 8).double()
    o = dsa.dsa_attention(q, k, v, indices)
    scores = (q[0, 1, 0] @ k[0, :2, 0].T) * 8**-0.5
    p = (scores + torch.tensor([3.0, 1.0]).log()).softmax(-1)
    torch.testing.assert_close(o[0, 1, 0], p @ v[0, :2, 0])


@pytest.mark.parametrize("selected", [False, True])
def test_the_loss_is_the_divergence(selected):
    x = {n: t.double().requires_grad_() for n, t in normals(2, 7, 7, 2, 8).items()}
    q, k = torch.randn(2, 7, 4, 8).double(), torch.randn(2, 7, 2, 8).double()
    indices = dsa.lightning_indexer(**{n: t.detach() for n, t in x.items()}, topk=7 if not selected else 3)
    _, lse = dsa.dsa_attention(q, k, k, indices, return_lse=True)
    loss = dsa.indexer_loss(**x, q=q, k=k, lse=lse, indices=indices if selected else None)
    want = 0.0
    for b in range(2):
        for t in range(7):
            s = indices[b, t][indices[b, t] >= 0].long()
            p = torch.stack([(q[b, t, h] @ k[b, s, h // 2].T * 8**-0.5).softmax(-1) for h in range(4)]).mean(0)
            scores = dsa.index_scores(x["q_idx"][b], x["k_idx"][b], x["w_idx"][b])[t, s]
            want = want + (p * (p.log() - scores.log_softmax(-1))).sum() / 14
    torch.testing.assert_close(loss, want)
    torch.autograd.gradcheck(
        lambda q_idx, k_idx, w_idx: dsa.indexer_loss(
            q_idx, k_idx, w_idx, q, k, lse, indices if selected else None
        ), tuple(x.values()),
    )  # fmt: skip
