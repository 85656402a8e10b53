"""chunk_gated_delta_rule and fused_recurrent_gated_delta_rule against the oracle, and against themselves; the same
kernels without the delta rule."""

import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations, product

import pytest
import torch
from torch.nn import functional as F

from lt2_ext import testing
from lt2_ext.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, gdn
from lt2_ext.reference import gdn as reference
from lt2_ext.testing import gdn_inputs, rel_err, with_gradients


def without_delta(recurrent):
    """The simple rule with every option of the gated delta rule; the public functions have fewer."""
    name = "fused_recurrent_simple_gla" if recurrent else "chunk_simple_gla"
    options = dict.fromkeys(("use_qk_l2norm", "use_gate", "use_beta_sigmoid", "allow_neg_eigval"), False)
    options |= dict.fromkeys(("A_log", "dt_bias", "scale", "initial_state", "cu_seqlens", "cu_seqlens_cpu"))
    options |= {"output_final_state": False, "state_v_first": False}

    def op(q, k, v, g=None, beta=None, **given):
        given = {n.removesuffix("_in_kernel"): value for n, value in given.items()}
        return gdn.delta_rule(name, recurrent, q, k, v, g, beta, **options | given, delta=False)

    return op


OPS = {"chunk": chunk_gated_delta_rule, "recurrent": fused_recurrent_gated_delta_rule}
SIMPLE = {"simple": without_delta(False), "simple_recurrent": without_delta(True)}
RULES = OPS | SIMPLE
RECURRENT = (OPS["recurrent"], SIMPLE["simple_recurrent"])
GATES = ("zero", "small", "logsigmoid", "strong16", "-8", "-30", "-100", "mixed", "reset")
BETA_OF = {"long": "0.2"}  # of keys: so that beta |k|^2 is below 2 and nothing grows
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 57, 59, 61, 63, 64, 65, 127, 129, 200)
FP32, BF16 = torch.float32, torch.bfloat16

both_ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_rule = pytest.mark.parametrize("op", RULES.values(), ids=RULES)
by_chunks = pytest.mark.parametrize("op", [OPS["chunk"], SIMPLE["simple"]], ids=["delta", "simple"])
both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def cotangents_for(x, **options):
    """Random gradients of o and final_state."""
    with torch.no_grad():
        o, state = chunk_gated_delta_rule(**x, output_final_state=True, **options)
    return {"o": torch.randn_like(o), "final_state": torch.randn_like(state)}


def double(tensors):
    return {name: t.double() for name, t in tensors.items()}


def check_against_oracle(op, x, cotangents=None, hard=False, **options):
    """Outputs and all gradients against the float64 oracle and plain torch in the dtype of q; returns the results."""
    dtype = x["q"].dtype
    cotangents = cotangents or cotangents_for(x, **options)
    ours = with_gradients(op, x, cotangents, **options)
    oracle = partial(reference.gated_delta_rule, delta=op not in SIMPLE.values())
    exact = with_gradients(oracle, double(x), double(cotangents), **options)
    plain = [
        with_gradients(partial(oracle, rule=rule), x, cotangents, **options)
        for rule in plain_rules(op, dtype, x["q"].device)
    ]
    assert ours["o"].dtype == dtype
    assert ours["final_state"].dtype == FP32
    for name, ref in exact.items():
        worst = max((p[name] for p in plain), key=lambda out, ref=ref: rel_err(out, ref))
        testing.check_close(name, ours[name], ref, worst, testing.gradient_kind(name), dtype, hard)
    return ours


def plain_rules(op, dtype, device):
    """The formulations in plain torch that the kernel may follow: on CUDA the dtype and shape decide whether it works
    by chunks or token by token, which round differently (with equal keys by three times)."""
    chunks = partial(reference.chunks, operands=None if dtype == FP32 else dtype)
    if op in RECURRENT:
        return [reference.recurrence]
    return [chunks, reference.recurrence] if device.type == "cuda" else [chunks]


def assert_equal(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name}: differs by {rel_err(a[name], b[name]):.1e}"


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_two_formulations_of_the_oracle_agree(gate, delta):
    x = double(gdn_inputs(T=130, HV=4, K=12, V=20, gate=gate, sequences=4))
    cotangents = {"o": torch.randn(1, 130, 4, 20).double(), "final_state": torch.randn(4, 4, 12, 20).double()}
    options = {"cu_seqlens": torch.tensor([1, 1, 40, 41, 128]), "delta": delta}
    a = with_gradients(reference.gated_delta_rule, x, cotangents, **options)
    b = with_gradients(partial(reference.gated_delta_rule, rule=reference.chunks), x, cotangents, **options)
    for name in a:
        assert rel_err(b[name], a[name]) < 1e-12, name


