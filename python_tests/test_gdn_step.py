"""gated_delta_step_: decode in place on a pool of states."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lt2_ext import testing
from lt2_ext.ops import fused_recurrent_gated_delta_rule, gated_delta_step_
from lt2_ext.reference import gdn as reference
from lt2_ext.testing import check_close, rel_err

FP32, BF16 = torch.float32, torch.bfloat16

both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def step_inputs(B=3, t=1, H=2, HV=4, K=32, V=48, slots=None, dtype=FP32, gate_dtype=None, device="cpu"):
    """Arguments of gated_delta_step_; q and k are not normalised."""
    gate_dtype = dtype if gate_dtype is None else gate_dtype
    return {
        "state": torch.randn(slots or B, HV, K, V, device=device),
        "q": torch.randn(B, t, H, K, device=device).to(dtype),
        "k": torch.randn(B, t, H, K, device=device).to(dtype),
        "v": torch.randn(B, t, HV, V, device=device).to(dtype),
        "a": (2 * torch.randn(B, t, HV, device=device)).to(gate_dtype),
        "b": torch.randn(B, t, HV, device=device).to(gate_dtype),
        "A_log": torch.randn(HV, device=device),
        "dt_bias": torch.randn(HV, device=device),
    }


def check_against_oracle(x, **options):
    """Output and pool against the float64 oracle and plain torch; slots that no row names keep every bit."""
    exact_o, exact_state = reference.gated_delta_step(**{n: t.double() for n, t in x.items()}, **options)
    plain_o, plain_state = reference.gated_delta_step(**x, **options)
    before = x["state"].clone()
    state = x["state"].clone(memory_format=torch.preserve_format)
    o = gated_delta_step_(**x | {"state": state}, **options)
    dtype = x["q"].dtype
    assert o.dtype == dtype
    check_close("o", o, exact_o, plain_o, dtype=dtype)
    check_close("state", state, exact_state, plain_state, dtype=dtype)
    untouched = torch.ones(len(state), dtype=torch.bool, device=state.device)
    slots = options.get("slots")
    untouched[: len(o)] = False
    if slots is not None:
        untouched[:] = True
        untouched[slots[(slots >= 0) & (slots < len(state))]] = False
    assert torch.equal(state[untouched], before[untouched])
    return o, state


@both_dtypes
@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
@pytest.mark.parametrize("K, V", [(128, 128), (64, 40), (33, 50)])
def test_bf16_state(device, K, V, v_first, dtype):
    """It is what a float32 state of the same numbers gives, rounded once."""
    for t in (1, 3):
        x = step_inputs(t=t, K=K, V=V, slots=5, dtype=dtype, device=device)
        slots, options = torch.tensor([3, -1, 0], device=device), {"state_v_first": v_first}
        pool = x["state"].mT.contiguous() if v_first else x["state"]
        rounded, exact = pool.bfloat16(), pool.bfloat16().float()
        o = gated_delta_step_(**x | {"state": rounded}, slots=slots, **options)
        expected = gated_delta_step_(**x | {"state": exact}, slots=slots, **options)
        assert torch.equal(o, expected)
        assert torch.equal(rounded, exact.bfloat16())


@both_dtypes
@pytest.mark.parametrize("t", range(1, 9))
def test_tokens(device, t, dtype):
    check_against_oracle(step_inputs(t=t, dtype=dtype, device=device))


@both_dtypes
@pytest.mark.parametrize(
    "K, V, H, HV",
    [(8, 8, 1, 2), (24, 40, 2, 4), (96, 192, 1, 1), (100, 36, 2, 2), (1, 3, 1, 1), (128, 128, 1, 4), (256, 512, 1, 1)],
)
def test_sizes(device, K, V, H, HV, dtype):
    check_against_oracle(step_inputs(B=2, t=2, K=K, V=V, H=H, HV=HV, dtype=dtype, device=device))


@both_dtypes
@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("B", [2, 40], ids=["few", "many"])
@pytest.mark.parametrize("K, V", [(64, 64), (96, 192), (128, 128), (192, 384), (256, 36), (20, 512), (132, 20)])
def test_head_shapes(device, K, V, B, t, v_first, dtype):
    """Few and many rows: states are cut into finer or coarser pieces."""
    x = step_inputs(B=B, t=t, K=K, V=V, dtype=dtype, device=device)
    if v_first:
        x["state"] = x["state"].mT.contiguous()
    check_against_oracle(x, state_v_first=v_first)


@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
@pytest.mark.parametrize("offset, pitch", [(1, 64), (0, 66), (4, 68)])
def test_unaligned_pool(device, offset, pitch, v_first):
    """Rows of states that do not begin at multiples of 16 bytes."""
    x = step_inputs(B=2, t=2, K=64, V=64, device=device)
    if v_first:
        x["state"] = x["state"].mT.contiguous()
    memory = torch.full((offset + 2 * 4 * 64 * pitch,), float("nan"), device=device)
    view = memory[offset:].view(2, 4, 64, pitch)[..., :64]
    view.copy_(x["state"])
    o = gated_delta_step_(**x | {"state": view}, state_v_first=v_first)
    expected_o, expected = check_against_oracle(x, state_v_first=v_first)
    assert rel_err(o, expected_o) < 1e-6
    assert rel_err(view, expected) < 1e-6
    assert int(memory.isnan().sum()) == memory.numel() - view.numel()


@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
def test_float16_on_cuda(device, v_first):
    if device == "cpu":
        pytest.skip("float16 is a CUDA dtype here; the CPU rejects it")
    x = step_inputs(t=3, K=128, V=128, dtype=torch.float16, device=device)
    if v_first:
        x["state"] = x["state"].mT.contiguous()
    check_against_oracle(x, state_v_first=v_first)


@both_dtypes
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("l2norm, neg_eigval, scale", [(False, False, None), (True, True, 0.3), (True, False, 1.0)])
def test_options(device, v_first, l2norm, neg_eigval, scale, dtype):
    x = step_inputs(t=3, dtype=dtype, gate_dtype=BF16, device=device)
    if v_first:
        x["state"] = x["state"].mT.contiguous()
    if not l2norm:
        x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    options = {"use_qk_l2norm_in_kernel": l2norm, "allow_neg_eigval": neg_eigval, "scale": scale}
    check_against_oracle(x, state_v_first=v_first, **options)


@both_dtypes
def test_slots(device, dtype):
    """Rows without a valid slot write nothing and give zeros, whatever the slots of others hold."""
    x = step_inputs(B=6, t=2, slots=9, dtype=dtype, device=device)
    slots = torch.tensor([7, -1, 0, 9, 3, -5], device=device)
    o, _ = check_against_oracle(x, slots=slots)
    assert o[[1, 3, 5]].count_nonzero() == 0
    x["state"][[1, 2, 4, 5, 6, 8]] = float("nan")
    o2 = gated_delta_step_(**x, slots=slots)
    assert torch.equal(o, o2)
    assert x["state"][[1, 2, 4, 5, 6, 8]].isnan().all()
    assert not x["state"][[0, 3, 7]].isnan().any()


@pytest.mark.parametrize("slots", [2**40, -(2**40), 2**31, -(2**63)])
def test_any_slot_value_is_memory_safe(device, slots):
    x = step_inputs(B=1, slots=2, device=device)
    before = x["state"].clone()
    o = gated_delta_step_(**x, slots=torch.tensor([slots], device=device))
    assert o.count_nonzero() == 0
    assert torch.equal(x["state"], before)


@pytest.mark.parametrize("v_first", [False, True])
def test_strided_pool(device, v_first):
    """The pool is one loop's part of [slots, loops, heads, K, V]; its neighbours keep every bit."""
    x = step_inputs(B=2, t=2, slots=5, device=device)
    if v_first:
        x["state"] = x["state"].mT.contiguous()
    pool = torch.randn(5, 3, 6, *x["state"].shape[2:], device=device)
    view = pool[:, 1, 1:5]
    view.copy_(x["state"])
    before = pool.clone()
    slots = torch.tensor([4, 1], device=device)
    o = gated_delta_step_(**x | {"state": view}, slots=slots, state_v_first=v_first)
    expected = gated_delta_step_(**x, slots=slots, state_v_first=v_first)
    assert torch.equal(o, expected)
    assert torch.equal(view, x["state"])
    pool[:, 1, 1:5] = before[:, 1, 1:5]
    assert torch.equal(pool, before)


