"""The operators of lt2_ext.ops.loop_state against their oracles, and against themselves."""

import os
import subprocess
import sys

import pytest
import torch

from lt2_ext.ops import (
    loop_decode_attention,
    loop_residual,
    loop_residual_rmsnorm,
    loop_state_copy_,
    loop_state_zero_,
)
from lt2_ext.reference import loop_state as reference
from lt2_ext.testing import check_close

FP32, BF16 = torch.float32, torch.bfloat16
RESIDUALS = {
    "residual": (loop_residual, reference.loop_residual),
    "residual_rmsnorm": (loop_residual_rmsnorm, reference.loop_residual_rmsnorm),
}

both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=["fp32", "bf16", "fp16"])
both_residuals = pytest.mark.parametrize("name", RESIDUALS)


# loop_residual, loop_residual_rmsnorm


def residual_inputs(name, shape=(2, 5, 70), dtype=FP32, device="cpu"):
    x = {
        "h": torch.randn(shape, device=device).to(dtype),
        "h_in": torch.randn(shape, device=device).to(dtype),
        "rho": torch.randn(shape[-1], device=device),
    }
    return x if name == "residual" else x | {"weight": torch.randn(shape[-1], device=device)}


def with_gradients(op, tensors, cotangents):
    """All outputs and gradients; an output whose cotangent is None is not in the loss."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [i for i, c in enumerate(cotangents) if c is not None]
    grads = torch.autograd.grad(
        [outputs[i] for i in used],
        list(leaves.values()),
        [cotangents[i].to(outputs[i].dtype) for i in used],
        materialize_grads=True,
    )
    return {f"out{i}": o.detach() for i, o in enumerate(outputs)} | {
        f"d{name}": g for name, g in zip(leaves, grads, strict=True)
    }


def residual_cotangents(name, x):
    return [torch.randn_like(x["h"]) for _ in range(1 if name == "residual" else 2)]


def assert_equal(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


def check_residual(name, x, cotangents):
    op, oracle = RESIDUALS[name]
    dtype = x["h"].dtype
    ours = with_gradients(op, x, cotangents)
    exact = with_gradients(oracle, {n: t.double() for n, t in x.items()}, cotangents)
    plain = with_gradients(oracle, x, cotangents)
    for key, ref in exact.items():
        check_close(key, ours[key], ref, plain[key], "grad" if key.startswith("d") else "out", dtype)
    assert all(ours[key].dtype == dtype for key in ("out0", "dh", "dh_in"))


@both_residuals
@both_dtypes
@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 63, 64, 65, 130])
def test_residual_against_oracle(name, dtype, T, device):
    for D in (8, 15, 64, 65, 300):
        x = residual_inputs(name, (2, T, D), dtype, device)
        check_residual(name, x, residual_cotangents(name, x))


@both_residuals
def test_residual_shapes(name, device):
    for shape in ((48,), (3, 48), (2, 3, 4, 48), (70000, 2)):
        x = residual_inputs(name, shape, device=device)
        check_residual(name, x, residual_cotangents(name, x))


def test_each_output_of_rmsnorm_alone(device):
    x = residual_inputs("residual_rmsnorm", device=device)
    a, b = residual_cotangents("residual_rmsnorm", x)
    for cotangents in ((a, None), (None, b)):
        check_residual("residual_rmsnorm", x, cotangents)


def test_rmsnorm_normalises_the_rounded_sum(device):
    x = residual_inputs("residual_rmsnorm", dtype=BF16, device=device)
    h_out, normed = loop_residual_rmsnorm(**x, eps=1e-5)
    assert torch.equal(h_out, loop_residual(x["h"], x["h_in"], x["rho"]))
    nothing = torch.zeros_like(x["rho"])
    assert torch.equal(loop_residual_rmsnorm(h_out, x["h_in"], nothing, x["weight"], 1e-5)[1], normed)


@both_residuals
@both_dtypes
def test_residual_strides(name, dtype, device):
    x = residual_inputs(name, (6, 9, 40), dtype, device)
    cotangents = residual_cotangents(name, x)
    expected = with_gradients(RESIDUALS[name][0], x, cotangents)

    def permuted(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() == 3 else t

    def op(**leaves):
        return RESIDUALS[name][0](**{n: permuted(t) for n, t in leaves.items()})

    assert_equal(with_gradients(op, x, [permuted(c) for c in cotangents]), expected)
    x["h_in"] = x["h_in"][:1, :1].expand(6, 9, 40)
    check_residual(name, x, cotangents)


@both_residuals
@both_dtypes
def test_threads_change_no_residual(name, dtype, threads):
    x = residual_inputs(name, (3, 700, 130), dtype)
    cotangents = residual_cotangents(name, x)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(with_gradients(RESIDUALS[name][0], x, cotangents))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@both_residuals
def test_residual_in_the_dtype_of_the_parameters(name, device):
    x = residual_inputs(name, device=device)
    vectors = [n for n in x if n in ("rho", "weight")]
    x |= {n: x[n].bfloat16() for n in vectors}
    results = with_gradients(RESIDUALS[name][0], x, residual_cotangents(name, x))
    assert all(results[f"d{n}"].dtype == BF16 for n in vectors)


@both_residuals
def test_residual_gradients_only_where_needed(name, device):
    x = residual_inputs(name, device=device)
    cotangents = residual_cotangents(name, x)
    full = with_gradients(RESIDUALS[name][0], x, cotangents)
    for needed in x:
        leaves = {n: t.detach().requires_grad_(n == needed) for n, t in x.items()}
        outputs = RESIDUALS[name][0](**leaves)
        torch.autograd.backward(outputs, cotangents if isinstance(outputs, tuple) else cotangents[0])
        assert torch.equal(leaves[needed].grad, full[f"d{needed}"])
        assert all(t.grad is None for n, t in leaves.items() if n != needed)


@both_residuals
def test_residual_double_backward_is_an_error(name):
    x = residual_inputs(name)
    x["h_in"].requires_grad_()
    outputs = RESIDUALS[name][0](**x)
    loss = sum(o.sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
    (dh_in,) = torch.autograd.grad(loss, x["h_in"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dh_in.sum().backward()


# loop_decode_attention


def decode_inputs(B=3, t=1, HQ=4, H=2, D=24, DV=40, S=50, slots=5, loops=None, dtype=FP32, device="cpu"):
    pool = (slots, S, H) if loops is None else (loops, slots, S, H)
    return {
        "q": torch.randn(B, t, HQ, D, device=device).to(dtype),
        "k_cache": torch.randn(*pool, D, device=device).to(dtype),
        "v_cache": torch.randn(*pool, DV, device=device).to(dtype),
    }


def check_decode(x, lengths, **options):
    dtype, device = x["q"].dtype, x["q"].device
    if dtype == torch.float16 and device.type == "cpu":
        pytest.skip("float16 is a CUDA dtype")
    lengths = torch.tensor(lengths, device=device)
    options = {n: torch.tensor(o, device=device) if isinstance(o, list) else o for n, o in options.items()}
    ours = loop_decode_attention(**x, lengths=lengths, **options)
    exact = reference.loop_decode_attention(**{n: c.double() for n, c in x.items()}, lengths=lengths, **options)
    plain = reference.loop_decode_attention(**x, lengths=lengths, **options)
    assert ours.dtype == dtype
    check_close("o", ours, exact, plain)
    empty = exact.flatten(2).norm(dim=-1) == 0
    assert not ours[empty].any()
    return ours


@both_dtypes
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 130])
def test_decode_lengths(length, dtype, device):
    for t in (1, 3):
        x = decode_inputs(t=t, S=130, dtype=dtype, device=device)
        check_decode(x, [length, max(length - 1, 0), 130])


@every_dtype
@pytest.mark.parametrize("D,DV", [(1, 1), (8, 20), (64, 64), (96, 96), (96, 128), (128, 128), (128, 130), (200, 512)])
def test_decode_head_dimensions(D, DV, dtype, device):
    check_decode(decode_inputs(t=2, D=D, DV=DV, dtype=dtype, device=device), [50, 17, 2])


@every_dtype
@pytest.mark.parametrize("HQ,H", [(1, 1), (6, 6), (6, 3), (8, 1), (20, 1)])
def test_decode_head_ratios(HQ, H, dtype, device):
    for t in (1, 4):
        check_decode(decode_inputs(t=t, HQ=HQ, H=H, dtype=dtype, device=device), [50, 33, 4])
    for D in (64, 128):
        check_decode(decode_inputs(t=8, HQ=HQ, H=H, D=D, DV=D, S=90, dtype=dtype, device=device), [90, 66, 5])


@both_dtypes
@pytest.mark.parametrize("D", [32, 64, 128])
def test_decode_long_context(D, dtype, device):
    check_decode(decode_inputs(B=2, S=5000, D=D, DV=D, dtype=dtype, device=device), [4999, 2049])
    check_decode(decode_inputs(B=3, t=3, S=2600, D=D, DV=D, dtype=dtype, device=device), [513, 0, 2600])


def selections(lengths, t, topk, device):
    """Distinct keys of each query in any order, among foreign ones."""
    lists = torch.full((len(lengths), t, topk), -1, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for i in range(t):
            visible = max(length - t + i + 1, 0)
            foreign = torch.tensor([visible, visible + 7, -5, 2**31 - 1, -(2**31)])
            entries = torch.cat([torch.randperm(visible)[: topk // 2], foreign])
            entries = entries[torch.randperm(len(entries))][:topk]
            lists[b, i, torch.randperm(topk)[: len(entries)]] = entries.int()
    return lists.to(device)


@every_dtype
@pytest.mark.parametrize("D,DV", [(24, 40), (64, 64), (96, 96), (128, 128)])
def test_decode_by_indices(D, DV, dtype, device):
    for t, topk in ((1, 1), (1, 40), (3, 1300)):
        lengths = [1500, 33, 3]
        x = decode_inputs(t=t, HQ=6, H=2, D=D, DV=DV, S=1500, dtype=dtype, device=device)
        o = check_decode(x, lengths, indices=selections(lengths, t, topk, device))
        assert o.any() or topk == 1


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("HQ,H,D", [(16, 16, 128), (8, 2, 64), (6, 2, 128), (32, 2, 128), (20, 1, 64)])
def test_decode_by_long_lists_in_batches_of_any_size(HQ, H, D, dtype, device):
    lengths = [2500, 40, 1, 2000, 0, 1999] * (7 if device == "cuda" else 1)
    x = decode_inputs(B=len(lengths), HQ=HQ, H=H, D=D, DV=D, slots=len(lengths), S=2500, dtype=dtype, device=device)
    for topk in (2048, 700, 65):
        indices = selections(lengths, 1, topk, device)
        o = check_decode(x, lengths, indices=indices)
        for rows in ([0], [1, 0], [3, 2, 5], [5, 4, 3, 2, 1, 0], [*range(13 % len(lengths))]):
            some = torch.tensor(rows, device=device), torch.tensor(lengths, device=device)
            caches = x["k_cache"], x["v_cache"]
            part = loop_decode_attention(x["q"][rows], *caches, some[1][rows], slots=some[0], indices=indices[rows])
            assert torch.equal(part, o[rows])


@both_dtypes
@pytest.mark.parametrize("D", [24, 64])
def test_decode_by_all_indices_is_dense(D, dtype, device):
    x = decode_inputs(B=2, t=2, D=D, DV=D, S=700, dtype=dtype, device=device)
    lengths = torch.tensor([700, 65], device=device)
    everything = torch.arange(700, dtype=torch.int32, device=device).expand(2, 2, 700).contiguous()
    sparse = loop_decode_attention(**x, lengths=lengths, indices=everything)
    dense = loop_decode_attention(**x, lengths=lengths)
    check_close("o", sparse, dense.double())


def test_decode_by_indices_in_slots_and_loops(device):
    x = decode_inputs(B=6, t=2, loops=3, device=device)
    lengths = [50, 3, 1, 20, 0, 7]
    indices = selections(lengths, 2, 9, device)
    check_decode(x, lengths, slots=[4, 0, 2, -1, 1, 4], loop_map=[0, 2, 1, 2, 0, 7], indices=indices)


@pytest.mark.parametrize("D", [24, 64])
def test_decode_reads_only_named_keys(D, device):
    for dtype in (FP32, BF16):
        x = decode_inputs(B=1, t=1, D=D, DV=D, slots=1, dtype=dtype, device=device)
        named = torch.tensor([[[7, -1, 3, 49, 60, 11]]], dtype=torch.int32, device=device)
        lengths = torch.tensor([50], device=device)
        o = loop_decode_attention(**x, lengths=lengths, indices=named)
        for cache in (x["k_cache"], x["v_cache"]):
            others = torch.ones(50, dtype=torch.bool, device=device)
            others[[7, 3, 49, 11]] = False
            cache[:, others] = float("nan")
        assert torch.equal(loop_decode_attention(**x, lengths=lengths, indices=named), o)
        x["v_cache"][:, 3] = float("nan")
        assert loop_decode_attention(**x, lengths=lengths, indices=named).isnan().all()


def test_decode_extreme_scores(device):
    x = decode_inputs(S=3000, slots=3, device=device)
    x["q"] *= 30
    x["q"][1] *= 1e4
    x["k_cache"][2, 1500:] *= 1e3
    lengths = torch.full((3,), 3000, device=device)
    ours = loop_decode_attention(**x, lengths=lengths)
    exact = reference.loop_decode_attention(**{n: c.double() for n, c in x.items()}, lengths=lengths)
    assert torch.isfinite(ours).all()
    assert (ours - exact).norm() < 1e-3 * exact.norm()


def test_decode_scale(device):
    check_decode(decode_inputs(device=device), [50, 33, 4], scale=0.7)


@pytest.mark.parametrize("lengths_dtype", [torch.int32, torch.int64])
def test_decode_slots_and_loops(device, lengths_dtype):
    x = decode_inputs(B=6, loops=3, device=device)
    slots, loops = [4, 0, 2, 2, 1, 4], [0, 2, 1, 2, 0, 1]
    check_decode(x, [50, 3, 1, 20, 0, 7], slots=slots, loop_map=loops)
    one_loop = decode_inputs(B=6, device=device)
    check_decode(one_loop, [50, 3, 1, 20, 0, 7], slots=slots)
    lengths = torch.tensor([50, 3, 1, 20, 0, 7], device=device)
    assert torch.equal(
        loop_decode_attention(**one_loop, lengths=lengths.to(lengths_dtype), slots=torch.tensor(slots, device=device)),
        loop_decode_attention(**one_loop, lengths=lengths, slots=torch.tensor(slots, device=device)),
    )


def test_decode_is_safe_for_any_value(device):
    huge = 2**62
    lengths = [50, 50, 50, -1, huge, -huge, 5]
    slots = [-1, 5, huge, 0, 1, 2, 3]
    x = decode_inputs(B=7, t=2, device=device)
    o = check_decode(x, lengths, slots=slots)
    assert not o[[0, 1, 2, 3, 5]].any()
    assert o[4].any()
    x = decode_inputs(B=4, loops=2, device=device)
    o = check_decode(x, [50] * 4, loop_map=[-1, 2, -huge, 1])
    assert not o[:3].any()
    assert o[3].any()


@both_dtypes
@pytest.mark.parametrize("D", [24, 64])
def test_decode_reads_only_visible_keys(D, dtype, device):
    x = decode_inputs(t=3, D=D, DV=D, dtype=dtype, device=device)
    lengths = torch.tensor([50, 33, 3], device=device)
    o = loop_decode_attention(**x, lengths=lengths)
    for cache in (x["k_cache"], x["v_cache"]):
        for b, length in enumerate(lengths.tolist()):
            cache[b, length:] = float("nan")
        cache[3:] = float("nan")
    assert torch.equal(loop_decode_attention(**x, lengths=lengths), o)
    for cache in (x["k_cache"], x["v_cache"]):  # the newest token: only the last query sees it
        for b, length in enumerate(lengths.tolist()):
            cache[b, length - 1] = float("nan")
    poisoned = loop_decode_attention(**x, lengths=lengths)
    assert torch.equal(poisoned[:, :2], o[:, :2])
    assert poisoned[:, 2].isnan().all()


@both_dtypes
def test_decode_new_tokens_at_once_or_one_by_one(dtype, device):
    for D, DV in ((24, 40), (64, 64)):
        x = decode_inputs(t=4, S=70, D=D, DV=DV, dtype=dtype, device=device)
        for lengths in ([70, 40, 4], [66, 2, 18]):
            lengths = torch.tensor(lengths, device=device)
            together = loop_decode_attention(**x, lengths=lengths)
            for i in range(4):
                one = loop_decode_attention(x["q"][:, i : i + 1], x["k_cache"], x["v_cache"], lengths - 3 + i)
                assert torch.equal(together[:, i : i + 1], one)


@both_dtypes
def test_decode_strided_caches(dtype, device):
    x = decode_inputs(loops=2, dtype=dtype, device=device)
    lengths, loop_map = torch.tensor([50, 33, 3], device=device), torch.tensor([1, 0, 1], device=device)
    o = loop_decode_attention(**x, lengths=lengths, loop_map=loop_map)
    packed = torch.cat([x["k_cache"], x["v_cache"]], -1).permute(3, 1, 0, 2, 4).contiguous().permute(2, 1, 3, 0, 4)
    k, v = packed.split([24, 40], -1)
    q = x["q"].transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(loop_decode_attention(q, k, v, lengths, loop_map=loop_map), o)


@both_dtypes
def test_threads_change_no_decode(dtype, threads):
    x = decode_inputs(S=4500, dtype=dtype)
    lengths = torch.tensor([4500, 2100, 5])
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(loop_decode_attention(**x, lengths=lengths))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@both_dtypes
@pytest.mark.parametrize("D", [24, 64])
def test_decode_nan_is_not_hidden(D, dtype, device):
    x = decode_inputs(D=D, DV=D, dtype=dtype, device=device)
    x["q"][0, 0, 0, 0] = float("nan")
    o = loop_decode_attention(**x, lengths=torch.tensor([50, 33, 3], device=device))
    assert o[0, 0, 0].isnan().all()
    assert torch.isfinite(o[0, 0, 1:]).all()


def test_decode_autocast(device):
    x = decode_inputs(dtype=BF16, device=device)
    lengths = torch.tensor([50, 33, 3], device=device)
    with torch.autocast(device, BF16):
        o = loop_decode_attention(x["q"].float(), x["k_cache"], x["v_cache"], lengths)
    assert torch.equal(o, loop_decode_attention(**x, lengths=lengths))


# loop_state_zero_, loop_state_copy_

STATE_DTYPES = [FP32, BF16, torch.int64, torch.uint8, torch.bool, torch.complex64]


def pools(dtype, device):
    """The same kind of pool in different layouts: contiguous, strided slots, loops outside, one scalar per slot."""
    values = torch.randint(2 if dtype == torch.bool else 100, (7, 3, 4, 5), device=device).to(dtype)
    yield values
    yield torch.cat([values, values], 1)[:, :3]
    yield values.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    yield values[:, 0, 0, 0]
    yield torch.empty(7, 0, device=device).to(dtype)


@pytest.mark.parametrize("dtype", STATE_DTYPES)
def test_zero(dtype, device):
    slots = torch.tensor([2, -1, 5, 7, 2, -(2**62), 2**62], device=device)
    for pool in pools(dtype, device):
        expected = pool.clone()
        expected[[2, 5]] = 0
        loop_state_zero_(pool, slots)
        assert torch.equal(pool, expected)


@pytest.mark.parametrize("dtype", STATE_DTYPES)
@pytest.mark.parametrize(
    "src,dst",
    [
        ([0, 1], [5, 6]),  # snapshot
        ([0, 0, 0], [1, 2, 3]),  # fork
        ([0, 1], [1, 0]),  # swap
        ([0, 1, 2, 3], [1, 2, 3, 4]),  # shift
        ([0, 1, 3], [3, 3, 6]),  # the last of two sources wins
        ([0, 1], [4, 0]),
        ([2, 2], [2, 2]),
        ([-1, 3, 7, 0, 2**62], [0, 4, 1, -1, 5]),
        ([], []),
    ],
)
def test_copy(dtype, src, dst, device):
    src, dst = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in (src, dst))
    for pool in pools(dtype, device):
        expected = reference.loop_state_copy(pool, src, dst)
        loop_state_copy_(pool, src, dst)
        assert torch.equal(pool, expected)


def test_large_slots(device, threads):
    threads(2)
    pool = torch.randn(4, 3, 300_000, device=device)
    expected = pool[[1, 0, 2, 2]]
    loop_state_copy_(pool, torch.tensor([0, 1, 2], device=device), torch.tensor([1, 0, 3], device=device))
    assert torch.equal(pool, expected)
    loop_state_zero_(pool, torch.tensor([3], device=device))
    expected[3] = 0
    assert torch.equal(pool, expected)


# contracts


def test_opcheck_residual():
    for grad in (False, True):
        x = residual_inputs("residual_rmsnorm", (2, 3, 20))
        h, h_in, rho, weight = (t.requires_grad_(grad) for t in x.values())
        torch.library.opcheck(torch.ops.lt2.loop_residual_fwd.default, (h, h_in, rho))
        torch.library.opcheck(torch.ops.lt2.loop_residual_rmsnorm_fwd.default, (h, h_in, rho, weight, 1e-6))
    x = [t.detach() for t in (h, h_in, rho)]
    torch.library.opcheck(torch.ops.lt2.loop_residual_bwd.default, x)
    args = (*x[:2], x[0], torch.rand(6), x[1], x[2], weight.detach())
    torch.library.opcheck(torch.ops.lt2.loop_residual_rmsnorm_bwd.default, args)


def test_opcheck_decode_and_slots():
    x, lengths = decode_inputs(loops=2), torch.tensor([50, 33, 3])
    loop_map, slots = torch.tensor([0, 1, 1]), torch.tensor([2, -1, 0])
    decode = torch.ops.lt2.loop_decode_attention.default
    torch.library.opcheck(decode, (*x.values(), lengths, slots, None, loop_map, 0.3))
    lists = selections([50, 33, 3], 1, 7, "cpu")
    torch.library.opcheck(decode, (*decode_inputs().values(), lengths.int(), None, lists, None, 0.3))
    pool = torch.randn(5, 3, 4)
    torch.library.opcheck(torch.ops.lt2.loop_state_zero_.default, (pool, slots))
    torch.library.opcheck(torch.ops.lt2.loop_state_copy_.default, (pool, slots, slots.flip(0)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def f(h, h_in, rho, weight):
        h = loop_residual(h * 2, h_in, rho)
        return loop_residual_rmsnorm(h, h_in, rho, weight)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (3, 5) if dynamic else (3,):
        x = residual_inputs("residual_rmsnorm", (2, T, 20))
        cotangents = residual_cotangents("residual_rmsnorm", x)
        assert_equal(with_gradients(compiled, x, cotangents), with_gradients(f, x, cotangents))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_decode_and_slots(dynamic):
    def f(q, k_cache, v_cache, lengths, slots):
        loop_state_copy_(k_cache, slots, slots.flip(0))
        o = loop_decode_attention(q + 0, k_cache, v_cache, lengths, slots=slots)
        loop_state_zero_(v_cache, slots[:1])
        return o * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    lengths, slots = torch.tensor([50, 33, 3]), torch.tensor([4, 0, 2])
    for t in (1, 3) if dynamic else (1,):
        x = decode_inputs(t=t)
        same = {n: c.clone() for n, c in x.items()}
        assert torch.equal(compiled(**x, lengths=lengths, slots=slots), f(**same, lengths=lengths, slots=slots))
        assert_equal(x, same)


RESIDUAL_REJECTED = {
    r"h must be float32 or bfloat16 \(or float16 on CUDA\), got float16": {"h": torch.ones(2, 6).half()},
    r"h_in must have the shape of h \[2, 6\], got \[1, 6\]": {"h_in": torch.ones(1, 6)},
    r"h_in must have the dtype of h \(float32\), got bfloat16": {"h_in": torch.ones(2, 6).bfloat16()},
    r"rho must be contiguous of shape \[6\], got \[1, 6\]": {"rho": torch.ones(1, 6)},
    "rho must have a float dtype, got torch.int64": {"rho": torch.ones(6, dtype=torch.int64)},
    r"weight must be contiguous of shape \[6\], got \[5\]": {"weight": torch.ones(5)},
}


@pytest.mark.parametrize("message", RESIDUAL_REJECTED)
def test_residual_rejects(message):
    x = {"h": torch.ones(2, 6), "h_in": torch.ones(2, 6), "rho": torch.ones(6), "weight": torch.ones(6)}
    x |= RESIDUAL_REJECTED[message]
    with pytest.raises((ValueError, RuntimeError), match="loop_residual(_rmsnorm)?: " + message):
        loop_residual_rmsnorm(**x)
    if "weight" not in message:
        del x["weight"]
        with pytest.raises((ValueError, RuntimeError), match="loop_residual: " + message):
            loop_residual(**x)


IDS = torch.zeros(3, dtype=torch.int64)
DECODE_REJECTED = {
    "indices must be int32, got int64": {"indices": torch.zeros(3, 1, 4, dtype=torch.int64)},
    r"indices must be contiguous of shape \[B, t, topk\] = \[3, 1, topk\], got \[3, 2, 4\]": {
        "indices": torch.zeros(3, 2, 4, dtype=torch.int32)
    },
    r"q must be float32 or bfloat16 \(or float16 on CUDA\), got float16": {"q": torch.ones(3, 1, 4, 24).half()},
    r"q must have shape \[B, t, HQ, D\], got \[3, 4, 24\]": {"q": torch.ones(3, 4, 24)},
    r"q must have a multiple of 2 heads, got shape \[3, 1, 5, 24\]": {"q": torch.ones(3, 1, 5, 24)},
    "k_cache must have head dimension 8": {"q": torch.ones(3, 1, 4, 8)},
    r"k_cache must have the dtype of q \(float32\)": {"k_cache": torch.ones(5, 50, 2, 24).bfloat16()},
    "k_cache must have 5 dimensions with loop_map": {"loop_map": IDS},
    "k_cache must have 4 dimensions without loop_map": {"k_cache": torch.ones(2, 5, 50, 2, 24)},
    r"v_cache must have the shape of k_cache .* but for the last axis, got \[5": {"v_cache": torch.ones(5, 49, 2, 40)},
    "v_cache must have a contiguous last axis": {"v_cache": torch.ones(5, 50, 40, 2).transpose(2, 3)},
    "lengths must be int32 or int64, got float32": {"lengths": torch.ones(3)},
    r"lengths must be contiguous of shape \[B\] = \[3\], got \[2\]": {"lengths": IDS[:2]},
    "slots must be int64, got int32": {"slots": IDS.int()},
    r"slots must be contiguous of shape \[B\] = \[3\], got \[1\]": {"slots": IDS[:1]},
}


@pytest.mark.parametrize("message", DECODE_REJECTED)
def test_decode_rejects(message):
    with pytest.raises((ValueError, RuntimeError), match="loop_decode_attention: " + message):
        loop_decode_attention(**{**decode_inputs(), "lengths": IDS} | DECODE_REJECTED[message])


def test_inference_only():
    x = decode_inputs()
    x["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="loop_decode_attention: inference only"):
        loop_decode_attention(**x, lengths=IDS)
    with torch.no_grad():
        loop_decode_attention(**x, lengths=IDS)
    with pytest.raises(RuntimeError, match="loop_state_zero_: inference only"):
        loop_state_zero_(torch.ones(3, requires_grad=True), IDS)


def test_slots_reject():
    pool = torch.ones(3, 4, 5)
    with pytest.raises(RuntimeError, match=r"loop_state: slots must be int64, got int32"):
        loop_state_zero_(pool, IDS.int())
    with pytest.raises(RuntimeError, match=r"loop_state: slots must be contiguous of shape \[3\], got \[1, 3\]"):
        loop_state_zero_(pool, IDS[None])
    with pytest.raises(RuntimeError, match=r"loop_state: dst must be contiguous of shape \[3\], got \[2\]"):
        loop_state_copy_(pool, IDS, IDS[:2])
    with pytest.raises(RuntimeError, match=r"loop_state: state must have shape \[slots, ..\], got \[\]"):
        loop_state_zero_(torch.ones(()), IDS)
    with pytest.raises(RuntimeError, match="one strided axis inside a slot"):
        loop_state_zero_(torch.ones(3, 4, 4, 4, 4)[:, :2, :3, :2], IDS)
    with pytest.raises(RuntimeError, match="the slots of state must not overlap"):
        loop_state_zero_(torch.ones(4).expand(3, 4), IDS)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa):
    tests = [f"{__file__}::test_{name}" for name in ("residual_against_oracle", "decode_lengths", "decode_head_ratios")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda", *tests]
    run = subprocess.run(command, env=os.environ | {"LT2_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