def test_gradients_of_the_oracle():
    x = double(gdn_inputs(T=5, HV=4, K=3, V=2))
    names = list(x)

    def f(*tensors):
        return reference.gated_delta_rule(**dict(zip(names, tensors, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in x.values()])


def planted_bugs():
    def wrong_head(q, k, v, g, beta, **kw):
        q, k = (x.repeat(1, 1, v.shape[2] // x.shape[2], 1) for x in (q, k))
        return reference.gated_delta_rule(q, k, v, g, beta, **kw)

    def late_beta(q, k, v, g, beta, **kw):
        return reference.gated_delta_rule(q, k, v, g, beta.roll(1, 1), **kw)

    def erase_before_decay(q, k, v, g, beta, **kw):
        return reference.gated_delta_rule(q, k, v, F.pad(g[:, 1:], (0, 0, 0, 1)), beta, **kw)

    def bad_last_row(*args, **kw):
        o, state = reference.gated_delta_rule(*args, **kw)
        return torch.cat([o[:, :-1], o[:, -2:-1]], 1), state

    def one_nan(*args, **kw):
        o, state = reference.gated_delta_rule(*args, **kw)
        return o.index_fill(1, torch.tensor([7]), float("nan")), state

    def half_scale(*args, **kw):
        o, state = reference.gated_delta_rule(*args, **kw)
        return o * 1.001, state

    return {f.__name__: f for f in (wrong_head, late_beta, erase_before_decay, bad_last_row, one_nan, half_scale)}


@pytest.mark.parametrize("bug", planted_bugs())
def test_the_comparison_finds_planted_bugs(bug):
    def broken(q, k, v, g, beta, **kw):
        return planted_bugs()[bug](q, k, v, g, beta, **kw)

    with pytest.raises(AssertionError, match="relative error"):
        check_against_oracle(broken, gdn_inputs(T=66, HV=4, K=16, V=16))


@both_dtypes
@by_chunks
@pytest.mark.parametrize("gate", GATES)
def test_gates(device, gate, op, dtype):
    x = gdn_inputs(T=130, dtype=dtype, gate=gate, device=device)
    check_against_oracle(op, x, hard=gate in testing.STRONG_GATES)


@both_dtypes
@by_chunks
@pytest.mark.parametrize("beta", ["0", "1", "0.835", "2", "negative"])
def test_betas(device, beta, op, dtype):
    check_against_oracle(op, gdn_inputs(T=70, K=32, dtype=dtype, beta=beta, device=device))


@both_dtypes
@every_rule
def test_equal_keys(device, op, dtype):
    x = gdn_inputs(T=130, K=128, V=128, dtype=dtype, keys="equal", gate="-1e-3", beta="0.835", device=device)
    check_against_oracle(op, x, hard=True)


@both_dtypes
@pytest.mark.parametrize("keys", ["onehot", "rank2", "zero_rows", "long"])
def test_keys(device, keys, dtype):
    x = gdn_inputs(T=130, dtype=dtype, keys=keys, gate="small", beta=BETA_OF.get(keys, "sigmoid"), device=device)
    check_against_oracle(chunk_gated_delta_rule, x, hard=keys == "rank2")


@pytest.mark.parametrize("T", LENGTHS)
def test_lengths(device, T):
    x = gdn_inputs(T=T, H=1, HV=2, K=32, V=32, device=device)
    for op in RULES.values():
        check_against_oracle(op, x)
    x = gdn_inputs(T=T, K=32, V=32, gate="mixed", dtype=BF16, device=device)
    check_against_oracle(chunk_gated_delta_rule, x, hard=True)
    check_against_oracle(SIMPLE["simple"], x, hard=True)


@pytest.mark.slow
@pytest.mark.parametrize("T", [*range(128, 192), 1026, 4097])
def test_every_tail(device, T):
    for dtype in (FP32, BF16):
        check_against_oracle(chunk_gated_delta_rule, gdn_inputs(T=T, dtype=dtype, device=device))


SIZES = [(8, 8, 1, 2), (24, 29, 2, 4), (96, 192, 1, 1), (100, 36, 2, 2), (1, 3, 1, 1), (256, 512, 1, 1)]
SIZES += [(80, 40, 2, 4), (256, 64, 1, 2)]
SIZES += [(128, 128, 1, 4), (64, 192, 2, 2), (96, 128, 1, 3), (128, 64, 2, 2), (192, 384, 1, 1)]
SIZES += [(64, 64, 34, 34), (64, 128, 17, 34), (64, 192, 24, 48)]  # more slices than multiprocessors
SIZES += [(192, 384, 4, 8)]  # clusters of blocks, and others beside them


@both_dtypes
@pytest.mark.parametrize("K, V, H, HV", SIZES)
def test_sizes(device, K, V, H, HV, dtype):
    x = gdn_inputs(B=2, T=67, H=H, HV=HV, K=K, V=V, dtype=dtype, device=device)  # 67: a chunk and a tail
    for op in RULES.values():
        check_against_oracle(op, x)


@both_dtypes
@pytest.mark.parametrize("K, V", [(64, 64), (96, 128), (128, 128), (192, 192)])
def test_l2norm_of_wide_keys(device, K, V, dtype):
    """Rows of several tiles, and a tail that is followed by another sequence."""
    x = gdn_inputs(T=200, H=2, HV=2, K=K, V=V, sequences=2, dtype=dtype, device=device)
    x["q"], x["k"] = 3 * x["q"], x["k"] / 2
    offsets = torch.tensor([0, 70, 200], device=device)
    check_against_oracle(chunk_gated_delta_rule, x, cu_seqlens=offsets, use_qk_l2norm_in_kernel=True)


@pytest.mark.cuda
def test_new_thread_finds_memory_allocated():
    """A thread whose first use of CUDA is the operator: nothing has made a context current for it."""
    x = gdn_inputs(T=128, K=64, V=64, dtype=BF16, device="cuda")
    with torch.no_grad():
        expected, _ = chunk_gated_delta_rule(**x)
        torch.empty(64 << 20, device="cuda")  # cached: the operator's outputs come from there
        with ThreadPoolExecutor(1) as pool:
            o, _ = pool.submit(lambda: torch.no_grad()(chunk_gated_delta_rule)(**x)).result()
    assert torch.equal(o, expected)


@pytest.mark.cuda
def test_large_batch_is_its_rows():
    """The Hopper backward takes a large batch in parts, in one workspace."""
    x = gdn_inputs(B=3, T=1030, H=64, HV=128, K=64, V=64, dtype=BF16, device="cuda")
    cotangents = cotangents_for(x)
    whole = with_gradients(chunk_gated_delta_rule, x, cotangents)
    for i in range(3):
        row, row_cotangents = ({n: t[i : i + 1] for n, t in tensors.items()} for tensors in (x, cotangents))
        for name, t in with_gradients(chunk_gated_delta_rule, row, row_cotangents).items():
            if name not in cotangents:  # how the forward pass is cut depends on the batch
                assert torch.equal(t, whole[name][i : i + 1]), f"{name} of row {i}"


@both_dtypes
def test_gradient_of_a_state_that_decays_away(device, dtype):
    """Nothing but what is left of the initial state after e^-60 makes this gradient."""
    x = gdn_inputs(T=80, H=1, K=64, V=64, dtype=dtype, beta="1", device=device)
    cotangents = {"final_state": cotangents_for(x)["final_state"]}
    check_against_oracle(chunk_gated_delta_rule, x, cotangents)


VARLEN = {
    "one": [0, 70],
    "empty_first": [0, 0, 70],
    "empty_middle_and_last": [0, 65, 65, 70, 70],
    "single_tokens": list(range(41)),
    "long_tail": [0, 1, 2, 3, 130],
    "slack": [3, 20, 64],
}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("offsets", VARLEN.values(), ids=VARLEN)
def test_varlen(device, offsets, index_dtype):
    cu_seqlens = torch.tensor(offsets, dtype=index_dtype, device=device)
    T = offsets[-1] + (6 if offsets[0] else 0)
    chunk, recurrent = OPS.values()
    for dtype, op, K, V in (
        (FP32, chunk, 32, 24),
        (BF16, chunk, 32, 24),
        (BF16, chunk, 64, 128),
        (FP32, recurrent, 32, 24),
        (FP32, SIMPLE["simple"], 32, 24),
        (BF16, SIMPLE["simple"], 64, 128),
    ):
        x = gdn_inputs(T=T, HV=4, K=K, V=V, sequences=len(offsets) - 1, dtype=dtype, device=device)
        ours = check_against_oracle(op, x, cu_seqlens=cu_seqlens)
        with_cpu_copy, _ = op(**x, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens.cpu())
        assert torch.equal(with_cpu_copy, ours["o"])


@both_ops
def test_many_sequences_of_one_token(device, op):
    """N * HV beyond 65535, the limit of a CUDA grid's second axis: the same bits as a batch of rows."""
    N = 2100
    x = gdn_inputs(B=N, T=1, H=2, HV=32, K=8, V=8, device=device)
    o, state = op(**x, output_final_state=True)
    packed = {name: t if name == "initial_state" else t.transpose(0, 1) for name, t in x.items()}
    cu_seqlens = torch.arange(N + 1, dtype=torch.int32, device=device)
    o2, state2 = op(**packed, output_final_state=True, cu_seqlens=cu_seqlens)
    assert torch.equal(o2.transpose(0, 1), o)
    assert torch.equal(state2, state)
    ref, ref_state = reference.gated_delta_rule(**double(x), output_final_state=True)
    testing.check_close("o", o, ref)
    testing.check_close("final_state", state, ref_state)


@every_rule
def test_varlen_is_a_concatenation(device, op):
    offsets = [0, 33, 33, 100, 101]
    x = gdn_inputs(T=101, HV=4, K=24, V=16, sequences=4, device=device)
    o, state = op(**x, output_final_state=True, cu_seqlens=torch.tensor(offsets, device=device))
    for n in range(4):
        tokens = slice(offsets[n], offsets[n + 1])
        piece = {name: t[n : n + 1] if name == "initial_state" else t[:, tokens] for name, t in x.items()}
        o_n, state_n = op(**piece, output_final_state=True)
        assert torch.equal(o_n, o[:, tokens])
        assert torch.equal(state_n[0], state[n])


@every_rule
@pytest.mark.parametrize("B, T, offsets", [(2, 0, None), (0, 5, None), (1, 0, [0]), (1, 0, [0, 0, 0]), (1, 9, [0])])
def test_nothing_to_do(device, op, B, T, offsets):
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=device)
    N = B if offsets is None else len(offsets) - 1
    x = gdn_inputs(B=B, T=T, K=16, V=8, sequences=N, device=device)
    cotangents = {"o": torch.randn(B, T, 2, 8, device=device), "final_state": torch.randn(N, 2, 16, 8, device=device)}
    x |= {"A_log": torch.randn(2, device=device), "dt_bias": torch.randn(2, device=device)}
    got = with_gradients(op, x, cotangents, cu_seqlens=cu_seqlens, use_gate_in_kernel=True)
    assert torch.equal(got["final_state"], x["initial_state"])
    assert torch.equal(got["dinitial_state"], cotangents["final_state"])
    for name in ("o", "dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias"):
        assert got[name].count_nonzero() == 0


@by_chunks
@pytest.mark.parametrize("dtype, K, V", [(FP32, 32, 32), (BF16, 32, 32), (BF16, 64, 64), (BF16, 96, 128)])
def test_no_leak_between_sequences(device, dtype, K, V, op):
    """Whatever the first document holds, even NaN, the second does not change by a bit; nor do other rows and heads."""
    cu_seqlens = torch.tensor([0, 50, 120], device=device)
    x = gdn_inputs(T=120, HV=4, K=K, V=V, sequences=2, dtype=dtype, device=device)
    cotangents = cotangents_for(x, cu_seqlens=cu_seqlens)
    before = with_gradients(op, x, cotangents, cu_seqlens=cu_seqlens)
    for spoil in (lambda t: torch.randn_like(t), lambda t: torch.full_like(t, float("nan"))):
        y = {name: t.clone() for name, t in x.items()}
        dy = {name: t.clone() for name, t in cotangents.items()}
        for name, t in [*y.items(), *dy.items()]:
            first = t[:1] if "state" in name else t[:, :50]
            first.copy_(-spoil(first).abs() if name == "g" else spoil(first))
        after = with_gradients(op, y, dy, cu_seqlens=cu_seqlens)
        for name in before:
            second = (lambda t: t[1]) if "state" in name else (lambda t: t[:, 50:])
            assert torch.equal(second(before[name]), second(after[name])), name


@both_dtypes
def test_no_leak_between_rows_and_heads(device, dtype):
    x = gdn_inputs(B=2, T=70, H=2, HV=4, K=32, V=32, dtype=dtype, device=device)
    cotangents = cotangents_for(x)
    before = with_gradients(chunk_gated_delta_rule, x, cotangents)
    y = {name: t.clone() for name, t in x.items()}
    y["v"][0] = float("nan")
    y["v"][1, :, 3] = float("nan")
    after = with_gradients(chunk_gated_delta_rule, y, cotangents)
    head_axis = {"final_state": 1, "dinitial_state": 1}
    for name in before:
        ours = before[name][1], after[name][1]
        first, second = (t.narrow(head_axis.get(name, 2) - 1, 0, 1) for t in ours)
        assert torch.equal(first, second), name
    assert after["o"][0].isnan().all()
    assert not after["o"][1, :, :3].isnan().any()


def test_later_tokens_change_nothing_before_them(device):
    for dtype, op in product((FP32, BF16), RULES.values()):
        x = gdn_inputs(T=140, K=32, V=32, dtype=dtype, device=device)
        other = gdn_inputs(T=140, K=32, V=32, dtype=dtype, gate="strong16", beta="negative", device=device)
        before, _ = op(**x)
        for t in (139, 101, 64, 63, 1):
            y = {name: s.clone() for name, s in x.items()}
            for name in ("q", "k", "v", "g", "beta"):
                y[name][:, t:] = other[name][:, t:]
            after, _ = op(**y)
            assert torch.equal(after[:, :t], before[:, :t])


AXES = {
    "op": list(RULES),
    "dtype": [FP32, BF16],
    "gate": ["none", "log", "kernel", "kernel_no_bias"],
    "beta": ["none", "given", "sigmoid", "negative"],
    "scale": [None, 0.3],
    "initial_state": [False, True],
    "loss": [("o",), ("final_state",), ("o", "final_state")],
    "l2norm": [False, True],
    "v_first": [False, True],
    "offsets": [None, [0, 30, 30, 80], [2, 71]],
}


def pairwise(axes):
    """Few cases that together hold every pair of values of two axes (greedy)."""
    names = list(axes)
    pairs = {((a, x), (b, y)) for a, b in combinations(names, 2) for x in map(str, axes[a]) for y in map(str, axes[b])}
    generator = torch.Generator().manual_seed(0)
    cases = []
    while pairs:
        best, covered = None, set()
        for _ in range(60):
            case = {n: axes[n][torch.randint(len(axes[n]), (), generator=generator)] for n in names}
            hit = {((a, str(case[a])), (b, str(case[b]))) for a, b in combinations(names, 2)} & pairs
            if len(hit) > len(covered):
                best, covered = case, hit
        if best is not None:
            cases.append(best)
            pairs -= covered
    return cases


def call_of(case, make, device):
    """Tensors, options and gradients of the outputs of a case of AXES; ``make`` is gdn_inputs or the like."""
    offsets = case["offsets"]
    K, V = (32, 24) if case["dtype"] == FP32 else (64, 128)
    N = 1 if offsets is None else len(offsets) - 1
    x = make(T=80, HV=4, K=K, V=V, sequences=N, dtype=case["dtype"], device=device)
    options = {"scale": case["scale"], "state_v_first": case["v_first"]}
    if offsets is not None:
        options["cu_seqlens"] = torch.tensor(offsets, device=device)
    if case["l2norm"]:
        x["q"], x["k"] = 3 * x["q"], x["k"] / 2
        options["use_qk_l2norm_in_kernel"] = True
    if case["gate"] == "none":
        del x["g"]
    elif case["gate"] != "log":
        x["g"] = 2 * torch.randn_like(x["g"])
        x["A_log"] = torch.randn(4, device=device)
        if case["gate"] == "kernel":
            x["dt_bias"] = torch.randn(x["g"][0, 0].numel(), device=device)
        options["use_gate_in_kernel"] = True
    if case["beta"] == "none":
        x.pop("beta", None)
    elif case["beta"] != "given":
        x["beta"] = torch.randn_like(x["beta"])
        options |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": case["beta"] == "negative"}
    if case["v_first"]:
        x["initial_state"] = x["initial_state"].mT.contiguous()
    state = torch.randn_like(x["initial_state"])
    if not case["initial_state"]:
        del x["initial_state"]
    cotangents = {"o": torch.randn_like(x["v"]), "final_state": state}
    return x, options, {n: cotangents[n] for n in case["loss"]}


def name_of(case):
    return "-".join(str(v) for v in case.values())


@pytest.mark.parametrize("case", pairwise(AXES), ids=name_of)
def test_options_pairwise(device, case):
    x, options, cotangents = call_of(case, gdn_inputs, device)
    hard = case["beta"] == "none" and case["gate"] == "none"
    check_against_oracle(RULES[case["op"]], x, cotangents, hard=hard, **options)


@both_ops
def test_absent_arguments_equal_neutral_ones(device, op):
    x = gdn_inputs(T=70, K=32, V=32, gate="zero", beta="1", device=device)
    x["initial_state"].zero_()
    with_all, _ = op(**x)
    without, _ = op(x["q"], x["k"], x["v"])
    assert torch.equal(with_all, without)
    neutral, _ = op(**x, scale=32**-0.5)
    assert torch.equal(neutral, without)


def test_saturated_gate_and_beta(device):
    """Raw values far outside: softplus linear above 20, sigmoid at 0 and 1, a decay that underflows."""
    x = gdn_inputs(T=70, HV=2, K=16, V=16, device=device)
    raw = torch.linspace(-100, 100, 140, device=device).view(1, 70, 2)
    x |= {"g": raw, "beta": raw.flip(1), "A_log": torch.tensor([0.0, 3.0], device=device),
          "dt_bias": torch.tensor([0.0, 5.0], device=device)}  # fmt: skip
    for op in OPS.values():
        check_against_oracle(op, x, hard=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)


def strided_copies(t):
    """The same values behind other strides: the last axis contiguous or not, gaps, an odd offset."""
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    gaps = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype, device=t.device)
    odd = gaps[..., 1 : 1 + t.shape[-1]]
    odd.copy_(t)
    yield odd
    spread = gaps[..., 1 : 1 + 2 * t.shape[-1] : 2]
    spread.fill_(float("nan"))
    spread.copy_(t)
    yield spread


@both_dtypes
@every_rule
def test_strides(device, op, dtype):
    x = gdn_inputs(B=2, T=66, HV=4, K=24, V=40, dtype=dtype, device=device)
    cotangents = cotangents_for(x)
    expected = with_gradients(op, x, cotangents)
    for views in zip(*(strided_copies(t) for t in [*x.values(), *cotangents.values()]), strict=True):
        got = with_gradients(
            op,
            dict(zip(x, views, strict=False)),
            dict(zip(cotangents, views[len(x) :], strict=True)),
        )
        assert_equal(got, expected)


@both_dtypes
def test_packed_qkv_and_expanded_gradient(device, dtype):
    H, K = 2, 32
    packed = torch.randn(1, 66, 3 * H * K, dtype=dtype, device=device).requires_grad_()
    q, k, v = (t.unflatten(-1, (H, K)) for t in packed.split(H * K, -1))
    o, _ = chunk_gated_delta_rule(q, k, v, use_qk_l2norm_in_kernel=True)
    (grad,) = torch.autograd.grad(o.sum(), packed)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    o2, _ = chunk_gated_delta_rule(*leaves, use_qk_l2norm_in_kernel=True)
    grads = torch.autograd.grad(o2, leaves, torch.ones_like(o2))
    assert torch.equal(o, o2)
    assert torch.equal(grad, torch.cat([g.flatten(2) for g in grads], -1))


def test_expanded_inputs(device):
    x = gdn_inputs(B=1, T=40, K=16, V=16, device=device)
    wide = {name: t.expand(3, *t.shape[1:]) for name, t in x.items()}
    o, state = chunk_gated_delta_rule(**wide, output_final_state=True)
    o1, state1 = chunk_gated_delta_rule(**x, output_final_state=True)
    assert torch.equal(o, o1.expand_as(o))
    assert torch.equal(state, state1.expand_as(state))


def test_poison_reaches_the_allocations_of_the_op(device, poison):
    x = gdn_inputs(T=10, K=8, V=8, device=device)
    x["q"].requires_grad_()
    poison(True)
    with torch.profiler.profile() as profile:
        chunk_gated_delta_rule(**x)[0].sum().backward()

    def descendants(event):
        for child in event.cpu_children:
            yield child
            yield from descendants(child)

    if device == "cpu":
        assert poison(True) >= 4  # an output and a workspace of each
        return
    for op in ("lt2::gdn_fwd", "lt2::gdn_bwd"):
        event = next(e for e in profile.events() if e.name == op)
        names = [e.name for e in descendants(event)]
        assert names.count("aten::fill_") >= names.count("aten::empty_strided") > 0, names


@every_rule
def test_poisoned_memory_changes_nothing(device, op, poison):
    for dtype, T in product((FP32, BF16), (1, 66)):
        x = gdn_inputs(T=T, HV=4, K=24, V=24, dtype=dtype, device=device)
        cotangents = cotangents_for(x)
        poisoned = with_gradients(op, x, cotangents)
        poison(False)
        assert_equal(with_gradients(op, x, cotangents), poisoned)
        poison(True)


@every_rule
def test_deterministic(device, op, threads):
    for dtype, (B, T, HV) in product((FP32, BF16), ((1, 200, 2), (2, 65, 4), (1, 40, 10))):
        x = gdn_inputs(B=B, T=T, HV=HV, dtype=dtype, device=device)
        cotangents = cotangents_for(x)
        threads(1)
        first = with_gradients(op, x, cotangents)
        for n in (1, 2, 3, 4):  # so many heads walk the tokens together as all threads are busy with
            threads(n)
            assert_equal(with_gradients(op, x, cotangents), first)


@pytest.mark.slow
def test_deterministic_repeats(device):
    x = gdn_inputs(B=2, T=130, HV=4, dtype=BF16, device=device)
    cotangents = cotangents_for(x)
    first = with_gradients(chunk_gated_delta_rule, x, cotangents)
    for _ in range(250):
        assert_equal(with_gradients(chunk_gated_delta_rule, x, cotangents), first)


def test_subsets_of_gradients(device):
    """Each input alone, each output in the loss: the same bits as all together."""
    x = gdn_inputs(T=70, HV=4, K=16, V=16, device=device)
    x |= {"A_log": torch.randn(4, device=device), "dt_bias": torch.randn(4, device=device)}
    x["g"] = torch.randn_like(x["g"])
    o, state = chunk_gated_delta_rule(**x, use_gate_in_kernel=True, output_final_state=True)
    do, dstate = torch.randn_like(o), torch.randn_like(state)
    for used in ({"o": do}, {"final_state": dstate}, {"o": do, "final_state": dstate}):
        together = with_gradients(chunk_gated_delta_rule, x, used, use_gate_in_kernel=True)
        for name in x:

            def alone(op=chunk_gated_delta_rule, name=name, **kw):
                return op(**{n: t.detach() if n in x and n != name else t for n, t in kw.items()})

            got = with_gradients(alone, x, used, use_gate_in_kernel=True)
            assert torch.equal(got[f"d{name}"], together[f"d{name}"]), name
    unused = {"o": do, "final_state": torch.zeros_like(state)}
    expected = with_gradients(chunk_gated_delta_rule, x, {"o": do}, use_gate_in_kernel=True)
    assert_equal(with_gradients(chunk_gated_delta_rule, x, unused, use_gate_in_kernel=True), expected)


def test_gradient_without_a_final_state(device):
    x = gdn_inputs(T=20, K=16, V=16, device=device)
    leaves = [t.requires_grad_() for t in x.values()]
    o, state = chunk_gated_delta_rule(**x)
    assert state is None
    do = torch.randn_like(o)
    expected = with_gradients(chunk_gated_delta_rule, x, {"o": do})
    for name, grad in zip(x, torch.autograd.grad(o, leaves, do), strict=True):
        assert torch.equal(grad, expected[f"d{name}"])


def test_gradients_are_linear_in_the_loss(device):
    x = gdn_inputs(T=70, K=16, V=16, device=device)
    cotangents = cotangents_for(x)
    once = with_gradients(chunk_gated_delta_rule, x, cotangents)
    scaled = with_gradients(chunk_gated_delta_rule, x, {n: -8 * t for n, t in cotangents.items()})
    for name in once:
        if name.startswith("d"):
            assert torch.equal(scaled[name], -8 * once[name]), name


def test_double_backward_is_an_error(device):
    x = {n: t.requires_grad_() for n, t in gdn_inputs(T=8, K=8, V=8, device=device).items()}
    o, _ = chunk_gated_delta_rule(**x)
    (dq,) = torch.autograd.grad(o.sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="lt2::gdn_bwd: double backward is not supported"):
        dq.sum().backward()


@both_dtypes
def test_other_float_dtypes_of_gates_and_state(device, dtype):
    """g, beta, initial_state in any float dtype: as their float32 values, gradients in their own dtype."""
    x = gdn_inputs(T=40, K=16, V=16, dtype=dtype, device=device)
    cotangents = cotangents_for(x)
    for other in (BF16, torch.float16, torch.float64):
        y = x | {n: x[n].to(other) for n in ("g", "beta", "initial_state")}
        got = with_gradients(chunk_gated_delta_rule, y, cotangents)
        z = y | {n: y[n].float() for n in ("g", "beta", "initial_state")}
        expected = with_gradients(chunk_gated_delta_rule, z, cotangents)
        assert got["dg"].dtype == got["dbeta"].dtype == got["dinitial_state"].dtype == other
        assert_equal(got, {n: t.to(got[n].dtype) for n, t in expected.items()})


@pytest.mark.parametrize("rules", [OPS, SIMPLE], ids=["delta", "simple"])
@pytest.mark.parametrize("v_first", [False, True])
def test_chunk_recurrent_and_split_agree(device, v_first, rules):
    x = gdn_inputs(T=150, HV=4, K=32, V=48, device=device)
    if v_first:
        x["initial_state"] = x["initial_state"].mT.contiguous()
    options = {"output_final_state": True, "state_v_first": v_first}
    chunk, _ = rules.values()
    o, state = chunk(**x, **options)
    for op, at in product(rules.values(), (0, 1, 64, 77, 128, 149)):
        tokens = ("q", "k", "v", "g", "beta")
        o1, carried = op(*(x[n][:, :at] for n in tokens), initial_state=x["initial_state"], **options)
        o2, final = op(*(x[n][:, at:] for n in tokens), initial_state=carried, **options)
        assert rel_err(torch.cat([o1, o2], 1), o) < 1e-5
        assert rel_err(final, state) < 1e-5


@both_dtypes
def test_gradients_flow_through_a_carried_state(device, dtype):
    x = gdn_inputs(T=100, HV=4, K=32, V=32, dtype=dtype, device=device)
    cotangents = cotangents_for(x)

    def split(q, k, v, g, beta, initial_state, output_final_state):
        pieces = []
        for tokens in (slice(0, 37), slice(37, 100)):
            o, initial_state = chunk_gated_delta_rule(
                *(t[:, tokens] for t in (q, k, v, g, beta)), initial_state=initial_state, output_final_state=True
            )
            pieces.append(o)
        return torch.cat(pieces, 1), initial_state

    check_against_oracle(split, x, cotangents)


def test_exactly_representable_values_give_exact_results(device):
    """One-hot keys, beta in {0, 1}, no decay, small integers: every sum is exact in float32 and in bfloat16."""
    for dtype, op in product((FP32, BF16), RULES.values()):
        x = gdn_inputs(T=140, H=1, HV=2, K=16, V=16, keys="onehot", gate="zero", dtype=dtype, device=device)
        x["q"] = torch.randint(-1, 2, x["q"].shape, device=device).to(dtype)
        x["v"] = torch.randint(-2, 3, x["v"].shape, device=device).to(dtype)
        x["beta"] = torch.randint(0, 2, x["beta"].shape, device=device).float()
        x["initial_state"] = torch.randint(-2, 3, x["initial_state"].shape, device=device).float()
        x["g"][:, 50:60] = float("-inf")
        o, state = op(**x, scale=1.0, output_final_state=True)
        exact = partial(reference.gated_delta_rule, delta=op not in SIMPLE.values())
        ref, ref_state = exact(**double(x), scale=1.0, output_final_state=True)
        assert torch.equal(o.double(), ref)
        assert torch.equal(state.double(), ref_state)


def test_agrees_with_transformers(device):
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    x = gdn_inputs(B=2, T=100, HV=4, K=32, V=48, device=device)
    o, state = chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True, output_final_state=True)
    *tensors, state0 = x.values()
    tensors[:2] = (t.repeat_interleave(2, 2) for t in tensors[:2])  # its older versions take no grouped heads
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        theirs, their_state = inspect.unwrap(getattr(qwen, name))(  # wrapped, it is fla's where that is installed
            *tensors, initial_state=state0, use_qk_l2norm_in_kernel=True, output_final_state=True
        )
        assert rel_err(theirs, o) < 1e-5
        assert rel_err(their_state, state) < 1e-5


