"""indexer_loss against the oracle: the value, and the gradients that train an indexer."""

import subprocess
import sys

import pytest
import torch

import lt2_ext
from lt2_ext.ops import dsa_attention, indexer_loss, lightning_indexer
from lt2_ext.reference import dsa
from lt2_ext.testing import check_close

FP32, BF16 = torch.float32, torch.bfloat16
TRAINED = ("q_idx", "k_idx", "w_idx")
both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
everywhere = pytest.mark.usefixtures("on_device")
dense_too = pytest.mark.parametrize("dense", [False, True], ids=["selection", "dense"])
# B, T, S, HQ, H, D, HI, DI, topk
SHAPES = [
    (1, 1, 1, 1, 1, 8, 1, 8, 1),
    (2, 1, 50, 4, 4, 64, 4, 64, 33),
    (2, 37, 40, 3, 1, 24, 2, 40, 5),
    (1, 100, 100, 16, 4, 64, 8, 64, 16),
    (1, 70, 30, 16, 16, 16, 16, 16, 17),
    (1, 65, 130, 8, 2, 128, 3, 128, 150),
    (3, 40, 40, 5, 1, 96, 1, 72, 1),
]


@pytest.fixture
def on_device(device):
    """What a test makes is on ``device``."""
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def inputs(B, T, S, HQ, H, D, HI, DI, dtype=FP32):
    x = {"q_idx": torch.randn(B, T, HI, DI), "k_idx": torch.randn(B, S, DI), "w_idx": torch.randn(B, T, HI),
         "q": torch.randn(B, T, HQ, D), "k": torch.randn(B, S, H, D)}  # fmt: skip
    return {n: t if n == "w_idx" else t.to(dtype) for n, t in x.items()}


def any_indices(B, T, S, topk):
    """Unique, in any order; some negative, some in the future, some of no key."""
    return torch.rand(B, T, S + 8).argsort(-1)[..., :topk].int() - 4


def denominators(x, indices, **options):
    """lse of the attention over the selection, or over all keys."""
    (B, T), S = x["q"].shape[:2], x["k"].shape[1]
    indices = torch.arange(S, dtype=torch.int32).expand(B, T, S) if indices is None else indices
    exact = {n: x[n].double() for n in "qk"}
    _, lse = dsa.dsa_attention(**exact, v=exact["k"], indices=indices, return_lse=True, **options)
    return lse.float()


def with_gradients(op, x, lse, indices, names=TRAINED, **options):
    leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in x.items()}
    loss = op(**leaves, lse=lse.to(x["q"].dtype if op is dsa.indexer_loss else FP32), indices=indices, **options)
    grads = torch.autograd.grad(3 * loss, [leaves[n] for n in names])
    return {"loss": loss.detach()} | {f"d{n}": g for n, g in zip(names, grads, strict=True)}


def check_against_oracle(x, indices, cu_seqlens=None, **options):
    dtype = x["q"].dtype
    lse = denominators(x, indices, cu_seqlens=cu_seqlens)
    double = {n: t.double() for n, t in x.items()}
    options = {"indices": indices, "cu_seqlens": cu_seqlens} | options
    exact = with_gradients(dsa.indexer_loss, double, lse.double(), **options)
    plain = with_gradients(dsa.indexer_loss, x | {"w_idx": x["w_idx"].to(dtype)}, lse, **options)
    ours = with_gradients(indexer_loss, x, lse, **options)
    for name, ref in exact.items():
        kind = "out" if name == "loss" else "grad"
        if ref.norm() < 1e-6:  # of one key
            assert ours[name].norm() < 1e-6, name
        else:
            check_close(name, ours[name], ref, plain[name], kind, dtype)
    assert ours["loss"].dtype == ours["dw_idx"].dtype == FP32
    assert ours["dq_idx"].dtype == ours["dk_idx"].dtype == dtype
    with torch.no_grad():
        assert torch.equal(indexer_loss(**x, lse=lse, **options), ours["loss"])
    return ours