def test_strided_inputs(device):
    x = step_inputs(B=2, t=3, K=24, V=24, device=device)
    state = x["state"].clone()
    expected = gated_delta_step_(**x | {"state": state})
    views = {}
    for name, t in x.items():
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), device=device)
        views[name] = wide[..., 1::2]
        views[name].copy_(t)
    views["state"] = x["state"].clone()
    assert torch.equal(gated_delta_step_(**views), expected)
    assert torch.equal(views["state"], state)


@both_dtypes
def test_steps_equal_the_recurrence(device, dtype):
    """Eight tokens in one step, in uneven steps, one by one, and by the sequence operator."""
    x = step_inputs(t=8, dtype=dtype, device=device)
    tokens = ("q", "k", "v", "a", "b")
    o, final = fused_recurrent_gated_delta_rule(
        x["q"], x["k"], x["v"], x["a"], x["b"], None, x["state"], True, True, True, x["A_log"], x["dt_bias"], True
    )
    for sizes in ([8], [1] * 8, [3, 1, 4]):
        state, pieces = x["state"].clone(), []
        for part in zip(*(x[n].split(sizes, 1) for n in tokens), strict=True):
            pieces.append(gated_delta_step_(state, *part, x["A_log"], x["dt_bias"]))
        assert rel_err(torch.cat(pieces, 1), o) < testing.TOLERANCE[dtype]["out"][0]
        assert rel_err(state, final) < 1e-5