def test_threads_of_python(device):
    inputs = [gdn_inputs(T=60 + i, HV=4, K=32, V=32, dtype=(FP32, BF16)[i % 2], device=device) for i in range(8)]
    cotangents = [cotangents_for(x) for x in inputs]
    expected = [with_gradients(chunk_gated_delta_rule, x, c) for x, c in zip(inputs, cotangents, strict=True)]
    with ThreadPoolExecutor(8) as executor:
        for _ in range(3):
            runs = executor.map(partial(with_gradients, chunk_gated_delta_rule), inputs, cotangents)
            for got, want in zip(runs, expected, strict=True):
                assert_equal(got, want)


def test_autocast(device):
    x = gdn_inputs(T=40, K=16, V=16, device=device)
    with torch.autocast(device, dtype=BF16):
        got = with_gradients(chunk_gated_delta_rule, x, cotangents := {"o": torch.randn(1, 40, 2, 16, device=device)})
    low = x | {n: x[n].to(BF16) for n in "qkv"}
    expected = with_gradients(chunk_gated_delta_rule, low, cotangents)
    assert got["o"].dtype == BF16
    assert got["dq"].dtype == got["final_state"].dtype == FP32
    assert_equal(got, {n: t.to(got[n].dtype) for n, t in expected.items()})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_public_function_compiles_in_one_graph(device, dynamic):
    """Forward and backward, under autocast, with every option; other lengths later."""
    torch.compiler.reset()
    options = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True}

    def op(**kw):
        with torch.autocast(device, dtype=BF16):
            return chunk_gated_delta_rule(**kw, **options)

    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (40, 52):
        x = gdn_inputs(T=T, HV=4, K=16, V=24, sequences=2, device=device)
        x |= {"A_log": torch.randn(4, device=device), "dt_bias": torch.randn(4, device=device)}
        cu_seqlens = torch.tensor([0, 11, T], device=device)
        cotangents = {"o": torch.randn_like(x["v"]), "final_state": torch.randn_like(x["initial_state"])}
        expected = with_gradients(op, x, cotangents, cu_seqlens=cu_seqlens)
        assert_equal(with_gradients(compiled, x, cotangents, cu_seqlens=cu_seqlens), expected)