@everywhere
@dense_too
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(shape, dtype, dense):
    *sizes, topk = shape
    B, T, S = sizes[:3]
    check_against_oracle(inputs(*sizes, dtype), None if dense else any_indices(B, T, S, topk))


# On CUDA gathered by warps, as queries or selected keys are few: 16 keys at a time, by more or fewer query heads than a
# product has rows.
GATHERED = [
    (2, 60, 90, 2, 2, 64, 1, 128, 40),
    (1, 60, 300, 32, 2, 128, 16, 64, 130),
    (1, 130, 700, 16, 4, 128, 8, 64, 17),
    (1, 60, 700, 12, 4, 64, 5, 64, 600),
    (1, 50, 50, 48, 4, 64, 3, 64, 20),
]
# On Hopper in tiles of 128 queries and 128 keys.
TILED = [
    (1, 64, 64, 1, 1, 64, 1, 64, 64),
    (2, 150, 150, 4, 4, 128, 2, 64, 40),
    (1, 130, 300, 8, 2, 64, 3, 128, 300),
    (1, 257, 257, 16, 1, 128, 16, 64, 100),
    (1, 300, 200, 6, 3, 64, 5, 64, 7),
    (3, 70, 513, 2, 1, 128, 7, 128, 513),
    (1, 70, 8500, 2, 1, 64, 2, 64, 300),
]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("shape", GATHERED + TILED, ids=str)
def test_products_of_16_bits(shape, repeated, dtype):
    *sizes, topk = shape
    B, T, S = sizes[:3]
    with torch.device("cuda"):
        indices = any_indices(B, T, S, topk)
        indices[:, T // 2] = -1
        if repeated:
            indices[:, 7, : topk // 2] = indices[:, 7, topk // 2 : topk // 2 * 2]
        x = inputs(*sizes, dtype)
        first = check_against_oracle(x, indices)
        again = with_gradients(indexer_loss, x, denominators(x, indices), indices)
    assert all(torch.equal(again[n], t) for n, t in first.items())


@pytest.mark.cuda
@pytest.mark.parametrize("shape", TILED[:-1], ids=str)
def test_tiles_of_all_keys(shape):
    with torch.device("cuda"):
        check_against_oracle(inputs(*shape[:-1], BF16), None)


@pytest.mark.cuda
def test_slopes_in_bands():
    """More tiles than slopes are kept of at a time; the second band begins within a batch row."""
    with torch.device("cuda"):
        check_against_oracle(inputs(2, 6000, 6000, 1, 1, 64, 1, 64, BF16), any_indices(2, 6000, 6000, 200))


@pytest.mark.cuda
@dense_too
def test_tiles_of_packed_documents(dense):
    """NaN of one document, or of no document, does not reach another."""
    with torch.device("cuda"):
        cu, sizes = torch.tensor([5, 5, 150, 151, 400, 430]), (1, 450, 450, 4, 2, 64, 3, 64)
        x, indices = inputs(*sizes, BF16), None if dense else any_indices(1, 450, 260, 60)
        check_against_oracle(x, indices, cu_seqlens=cu)
        lse = denominators(x, indices, cu_seqlens=cu)
        outside = torch.ones(450, dtype=torch.bool)
        outside[5:430] = False
        if indices is not None:
            indices[:, 5:150], outside[5:150] = -1, True
        expected = with_gradients(indexer_loss, x, lse, indices, cu_seqlens=cu)
        x = {n: t.masked_fill(outside.view(1, -1, *[1] * (t.ndim - 2)), torch.nan) for n, t in x.items()}
        got = with_gradients(indexer_loss, x, lse, indices, cu_seqlens=cu)
    assert torch.equal(got["loss"], expected["loss"])
    for name in ("dq_idx", "dk_idx", "dw_idx"):
        check_close(name, got[name], expected[name].double(), kind="grad", dtype=BF16)
        assert bool((got[name][:, outside] == 0).all())


@everywhere
@pytest.mark.parametrize("HI", range(1, 17))
def test_index_heads(HI):
    check_against_oracle(inputs(1, 40, 40, 4, 2, 16, HI, 24), any_indices(1, 40, 40, 9), index_scale=0.4)


@everywhere
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 3), (4, 2), (6, 2), (8, 8), (12, 3), (16, 1), (16, 4), (16, 16)])
def test_attention_heads(heads):
    x = inputs(1, 40, 40, *heads, 16, 3, 16)
    lse = denominators(x, None)
    check_against_oracle(x, any_indices(1, 40, 40, 9))
    double = {n: t.double() for n, t in x.items()}
    options = {"indices": any_indices(1, 40, 40, 9), "attn_scale": 0.1}  # weights that do not add up to 1
    exact = with_gradients(dsa.indexer_loss, double, lse.double(), **options)
    for name, got in with_gradients(indexer_loss, x, lse, **options).items():
        check_close(name, got, exact[name], kind="out" if name == "loss" else "grad")