def test_saturated_gates(device):
    x = step_inputs(B=1, t=8, K=16, V=16, device=device)
    x["a"] = torch.linspace(-100, 100, 32, device=device).view(1, 8, 4)
    x["b"] = x["a"].flip(1)
    x["A_log"] = torch.tensor([0.0, 3.0, -50.0, 5.0], device=device)
    check_against_oracle(x)


def test_deterministic(device, threads):
    x = step_inputs(B=8, t=2, H=4, HV=8, dtype=BF16, device=device)
    threads(1)
    state = x["state"].clone()
    first = gated_delta_step_(**x | {"state": state})
    for n in (2, 3, 2):
        threads(n)
        other = x["state"].clone()
        assert torch.equal(gated_delta_step_(**x | {"state": other}), first)
        assert torch.equal(other, state)


@pytest.mark.cuda
@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
def test_steps_in_a_row_wait_for_each_other(v_first):
    """Kernels of a stream overlap, but not before the inputs, the state and the outputs of the one before are there:
    in a CUDA graph, eagerly, and one at a time the same bits."""
    x = step_inputs(B=4, H=4, HV=8, K=128, V=128, dtype=BF16, device="cuda")
    scratch = [torch.empty_like(x[n]) for n in "qkv"]

    def steps(state, wait):
        total = torch.zeros(4, 1, 8, 128, device="cuda")
        for i in range(20):
            for t, n in zip(scratch, "qkv", strict=True):
                torch.mul(x[n], 1 + i / 16, out=t)  # the next step's inputs, in the memory of the last one's
            a = x["a"] + total[..., 0].to(BF16)
            total += gated_delta_step_(state, *scratch, a, x["b"], x["A_log"], x["dt_bias"], state_v_first=v_first)
            if wait:
                torch.cuda.synchronize()
        return total

    states = [x["state"].clone() for _ in range(3)]
    expected = steps(states[0], wait=True)
    for _ in range(20):
        states[1].copy_(x["state"])
        assert torch.equal(steps(states[1], wait=False), expected)
        assert torch.equal(states[1], states[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = steps(states[2], wait=False)
    for _ in range(20):
        states[2].copy_(x["state"])
        graph.replay()
        assert torch.equal(total, expected)
        assert torch.equal(states[2], states[0])


def test_threads_of_python(device):
    x = step_inputs(B=8, device=device)
    expected_state = x["state"].clone()
    expected = gated_delta_step_(**x | {"state": expected_state})
    state = x["state"].clone()

    def one(row):
        mine = {n: x[n][row : row + 1] for n in ("q", "k", "v", "a", "b")}
        slots = torch.tensor([row], device=device)
        return gated_delta_step_(state, **mine, A_log=x["A_log"], dt_bias=x["dt_bias"], slots=slots)

    with ThreadPoolExecutor(8) as executor:
        assert torch.equal(torch.cat(list(executor.map(one, range(8)))), expected)
    assert torch.equal(state, expected_state)


def test_no_rows(device):
    x = step_inputs(B=0, slots=2, device=device)
    before = x["state"].clone()
    assert gated_delta_step_(**x).shape == (0, 1, 4, 48)
    assert torch.equal(x["state"], before)


def test_more_slots_than_rows(device):
    check_against_oracle(step_inputs(B=2, slots=5, device=device))


def test_inputs_that_require_a_gradient_are_an_error(device):
    x = step_inputs(device=device)
    x["A_log"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"gated_delta_step_: inference only, call it under torch.no_grad\(\)"):
        gated_delta_step_(**x)
    with torch.no_grad():
        gated_delta_step_(**x)


def test_autocast(device):
    x = step_inputs(device=device)
    low = {n: t.to(BF16) if n in ("q", "k", "v") else t.clone() for n, t in x.items()}
    expected = gated_delta_step_(**low)
    with torch.autocast(device, dtype=BF16):
        o = gated_delta_step_(**x)
    assert o.dtype == BF16
    assert torch.equal(o, expected)
    assert torch.equal(x["state"], low["state"])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_public_function_compiles_in_one_graph(device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(gated_delta_step_, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B in (3, 4):
        x = step_inputs(B=B, t=2, slots=6, dtype=BF16, device=device)
        slots = torch.arange(B, device=device) - 1
        state = x["state"].clone()
        expected = gated_delta_step_(**x | {"state": state}, slots=slots)
        with torch.no_grad():
            assert torch.equal(compiled(**x, slots=slots), expected)
        assert torch.equal(x["state"], state)


def zeros(*sizes, dtype=FP32):
    return torch.zeros(sizes, dtype=dtype)


REJECTED = {
    "tokens": (
        {n: zeros(2, 9, 4, 8) for n in "qkv"} | {n: zeros(2, 9, 4) for n in "ab"},
        RuntimeError, "q must have T in 1..8, got 9",
    ),
    "no_tokens": (
        {n: zeros(2, 0, 4, 8) for n in "qkv"} | {n: zeros(2, 0, 4) for n in "ab"},
        RuntimeError, "q must have T in 1..8, got 0",
    ),
    "k_shape": ({"k": zeros(2, 1, 2, 9)}, RuntimeError, r"k must have shape \[B, T, H, K\] = \[2, 1, 2, 8\], got"),
    "heads": (
        {"v": zeros(2, 1, 3, 8)}, RuntimeError, "v must have a multiple of q's heads, got 3 and 2",
    ),
    "dtype": ({"v": zeros(2, 1, 4, 8, dtype=BF16)}, ValueError, r"v must have the dtype of q \(torch.float32\), got"),
    "double": ({n: zeros(2, 1, 4, 8, dtype=torch.float64) for n in "qkv"}, ValueError, "q must be float32.* bfloat16"),
    "a_shape": ({"a": zeros(2, 1, 2)}, RuntimeError, r"a must have shape \[B, T, HV\] = \[2, 1, 4\], got \[2, 1, 2\]"),
    "b_dtype": ({"b": zeros(2, 1, 4, dtype=BF16)}, ValueError, r"b must have the dtype of a \(torch.float32\), got"),
    "ab_double": (
        {n: zeros(2, 1, 4, dtype=torch.float64) for n in "ab"}, RuntimeError, "a must be float32 or bfloat16",
    ),
    "A_log": ({"A_log": zeros(3)}, RuntimeError, r"A_log must have shape \[HV\] = \[4\], got \[3\]"),
    "dt_bias": ({"dt_bias": zeros(4, 1)}, RuntimeError, r"dt_bias must have shape \[HV\] = \[4\], got \[4, 1\]"),
    "state_shape": (
        {"state": zeros(3, 4, 8, 9)}, RuntimeError,
        r"state must have shape \[slots, HV, K, V\] = \[3, 4, 8, 8\], got \[3, 4, 8, 9\]",
    ),
    "state_3d": ({"state": zeros(4, 8, 8)}, RuntimeError, "state must have 4 dimensions"),
    "state_dtype": (
        {"state": zeros(3, 4, 8, 8, dtype=torch.float16)}, RuntimeError,
        "state must be float32 or bfloat16, got float16",
    ),
    "state_stride": (
        {"state": zeros(3, 4, 8, 8).mT}, RuntimeError, "state must have a contiguous last axis, got stride 8",
    ),
    "few_slots": ({"state": zeros(1, 4, 8, 8)}, RuntimeError, "state must have at least B = 2 slots, got 1"),
    "slots_shape": ({"slots": zeros(3, dtype=torch.int64)}, RuntimeError, r"slots must have shape \[B\] = \[2\], got"),
    "slots_dtype": ({"slots": zeros(2, dtype=torch.int32)}, RuntimeError, "slots must be int64, got int32"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_inputs(device, case):
    change, error, message = REJECTED[case]
    x = {"state": zeros(3, 4, 8, 8), "q": zeros(2, 1, 2, 8), "k": zeros(2, 1, 2, 8), "v": zeros(2, 1, 4, 8),
         "a": zeros(2, 1, 4), "b": zeros(2, 1, 4), "A_log": zeros(4), "dt_bias": zeros(4)} | change  # fmt: skip
    with pytest.raises(error, match=message):
        gated_delta_step_(**{n: t.to(device) for n, t in x.items()})


@pytest.mark.usefixtures("checks")
def test_a_slot_used_twice_is_found_by_checks(device):
    x = step_inputs(B=3, device=device)
    gated_delta_step_(**x, slots=torch.tensor([2, -1, -1], device=device))
    with pytest.raises(ValueError, match=r"gated_delta_step_: slots must name no slot twice, got \[2, 0, 2\]"):
        gated_delta_step_(**x, slots=torch.tensor([2, 0, 2], device=device))
