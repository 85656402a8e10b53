"""causal_conv1d and causal_conv1d_step_ against the oracle, and against themselves."""

import os
import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch
from torch.nn import functional as F

from lt2_ext.ops import causal_conv1d, causal_conv1d_step_
from lt2_ext.reference.causal_conv1d import causal_conv1d as reference
from lt2_ext.testing import check_close, rel_err

FP32, BF16 = torch.float32, torch.bfloat16
LENGTHS = (0, 1, 2, 3, 5, 63, 64, 65, 130, 300)
VARLEN = torch.tensor([2, 2, 9, 9, 10, 12, 150, 200, 200])  # slack before and after, empty and short sequences

both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def inputs(B=2, T=64, D=70, W=4, dtype=FP32, sequences=None, device="cpu"):
    return {
        "x": torch.randn(B, T, D, device=device).to(dtype),
        "weight": torch.randn(D, W, device=device),
        "bias": torch.randn(D, device=device),
        "initial_state": torch.randn(B if sequences is None else sequences, D, W, device=device).to(dtype),
    }


def cotangents_for(inputs):
    return torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])


def with_gradients(op, tensors, dy, dfinal_state=None, **options):
    """Outputs and the gradients of all tensors; the final state is in the loss if it has a cotangent."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y, state = op(**leaves, output_final_state=True, **options)
    outputs, cotangents = ([y], [dy]) if dfinal_state is None else ([y, state], [dy, dfinal_state])
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, materialize_grads=True)
    return {"y": y.detach(), "final_state": state.detach()} | {
        f"d{name}": g for name, g in zip(leaves, grads, strict=True)
    }


def check_against_oracle(tensors, dy, dfinal_state=None, **options):
    dtype = tensors["x"].dtype
    double = {name: t.double() for name, t in tensors.items()}
    ours = with_gradients(causal_conv1d, tensors, dy, dfinal_state, **options)
    exact = with_gradients(
        reference, double, dy.double(), None if dfinal_state is None else dfinal_state.double(), **options
    )
    plain = with_gradients(reference, tensors, dy, dfinal_state, **options)
    for name, ref in exact.items():
        kind = "grad" if name.startswith("d") else "out"
        check_close(name, ours[name], ref, plain[name], kind, dtype)
    assert ours["y"].dtype == ours["final_state"].dtype == ours["dx"].dtype == dtype
    return ours


def assert_equal(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name}: differs by {rel_err(a[name], b[name]):.1e}"


@both_dtypes
@pytest.mark.parametrize("T", LENGTHS)
def test_against_oracle(device, T, dtype):
    for W in (1, 2, 4, 5, 8, 16):
        x = inputs(T=T, W=W, dtype=dtype, device=device)
        check_against_oracle(x, *cotangents_for(x))


@both_dtypes
def test_channel_counts(device, dtype):
    for D in (5, 15, 16, 64, 65, 200):
        x = inputs(T=9, D=D, dtype=dtype, device=device)
        check_against_oracle(x, *cotangents_for(x))


@pytest.mark.parametrize("options", list(product([False, True], repeat=4)))
def test_optional_arguments(device, options):
    bias, initial_state, final_state, varlen = options
    x = inputs(B=1 if varlen else 2, T=20, D=33, sequences=3 if varlen else None, device=device)
    dy, dfinal = cotangents_for(x)
    for name, given in (("bias", bias), ("initial_state", initial_state)):
        if not given:
            del x[name]
    cu_seqlens = torch.tensor([0, 1, 12, 20], device=device) if varlen else None
    for activation in ("silu", None):
        check_against_oracle(x, dy, dfinal if final_state else None, cu_seqlens=cu_seqlens, activation=activation)
    y, state = causal_conv1d(**x, cu_seqlens=cu_seqlens)
    assert state is None
    assert torch.equal(y, causal_conv1d(**x, cu_seqlens=cu_seqlens, output_final_state=True, activation="swish")[0])


@both_dtypes
@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
def test_varlen(device, dtype, offset_dtype):
    cu_seqlens = VARLEN.to(device, offset_dtype)
    x = inputs(B=1, T=210, dtype=dtype, sequences=len(VARLEN) - 1, device=device)
    dy, dfinal = cotangents_for(x)
    ours = check_against_oracle(x, dy, dfinal, cu_seqlens=cu_seqlens)
    outside = [*range(2), *range(200, 210)]
    assert not ours["y"][:, outside].any()
    assert not ours["dx"][:, outside].any()
    assert torch.equal(ours["final_state"][0], x["initial_state"][0])
    assert torch.equal(ours["dinitial_state"][0], dfinal[0])


def test_no_sequences_at_all(device):
    x = inputs(B=1, T=3, sequences=0, device=device)
    y, state = causal_conv1d(**x, output_final_state=True, cu_seqlens=torch.tensor([1], device=device))
    assert not y.any()
    assert state.shape == (0, 70, 4)
    grads = with_gradients(causal_conv1d, x, torch.randn_like(x["x"]), cu_seqlens=torch.tensor([1], device=device))
    assert not any(grads[name].any() for name in ("dx", "dweight", "dbias"))


@both_dtypes
def test_varlen_equals_separate_sequences(device, dtype):
    x = inputs(B=1, T=210, dtype=dtype, sequences=len(VARLEN) - 1, device=device)
    packed, state = causal_conv1d(**x, output_final_state=True, cu_seqlens=VARLEN.to(device))
    for n, (begin, end) in enumerate(pairwise(VARLEN.tolist())):
        alone = x | {"x": x["x"][:, begin:end], "initial_state": x["initial_state"][n : n + 1]}
        y, final = causal_conv1d(**alone, output_final_state=True)
        assert torch.equal(packed[:, begin:end], y)
        assert torch.equal(state[n : n + 1], final)


def test_documents_do_not_leak(device):
    cu_seqlens = torch.tensor([0, 70, 140], device=device)
    x = inputs(B=1, T=140, sequences=2, device=device)
    dy, dfinal = cotangents_for(x)
    a = with_gradients(causal_conv1d, x, dy, dfinal, cu_seqlens=cu_seqlens)
    for t in (x["x"], dy):
        t[:, :70] = torch.randn(1, 70, 70, device=device)
    for t in (x["initial_state"], dfinal):
        t[0] = float("nan")
    b = with_gradients(causal_conv1d, x, dy, dfinal, cu_seqlens=cu_seqlens)
    for name in ("y", "dx"):
        assert torch.equal(a[name][:, 70:], b[name][:, 70:])
    for name in ("final_state", "dinitial_state"):
        assert torch.equal(a[name][1], b[name][1])


def test_causal(device):
    x = inputs(T=200, device=device)
    y, _ = causal_conv1d(**x)
    x["x"][:, 150:] = float("nan")
    assert torch.equal(causal_conv1d(**x)[0][:, :150], y[:, :150])


@both_dtypes
def test_strides(device, dtype):
    B, T, D, W = 3, 70, 40, 4
    x = inputs(B, T, D, W, dtype, device=device)
    dy, dfinal = cotangents_for(x)
    expected = with_gradients(causal_conv1d, x, dy, dfinal)

    def padded(t):
        """The same values with gaps after every row, not aligned to vectors."""
        buffer = torch.full((*t.shape[:-1], t.shape[-1] + 7), float("nan"), dtype=t.dtype, device=device)
        buffer[..., 3 : 3 + t.shape[-1]] = t
        return buffer[..., 3 : 3 + t.shape[-1]]

    def permuted(t):
        return t.transpose(0, 2).contiguous().transpose(0, 2)

    for layout in (padded, permuted, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
        y, state = causal_conv1d(
            layout(leaves["x"]), leaves["weight"], leaves["bias"], layout(leaves["initial_state"]), True
        )
        grads = torch.autograd.grad((y, state), list(leaves.values()), (layout(dy), layout(dfinal)))
        actual = {"y": y, "final_state": state} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
        assert_equal(actual, expected)
    same_row = torch.randn(1, 1, D, device=device).to(dtype).expand(B, T, D)
    assert torch.equal(causal_conv1d(same_row, x["weight"])[0], causal_conv1d(same_row.clone(), x["weight"])[0])
    a = with_gradients(causal_conv1d, x, same_row)
    assert_equal(a, with_gradients(causal_conv1d, x, same_row.clone()))


@both_dtypes
def test_vectors_change_nothing(device, dtype):
    """Rows that are aligned for vectors of channels, and the same values in rows that are not."""
    x = inputs(T=300, D=64, dtype=dtype, device=device)
    dy, dfinal = cotangents_for(x)
    expected = with_gradients(causal_conv1d, x, dy, dfinal)

    def unaligned(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
        memory[1:] = t.flatten()
        return memory[1:].view_as(t)

    leaves = {n: t.detach().requires_grad_() for n, t in x.items()}
    y, state = causal_conv1d(**leaves | {"x": unaligned(leaves["x"])}, output_final_state=True)
    grads = torch.autograd.grad([y, state], list(leaves.values()), [unaligned(dy), dfinal])
    actual = {"y": y, "final_state": state} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    assert_equal(actual, expected)


@both_dtypes
def test_threads_change_nothing(device, dtype, threads):
    x = inputs(B=1, T=700, D=200, dtype=dtype, sequences=3, device=device)
    dy, dfinal = cotangents_for(x)
    cu_seqlens = torch.tensor([0, 300, 301, 700], device=device)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(with_gradients(causal_conv1d, x, dy, dfinal, cu_seqlens=cu_seqlens))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@both_dtypes
@pytest.mark.parametrize("W", [1, 4, 7])
def test_split_with_state_equals_whole(device, dtype, W):
    x = inputs(T=150, W=W, dtype=dtype, device=device)
    whole, last = causal_conv1d(**x, output_final_state=True)
    for pieces in ([1, 149], [3, 0, 64, 83], [128, 22], [2] * 75):
        ys, state = [], x["initial_state"]
        for piece in x["x"].split(pieces, 1):
            y, state = causal_conv1d(piece, x["weight"], x["bias"], state, True)
            ys.append(y)
        assert torch.equal(torch.cat(ys, 1), whole)
        assert torch.equal(state, last)


@both_dtypes
@pytest.mark.parametrize("W", [1, 4, 7])
def test_step_equals_sequence(device, dtype, W):
    x = inputs(T=13, W=W, dtype=dtype, device=device)
    whole, last = causal_conv1d(**x, output_final_state=True)
    for t in (1, 3, 13):
        pool = torch.full((W, 9, 70), float("nan"), dtype=dtype, device=device)
        pool = pool.permute(1, 2, 0)  # strided: taps outermost
        slots = torch.tensor([7, 2], device=device)
        pool[slots] = x["initial_state"]
        before = pool.clone()
        taps = (x["weight"], x["bias"])
        ys = [causal_conv1d_step_(pool, piece, *taps, slots=slots) for piece in x["x"].split(t, 1)]
        assert torch.equal(torch.cat(ys, 1), whole)
        assert torch.equal(pool[slots], last)
        others = [i for i in range(9) if i not in (7, 2)]
        torch.testing.assert_close(pool[others], before[others], equal_nan=True, rtol=0, atol=0)


@both_dtypes
def test_step_on_a_dense_pool(device, dtype):
    """States of four adjacent elements move at once; those of a pool that is not aligned to them do not."""
    x = inputs(T=3, D=64, dtype=dtype, device=device)
    whole, last = causal_conv1d(**x, output_final_state=True)
    memory = torch.empty(2 * 64 * 4 + 1, dtype=dtype, device=device)
    for pool in (memory[:-1].view(2, 64, 4), memory[1:].view(2, 64, 4)):
        pool.copy_(x["initial_state"])
        y = causal_conv1d_step_(pool, x["x"], x["weight"], x["bias"])
        assert torch.equal(y, whole)
        assert torch.equal(pool, last)


def test_step_of_one_token_without_slots(device):
    x = inputs(T=1, device=device)
    state = x["initial_state"].clone()
    y = causal_conv1d_step_(state, x["x"][:, 0], x["weight"], x["bias"], activation=None)
    expected, last = causal_conv1d(**x, output_final_state=True, activation=None)
    assert torch.equal(y, expected[:, 0])
    assert torch.equal(state, last)
    assert causal_conv1d_step_(state, x["x"][:, :0], x["weight"]).shape == (2, 0, 70)
    assert torch.equal(state, last)


@both_dtypes
def test_step_skips_slots_that_are_not_in_the_pool(device, dtype):
    x = inputs(B=5, T=2, dtype=dtype, device=device)
    pool = torch.randn(3, 70, 4, device=device).to(dtype)
    before = pool.clone()
    slots = torch.tensor([-1, 1, 3, -(2**62), 2**62], device=device)
    y = causal_conv1d_step_(pool, x["x"], x["weight"], slots=slots)
    assert not y[[0, 2, 3, 4]].any()
    assert y[1].any()
    assert torch.equal(pool[[0, 2]], before[[0, 2]])
    assert torch.equal(pool[1, :, 2:], x["x"][1].T)


def test_gradients_only_where_needed(device):
    x = inputs(T=20, device=device)
    dy, dfinal = cotangents_for(x)
    full = with_gradients(causal_conv1d, x, dy, dfinal)
    for name in x:
        leaves = {n: t.detach().requires_grad_(n == name) for n, t in x.items()}
        y, state = causal_conv1d(**leaves, output_final_state=True)
        torch.autograd.backward([t for t in (y, state) if t.requires_grad], [dy, dfinal])
        assert torch.equal(leaves[name].grad, full[f"d{name}"])
        assert all(t.grad is None for n, t in leaves.items() if n != name)
    leaves = {n: t.detach().requires_grad_() for n, t in x.items()}
    only_state = torch.autograd.grad(causal_conv1d(**leaves, output_final_state=True)[1], leaves["x"], dfinal)[0]
    assert torch.equal(only_state[:, -4:], dfinal.transpose(1, 2))
    assert not only_state[:, :-4].any()


def test_gradients_in_the_dtype_of_the_parameters(device):
    x = inputs(T=20, device=device)
    taps = [x[name].bfloat16().requires_grad_() for name in ("weight", "bias")]
    grads = torch.autograd.grad(causal_conv1d(x["x"], *taps)[0].sum(), taps)
    assert [g.dtype for g in grads] == [BF16, BF16]


def test_double_backward_is_an_error(device):
    x = inputs(T=5, device=device)["x"].requires_grad_()
    y, _ = causal_conv1d(x, torch.randn(70, 4, device=device))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


def test_autocast(device):
    x = inputs(T=5, device=device)
    with torch.autocast(device, BF16):
        y, state = causal_conv1d(**x, output_final_state=True)
    expected, last = causal_conv1d(x["x"].bfloat16(), x["weight"], x["bias"], x["initial_state"].bfloat16(), True)
    assert y.dtype == BF16
    assert torch.equal(y, expected)
    assert torch.equal(state, last)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device, grad):
    x = {n: t.requires_grad_(grad) for n, t in inputs(T=6, D=20, device=device).items()}
    packed = inputs(B=1, T=6, D=20, sequences=2, device=device)
    cu_seqlens = torch.tensor([0, 2, 6], device=device)
    fwd = torch.ops.lt2.causal_conv1d_fwd.default
    torch.library.opcheck(fwd, (x["x"], x["weight"], x["bias"], x["initial_state"], None, True, True))
    torch.library.opcheck(fwd, (x["x"], x["weight"], None, None, None, False, False))
    torch.library.opcheck(fwd, (packed["x"], packed["weight"], None, packed["initial_state"], cu_seqlens, True, True))
    if not grad:
        bwd = torch.ops.lt2.causal_conv1d_bwd.default
        dy, dfinal = cotangents_for(x)
        torch.library.opcheck(bwd, (dy, dfinal, x["x"], x["weight"], x["bias"], x["initial_state"], None, True))
        torch.library.opcheck(bwd, (dy, None, x["x"], x["weight"], None, None, None, False))
        step = torch.ops.lt2.causal_conv1d_step_.default
        state, slots = x["initial_state"].clone(), torch.tensor([1, -1], device=device)
        torch.library.opcheck(step, (state, x["x"], x["weight"], x["bias"], slots, True))
        torch.library.opcheck(step, (state, x["x"], x["weight"], None, None, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    def f(x, weight, bias, initial_state):
        y, state = causal_conv1d(x * 2, weight, bias, initial_state, True)
        return y + 1, state

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (6, 9) if dynamic else (6,):
        x = inputs(T=T, D=20, device=device)
        leaves = {n: t.requires_grad_() for n, t in x.items()}
        results = [with_gradients_of(g, leaves) for g in (f, compiled)]
        for eager, ours in zip(*results, strict=True):
            assert torch.equal(eager, ours)


def with_gradients_of(f, leaves):
    y, state = f(**leaves)
    return y, state, *torch.autograd.grad((y.sum() + (state * state).sum()), list(leaves.values()))


def test_compile_step(device):
    def f(state, x, weight, slots):
        return causal_conv1d_step_(state, x, weight, slots=slots) * 2

    x, slots = inputs(T=2, D=20, device=device), torch.tensor([1, 0], device=device)
    states = [x["initial_state"].clone() for _ in range(2)]
    args = (x["x"], x["weight"], slots)
    expected = f(states[0], *args)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(states[1], *args), expected)
    assert torch.equal(states[0], states[1])


REJECTED = {
    "activation must be": {"activation": "relu"},
    "x must be float32 or bfloat16 on cpu, got torch.float16": {"x": torch.randn(1, 5, 6).half()},
    r"x must have 3 dimensions, got shape \[5, 6\]": {"x": torch.randn(5, 6)},
    r"weight must have shape \[D, W\] = \[6, 4\], got \[5, 4\]": {"weight": torch.randn(5, 4)},
    r"weight must have 1 <= W <= 16, got shape \[6, 17\]": {"weight": torch.randn(6, 17)},
    "weight must have a float dtype, got torch.int64": {"weight": torch.ones(6, 4, dtype=torch.int64)},
    r"\*?bias must have shape \[D\] = \[6\], got \[4\]": {"bias": torch.randn(4)},
    r"initial_state must have shape \[N, D, W\] = \[1, 6, 4\], got \[2, 6, 4\]": {"initial_state": torch.ones(2, 6, 4)},
    r"x must have B = 1 with cu_seqlens": {"x": torch.randn(2, 5, 6), "cu_seqlens": torch.tensor([0, 5])},
    "cu_seqlens must be int32 or int64, got float32": {"cu_seqlens": torch.ones(2)},
    r"cu_seqlens must have shape \[N \+ 1\], got \[0\]": {"cu_seqlens": torch.ones(0)},
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    arguments = {"x": torch.randn(1, 5, 6), "weight": torch.randn(6, 4)} | REJECTED[message]
    with pytest.raises((ValueError, RuntimeError), match="causal_conv1d: " + message):
        causal_conv1d(**arguments)


def test_the_operators_themselves_name_their_arguments():
    """torch.ops is public too: what the Python functions check before them."""
    x, weight, slots = torch.randn(1, 5, 6), torch.randn(6, 4), torch.ones(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"causal_conv1d: bias must have shape \[D\] = \[6\], got \[4\]"):
        torch.ops.lt2.causal_conv1d_fwd(x, weight, torch.randn(4), None, None, True, False)
    with pytest.raises(RuntimeError, match=r"causal_conv1d: slots must have shape \[B\] = \[1\], got \[3\]"):
        torch.ops.lt2.causal_conv1d_step_(torch.ones(3, 6, 4), x, weight, None, slots, True)


@pytest.mark.parametrize("offsets", [[0, 3, 2, 5], [-1, 5], [0, 6], [0, 2**31 - 1]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rejects_offsets(offsets, dtype):
    with pytest.raises(RuntimeError, match=r"cu_seqlens must ascend within \[0, T = 5\], got"):
        causal_conv1d(torch.randn(1, 5, 6), torch.randn(6, 4), cu_seqlens=torch.tensor(offsets, dtype=dtype))


STEP_REJECTED = {
    r"state must have shape \[N, D, W\] = \[2, 6, 4\], got \[2, 6, 3\]": {"state": torch.ones(2, 6, 3)},
    "state must be float32, got bfloat16": {"state": torch.ones(2, 6, 4).bfloat16()},
    r"x must have shape \[B, t, D\] or \[B, D\], got \[6\]": {"x": torch.randn(6)},
    r"x must have at most 2 rows \(slots\), got 3": {"x": torch.randn(3, 6)},
    r"\*?slots must have shape \[B\] = \[2\], got \[3\]": {"slots": torch.ones(3, dtype=torch.int64)},
    r"\*?slots must be int64, got int32": {"slots": torch.ones(2, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", STEP_REJECTED)
def test_step_rejects(message):
    arguments = {"state": torch.ones(2, 6, 4), "x": torch.randn(2, 6), "weight": torch.randn(6, 4)}
    with pytest.raises((ValueError, RuntimeError), match="causal_conv1d(_step_)?: " + message):
        causal_conv1d_step_(**arguments | STEP_REJECTED[message])


def test_step_rejects_gradients_and_duplicates(checks):
    state, x, weight = torch.ones(2, 6, 4), torch.randn(2, 6), torch.randn(6, 4)
    with pytest.raises(RuntimeError, match="causal_conv1d_step_: inference only"):
        causal_conv1d_step_(state, x, weight.clone().requires_grad_())
    with torch.no_grad():
        causal_conv1d_step_(state, x, weight.clone().requires_grad_(), slots=torch.tensor([-1, -1]))
    with pytest.raises(ValueError, match=r"slots must name no slot twice, got \[1, 1\]"):
        causal_conv1d_step_(state, x, weight, slots=torch.tensor([1, 1]))


def test_float16_on_cuda(device):
    if device == "cpu":
        pytest.skip("float16 is a CUDA dtype here; the CPU rejects it (test_rejects)")
    x = inputs(T=130, D=64, dtype=torch.float16, device=device)
    check_against_oracle(x, *cotangents_for(x))
    whole, last = causal_conv1d(**x, output_final_state=True)
    state = x["initial_state"].clone()
    assert torch.equal(causal_conv1d_step_(state, x["x"], x["weight"], x["bias"]), whole)
    assert torch.equal(state, last)


def test_oracle():
    x = {n: t.double() for n, t in inputs(B=2, T=7, D=3, W=4).items()}
    inputs_with_state = torch.cat([x["initial_state"][..., 1:], x["x"].transpose(1, 2)], 2)
    y = F.silu(F.conv1d(inputs_with_state, x["weight"][:, None], x["bias"], groups=3)).transpose(1, 2)
    torch.testing.assert_close(reference(**x)[0], y)
    leaves = [t.requires_grad_() for t in x.values()]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, output_final_state=True), leaves)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa):
    tests = [f"{__file__}::{name}" for name in ("test_against_oracle", "test_varlen", "test_step_equals_sequence")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, env=os.environ | {"LT2_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