@everywhere
@dense_too
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents(dtype, dense):
    cu = torch.tensor([2, 2, 35, 36, 60, 60, 70], dtype=dtype)
    x = inputs(1, 75, 75, 4, 2, 16, 3, 24)
    ours = check_against_oracle(x, None if dense else any_indices(1, 75, 40, 12), cu_seqlens=cu)
    for name in ("dq_idx", "dk_idx", "dw_idx"):
        assert bool((ours[name][:, :2] == 0).all())
        assert bool((ours[name][:, 70:] == 0).all())


@everywhere
def test_rows_without_keys_do_not_count():
    x = inputs(1, 6, 6, 2, 1, 8, 2, 8)
    indices = torch.full((1, 6, 3), -1, dtype=torch.int32)
    indices[0, 4] = torch.tensor([0, 2, 1])
    ours = check_against_oracle(x, indices)
    alone = {n: t[:, :5] if t.shape[1] == 6 and n in ("k", "k_idx") else t[:, 4:5] for n, t in x.items()}
    got = indexer_loss(**alone, lse=denominators(x, indices)[:, 4:5], indices=indices[:, 4:5])
    torch.testing.assert_close(got, ours["loss"])
    for nothing in (indices[..., :0], torch.full_like(indices, 6)):
        none = check_against_oracle(x, nothing)
        assert all(bool((t == 0).all()) for t in none.values())


@everywhere
def test_any_index_is_safe_and_only_visible_ones_count():
    x = inputs(1, 20, 20, 4, 2, 16, 3, 16)
    indices = torch.full((1, 20, 4), -1, dtype=torch.int32)
    indices[0, :, 1] = torch.arange(20) // 2
    lse = denominators(x, indices)
    expected = with_gradients(indexer_loss, x, lse, indices)
    for garbage in (-(2**31), -7, -1, 20, 2**31 - 1):
        indices[0, :, 2] = garbage
        got = with_gradients(indexer_loss, x, lse, indices)
        assert all(torch.equal(got[n], t) for n, t in expected.items())


@everywhere
def test_a_key_that_is_named_twice_counts_twice(checks):
    x = inputs(1, 12, 12, 2, 1, 8, 2, 8)
    indices = torch.randint(0, 4, (1, 12, 9), dtype=torch.int32)
    with pytest.raises(ValueError, match="indexer_loss: indices must name no visible key twice"):
        indexer_loss(**x, lse=torch.zeros(1, 12, 2), indices=indices)
    lt2_ext.set_checks(False)
    check_against_oracle(x, indices)