def test_float16_on_cuda(device):
    if device == "cpu":
        pytest.skip("float16 is a CUDA dtype here; the CPU rejects it (test_rejected_inputs)")
    for K, V in ((64, 64), (96, 192), (128, 128)):
        x = gdn_inputs(T=130, HV=4, K=K, V=V, dtype=torch.float16, device=device)
        check_against_oracle(chunk_gated_delta_rule, x)


@pytest.mark.slow
@pytest.mark.cuda
def test_portable_kernels():
    """The shapes that kernels for one architecture take, without those kernels."""
    names = "sizes or lengths or keys or gates or betas or varlen or float16 or pairwise or split"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "-k"]
    command += [f"({names}) and not portable and not oracle", __file__]
    run = subprocess.run(command, env=os.environ | {"LT2_CUDA_KERNELS": "portable"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    wrong = "import torch; from lt2_ext import ops, testing; "
    wrong += "ops.chunk_gated_delta_rule(**testing.gdn_inputs(T=5, device='cuda'))"
    env = os.environ | {"LT2_CUDA_KERNELS": "portabel"}
    run = subprocess.run([sys.executable, "-c", wrong], env=env, capture_output=True, text=True)
    assert "lt2::gdn: LT2_CUDA_KERNELS must be portable, got portabel" in run.stderr


def test_tiny_and_huge_gradients(device):
    """The gradients are linear in those of the outputs, also where fp16 would under- or overflow inside the kernel."""
    x = gdn_inputs(T=130, K=64, V=64, dtype=BF16, gate="small", device=device)
    cotangents = cotangents_for(x)
    expected = with_gradients(chunk_gated_delta_rule, x, cotangents)
    for factor in (2.0**-60, 2.0**60):
        scaled = with_gradients(chunk_gated_delta_rule, x, {name: t * factor for name, t in cotangents.items()})
        for name in (n for n in expected if n.startswith("d")):
            assert rel_err(scaled[name].double() / factor, expected[name]) < 1e-5, name


def shape(*sizes, dtype=FP32):
    return torch.zeros(sizes, dtype=dtype)


REJECTED = {
    "q_3d": ({"q": shape(4, 2, 8)}, RuntimeError, r"q must have 4 dimensions, got shape \[4, 2, 8\]"),
    "k_shape": ({"k": shape(1, 4, 1, 8)}, RuntimeError, r"k must have shape \[B, T, H, K\] = \[1, 4, 2, 8\], got"),
    "v_tokens": ({"v": shape(1, 5, 4, 8)}, RuntimeError, r"v must have shape \[B, T, HV, V\] = \[1, 4, 4, 8\], got"),
    "heads": ({"v": shape(1, 4, 3, 8)}, RuntimeError, "v must have a multiple of q's heads, got 3 and 2"),
    "K": ({"q": shape(1, 4, 2, 257), "k": shape(1, 4, 2, 257)}, RuntimeError, "q must have K in 1..256, got 257"),
    "V": ({"v": shape(1, 4, 4, 513)}, RuntimeError, "v must have V in 1..512, got 513"),
    "K0": ({"q": shape(1, 4, 2, 0), "k": shape(1, 4, 2, 0)}, RuntimeError, "q must have K in 1..256, got 0"),
    "double": ({n: shape(1, 4, 2, 8, dtype=torch.float64) for n in "qkv"}, ValueError, "q must be float32.* bfloat16"),
    "int": ({n: shape(1, 4, 2, 8, dtype=torch.int32) for n in "qkv"}, ValueError, "q must be float32.* bfloat16"),
    "mixed": ({"k": shape(1, 4, 2, 8, dtype=BF16)}, ValueError, r"k must have the dtype of q \(torch.float32\), got"),
    "mixed_v": ({"v": shape(1, 4, 2, 8, dtype=BF16)}, ValueError, r"v must have the dtype of q \(torch.float32\), got"),
    "g_shape": ({"g": shape(1, 4, 2)}, RuntimeError, r"g must have shape \[B, T, HV\] = \[1, 4, 4\], got \[1, 4, 2\]"),
    "beta_shape": ({"beta": shape(4, 4)}, RuntimeError, r"beta must have shape \[B, T, HV\] = \[1, 4, 4\], got"),
    "state_shape": (
        {"initial_state": shape(1, 4, 8, 6)}, RuntimeError,
        r"initial_state must have shape \[N, HV, K, V\] = \[1, 4, 8, 8\], got \[1, 4, 8, 6\]",
    ),
    "state_v_first": (
        {"v": shape(1, 4, 4, 6), "initial_state": shape(1, 4, 8, 6), "state_v_first": True}, RuntimeError,
        r"initial_state must have shape \[N, HV, V, K\] = \[1, 4, 6, 8\], got \[1, 4, 8, 6\]",
    ),
    "gate_without_a": ({"use_gate_in_kernel": True, "A_log": shape(4)}, ValueError, "must come with g"),
    "gate_without_A_log": ({"use_gate_in_kernel": True, "g": shape(1, 4, 4)}, ValueError, "must come with A_log"),
    "A_log_alone": ({"A_log": shape(4)}, ValueError, "must come with use_gate_in_kernel"),
    "A_log_shape": (
        {"use_gate_in_kernel": True, "g": shape(1, 4, 4), "A_log": shape(2)}, RuntimeError,
        r"A_log must have shape \[HV\] = \[4\], got \[2\]",
    ),
    "neg_eigval": ({"allow_neg_eigval": True}, ValueError, "must come with use_beta_sigmoid_in_kernel"),
    "sigmoid_of_nothing": ({"use_beta_sigmoid_in_kernel": True}, ValueError, "must come with beta"),
    "cu_seqlens_B": (
        {n: shape(2, 4, 2, 8) for n in "qkv"} | {"cu_seqlens": torch.tensor([0, 4])}, RuntimeError,
        "q must have B = 1 when cu_seqlens is given, got B = 2",
    ),
    "cu_seqlens_2d": ({"cu_seqlens": shape(1, 2, dtype=torch.int64)}, RuntimeError, r"cu_seqlens must have shape \[N"),
    "cu_seqlens_0": ({"cu_seqlens": shape(0, dtype=torch.int64)}, RuntimeError, r"cu_seqlens must have shape \[N"),
    "cu_seqlens_float": ({"cu_seqlens": shape(2)}, RuntimeError, "cu_seqlens must be int32 or int64, got float32"),
    "cu_seqlens_cpu": ({"cu_seqlens_cpu": torch.tensor([0, 4])}, ValueError, "must come with cu_seqlens"),
    "cu_seqlens_cpu_shape": (
        {"cu_seqlens": torch.tensor([0, 4]), "cu_seqlens_cpu": torch.tensor([0, 2, 4])}, ValueError,
        r"cu_seqlens_cpu must have shape \[2\], got \[3\]",
    ),
}  # fmt: skip


@both_ops
@pytest.mark.parametrize("case", REJECTED)
def test_rejected_inputs(device, op, case):
    change, error, message = REJECTED[case]
    arguments = {"q": shape(1, 4, 2, 8), "k": shape(1, 4, 2, 8), "v": shape(1, 4, 4, 8)} | change
    arguments = {
        n: t.to(device) if isinstance(t, torch.Tensor) and n != "cu_seqlens_cpu" else t for n, t in arguments.items()
    }
    with pytest.raises(error, match=message):
        op(**arguments)


def test_float16_is_rejected_on_the_cpu():
    x = gdn_inputs(T=4, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"q must be float32 or bfloat16 on cpu, got torch\.float16"):
        chunk_gated_delta_rule(**x)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    "offsets, message",
    [
        ([-1, 4], "cu_seqlens must start at 0 or later, got -1"),
        ([0, 3, 2], "cu_seqlens must not decrease, got 3 before 2"),
        ([0, 5], "cu_seqlens must end at T = 4 or earlier, got 5"),
    ],
)
def test_cu_seqlens_values_are_checked_on_the_cpu(offsets, message, index_dtype):
    x = gdn_inputs(T=4, sequences=len(offsets) - 1)
    with pytest.raises(RuntimeError, match=message):
        chunk_gated_delta_rule(**x, cu_seqlens=torch.tensor(offsets, dtype=index_dtype))


@pytest.mark.usefixtures("checks")
def test_checked_values(device):
    x = gdn_inputs(T=4, K=8, V=8, device=device)
    chunk_gated_delta_rule(**x)
    with pytest.raises(ValueError, match=r"g must be <= 0 \(the log of a decay\), got a maximum of 0.5"):
        chunk_gated_delta_rule(**x | {"g": x["g"].abs() * 0 + 0.5})
    with pytest.raises(ValueError, match="g must be <= 0"):
        chunk_gated_delta_rule(**x | {"g": x["g"] * float("nan")})
    for offsets in ([0, 5], [0, 3, 2], [-1, 4]):
        cu_seqlens = torch.tensor(offsets, device=device)
        with pytest.raises(ValueError, match=r"cu_seqlens must not decrease and stay within 0..T = 4, got \["):
            chunk_gated_delta_rule(x["q"], x["k"], x["v"], cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("keys, beta, gate", [("random", "sigmoid", "logsigmoid"), ("equal", "0.835", "small")])
def test_bf16_loses_no_more_than_the_rounding_of_the_output(keys, beta, gate):
    """On CPUs, whatever the instruction set multiplies with."""
    x = gdn_inputs(T=200, HV=4, K=96, V=64, dtype=BF16, keys=keys, beta=beta, gate=gate)
    want_o, want_state = reference.gated_delta_rule(**double(x), output_final_state=True)
    o, state = chunk_gated_delta_rule(**x, output_final_state=True)
    assert rel_err(o, want_o) < 2e-3
    assert rel_err(state, want_state) < 2e-5