@everywhere
@pytest.mark.parametrize("B, T, S", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
@dense_too
def test_empty(B, T, S, dense):
    x = inputs(B, T, S, 2, 1, 8, 2, 8)
    indices = None if dense else torch.zeros(B, T, 3, dtype=torch.int32)
    got = with_gradients(indexer_loss, x, torch.zeros(B, T, 2), indices)
    assert all(bool((t == 0).all()) for t in got.values())


@everywhere
def test_the_loss_of_what_the_indexer_selects_falls():
    """A step against the gradient, through indexer and attention as they are used together."""
    x = inputs(2, 90, 90, 4, 2, 16, 4, 16)
    x["q_idx"], x["k_idx"] = x["q_idx"] / 4, x["k_idx"] / 4
    indices = lightning_indexer(*(x[n] for n in TRAINED), topk=20)
    _, lse = dsa_attention(x["q"], x["k"], x["k"], indices, return_lse=True)
    before = with_gradients(indexer_loss, x, lse, indices)
    moved = x | {n: x[n] - 1.0 * before[f"d{n}"] for n in TRAINED}
    after = indexer_loss(**moved, lse=lse, indices=indices)
    assert 0 < after < before["loss"]


@everywhere
def test_perfect_scores_have_no_loss_and_no_gradient():
    k_idx = torch.rand(1, 30, 8)
    q = torch.rand(1, 30, 1, 8)  # all products are positive, so relu is not felt
    x = {"q_idx": q, "k_idx": k_idx, "w_idx": torch.ones(1, 30, 1), "q": q, "k": k_idx[:, :, None]}
    got = with_gradients(indexer_loss, x, denominators(x, None), None)
    assert all(float(t.abs().max()) < 1e-6 for t in got.values())


@both_dtypes
@dense_too
def test_threads_and_garbage_change_nothing(dtype, dense, threads):
    x = inputs(1, 150, 150, 4, 1, 32, 3, 32, dtype)
    indices = None if dense else any_indices(1, 150, 150, 40)
    lse, results = denominators(x, indices), []
    for n in (1, 2, 5):
        threads(n)
        results.append(with_gradients(indexer_loss, x, lse, indices))
    for other in results[1:]:
        assert all(torch.equal(other[n], t) for n, t in results[0].items())


@everywhere
def test_strided_arguments():
    x, indices = inputs(2, 33, 33, 4, 2, 16, 3, 16), any_indices(2, 33, 33, 7)
    lse = denominators(x, indices)
    expected = with_gradients(indexer_loss, x, lse, indices)
    strided = {n: torch.randn(*t.shape[:-1], 40)[..., 3 : 3 + t.shape[-1]].copy_(t) for n, t in x.items()}
    strided["k_idx"] = x["k_idx"].mT.contiguous().mT
    wide = torch.zeros(2, 33, 9, dtype=torch.int32)
    wide[..., 2:] = indices
    loss = indexer_loss(**strided, lse=lse.transpose(0, 1).contiguous().transpose(0, 1), indices=wide[..., 2:])
    assert torch.equal(loss, expected["loss"])


@everywhere
def test_the_future_and_other_documents_change_nothing():
    x, indices, cu = inputs(1, 100, 100, 4, 2, 16, 3, 16), any_indices(1, 100, 100, 30), torch.tensor([0, 40, 100])
    lse = denominators(x, indices, cu_seqlens=cu)
    indices[:, :40] = -1
    expected = with_gradients(indexer_loss, x, lse, indices, cu_seqlens=cu)
    other = {n: torch.cat([torch.full_like(t[:, :40], torch.nan), t[:, 40:]], 1) for n, t in x.items()}
    got = with_gradients(indexer_loss, other, lse, indices, cu_seqlens=cu)
    assert torch.equal(got["loss"], expected["loss"])
    for name in ("dq_idx", "dk_idx", "dw_idx"):
        assert torch.equal(got[name][:, 40:], expected[name][:, 40:])
        assert bool((got[name][:, :40] == 0).all())


@everywhere
@pytest.mark.parametrize("names", [("q_idx",), ("k_idx",), ("w_idx",), ("q_idx", "w_idx")], ids=str)
def test_gradients_of_some(names):
    x, indices = inputs(1, 20, 20, 4, 2, 8, 3, 8), any_indices(1, 20, 20, 6)
    lse = denominators(x, indices)
    whole, some = (with_gradients(indexer_loss, x, lse, indices, n) for n in (TRAINED, names))
    assert all(torch.equal(whole[n], t) for n, t in some.items())


def test_the_attention_is_not_trained():
    x = {n: t.requires_grad_() for n, t in inputs(1, 20, 20, 4, 2, 8, 3, 8).items()}
    lse = torch.zeros(1, 20, 4, requires_grad=True)
    indexer_loss(**x, lse=lse).backward()
    assert x["q"].grad is x["k"].grad is lse.grad is None
    assert not indexer_loss(**{n: t if n in "qk" else t.detach() for n, t in x.items()}, lse=lse).requires_grad


@everywhere
def test_weights_default_to_ones_and_may_have_any_dtype():
    x, indices = inputs(1, 50, 50, 4, 2, 8, 3, 8), any_indices(1, 50, 50, 6)
    lse = denominators(x, indices)
    x["w_idx"] = torch.ones(1, 50, 3)
    ones = with_gradients(indexer_loss, x, lse, indices)
    none = with_gradients(indexer_loss, {n: t for n, t in x.items() if n != "w_idx"},
                          lse, indices, ("q_idx", "k_idx"), w_idx=None)  # fmt: skip
    assert all(torch.equal(ones[n], t) for n, t in none.items())
    low = with_gradients(indexer_loss, x | {"w_idx": x["w_idx"].double()}, lse, indices)
    assert low["dw_idx"].dtype == torch.float64
    assert torch.equal(low["dw_idx"].float(), ones["dw_idx"])


def test_autocast_casts_all_but_weights_and_denominators():
    x, indices = inputs(1, 60, 60, 4, 2, 16, 3, 16), any_indices(1, 60, 60, 6)
    lse = denominators(x, indices)
    low = {n: t if n == "w_idx" else t.to(BF16) for n, t in x.items()}
    with torch.autocast("cpu", BF16):
        loss = indexer_loss(**x, lse=lse, indices=indices)
    assert torch.equal(loss, indexer_loss(**low, lse=lse, indices=indices))


def test_double_backward_is_an_error():
    x = inputs(1, 8, 8, 2, 1, 8, 2, 8)
    x["q_idx"].requires_grad_()
    loss = indexer_loss(**x, lse=torch.zeros(1, 8, 2))
    (grad,) = torch.autograd.grad(loss.square(), x["q_idx"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@everywhere
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, indices = inputs(1, 6, 6, 4, 2, 8, 3, 8), any_indices(1, 6, 6, 3)
    x = {n: t.requires_grad_(grad and n in TRAINED) for n, t in x.items()}
    lse = denominators({n: t.detach() for n, t in x.items()}, indices)
    fwd, bwd = torch.ops.lt2.indexer_loss_fwd.default, torch.ops.lt2.indexer_loss_bwd.default
    torch.library.opcheck(fwd, (*x.values(), lse, indices, None, 0.5, 0.3))
    if not grad:
        _, saved = fwd(*x.values(), lse, indices, None, 0.5, 0.3)
        torch.library.opcheck(bwd, (torch.ones(()), *x.values(), lse, indices, saved, None, 0.5, 0.3))


def test_compiles_in_one_graph():
    x, indices = inputs(1, 30, 30, 4, 2, 16, 3, 16), any_indices(1, 30, 30, 6)
    lse = denominators(x, indices)
    f = torch.compile(lambda **x: indexer_loss(**x), fullgraph=True, backend="aot_eager")
    expected = with_gradients(indexer_loss, x, lse, indices)
    assert all(torch.equal(with_gradients(f, x, lse, indices)[n], t) for n, t in expected.items())


def test_memory_does_not_grow_with_the_square():
    """20000 x 20000 scores are 1.6 GB."""
    code = """
import resource, torch
from lt2_ext.ops import indexer_loss
T = 20000
q_idx, k_idx, w_idx = torch.randn(1, T, 1, 8, requires_grad=True), torch.randn(1, T, 8), torch.randn(1, T, 1)
q, k, lse = torch.randn(1, T, 1, 8), torch.randn(1, T, 1, 8), torch.full((1, T, 1), 9.0)
def run(n):
    indexer_loss(q_idx[:, :n], k_idx[:, :n], w_idx[:, :n], q[:, :n], k[:, :n], lse[:, :n]).backward()
run(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(T)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150_000  # KB


WRONG = [
    ({"q_idx": torch.zeros(1, 4, 2, 12)}, "q_idx must have HI >= 1 and DI a multiple of 8"),
    ({"q_idx": torch.zeros(1, 4, 2, 8).half()}, "q_idx must be float32 or bfloat16"),
    ({"k_idx": torch.zeros(1, 4, 16)}, r"k_idx must have shape \[B, S, DI\] = \[1, 4, 8\], got \[1, 4, 16\]"),
    ({"k_idx": torch.zeros(1, 4, 8).to(BF16)}, r"k_idx must have the dtype of q_idx \(torch.float32\)"),
    ({"w_idx": torch.zeros(1, 4, 3)}, r"w_idx must have shape \[B, T, HI\] = \[1, 4, 2\]"),
    ({"w_idx": torch.zeros(1, 4, 2, dtype=torch.int32)}, "w_idx must have a float dtype"),
    ({"q": torch.zeros(1, 4, 4, 12)}, "q must have D a multiple of 8"),
    ({"q": torch.zeros(1, 4, 3, 8)}, r"q must have a multiple of k's heads \(2\)"),
    ({"k": torch.zeros(1, 5, 2, 8)}, r"k must have shape \[B, S, H, D\] = \[1, 4, 2, 8\]"),
    ({"lse": torch.zeros(1, 4, 2)}, r"lse must have shape \[B, T, HQ\] = \[1, 4, 4\]"),
    ({"lse": torch.zeros(1, 4, 4).double()}, "lse must be float32, got float64"),
    ({"indices": torch.zeros(1, 4, 3)}, "indices must be int32"),
    ({"indices": torch.zeros(1, 5, 3, dtype=torch.int32)}, r"indices must have shape \[B, T, topk\]"),
    ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens must be int32 or int64"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[f"{next(iter(w))}-{i}" for i, (w, _) in enumerate(WRONG)])
def test_wrong_arguments_are_named(wrong, message):
    x = inputs(1, 4, 4, 4, 2, 8, 2, 8) | {"lse": torch.zeros(1, 4, 4)}
    with pytest.raises((ValueError, RuntimeError), match=f"indexer_loss: {message}"):
        indexer_loss(**x | wrong)


@pytest.mark.cuda
@dense_too
def test_on_cuda_also_float16_in_a_graph_and_always_the_same_bits(dense):
    torch.set_default_device("cuda")
    try:
        x = inputs(1, 300, 300, 8, 2, 64, 4, 64, torch.float16)
        indices = None if dense else any_indices(1, 300, 300, 64)
        ours = check_against_oracle(x, indices)
        lse = denominators(x, indices)
        with torch.no_grad():
            loss = indexer_loss(**x, lse=lse, indices=indices)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = indexer_loss(**x, lse=lse, indices=indices)
            graph.replay()
        assert torch.equal(captured, loss)
        for _ in range(20):
            again = with_gradients(indexer_loss, x, lse, indices)
            assert all(torch.equal(again[n], t) for n, t in ours.items())
    finally:
        torch.set_default_device(None)


@pytest.mark.cuda
def test_too_wide_for_cuda_is_an_error():
    x = {n: t.cuda() for n, t in inputs(1, 4, 4, 128, 1, 256, 2, 8).items()}
    with pytest.raises(RuntimeError, match="indexer_loss: the CUDA kernels take HQ D"):
        indexer_loss(**x, lse=torch.zeros(1, 4, 128, device="cuda"))
