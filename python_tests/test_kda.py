"""chunk_kda, chunk_gla, their recurrent forms and kda_step_ against the oracle, and against themselves."""

from functools import partial
from itertools import product

import pytest
import torch
from test_gdn import AXES, BETA_OF, VARLEN, assert_equal, call_of, double, name_of, pairwise, strided_copies
from torch.nn import functional as F

from lt2_ext import testing
from lt2_ext.ops import (
    chunk_gated_delta_rule,
    chunk_gla,
    chunk_kda,
    chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_kda,
    kda_step_,
)
from lt2_ext.reference import kda as reference
from lt2_ext.testing import gdn_inputs, rel_err, with_gradients

FP32, BF16 = torch.float32, torch.bfloat16
GATES = ("zero", "small", "logsigmoid", "strong16", "-8", "-30", "-100", "mixed", "reset", "opposite", "channels")
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 97, 127, 129, 200)


def recurrent_gla(q, k, v, g, **options):
    return fused_recurrent_gla(q, k, v, g, **options)


OPS = {"kda": chunk_kda, "kda_recurrent": fused_recurrent_kda, "gla": chunk_gla, "gla_recurrent": recurrent_gla}
DELTA = {chunk_kda: True, fused_recurrent_kda: True, chunk_gla: False, recurrent_gla: False}
CHUNKED = {"kda": chunk_kda, "gla": chunk_gla}

all_ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
both_rules = pytest.mark.parametrize("op", CHUNKED.values(), ids=CHUNKED)
both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def gate_values(regime, shape, device):
    """As testing.gate_values; ``opposite``: half of the channels keep everything, half forget at once; ``channels``:
    every channel at its own rate, from 1e-4 to 30."""
    if regime not in ("opposite", "channels"):
        return testing.gate_values(regime, shape, device)
    K = shape[-1]
    rates = 10 ** (-4 + 5.5 * torch.rand(K, device=device))
    if regime == "opposite":
        rates.fill_(1e-4)
        rates[::2] = 60
    return -rates * torch.rand(shape, device=device)


def inputs(op, gate="logsigmoid", **sizes):
    """Arguments of op by name."""
    x = gdn_inputs(**sizes)
    B, T, HV, _ = x["v"].shape
    x["g"] = gate_values(gate, (B, T, HV, x["q"].shape[-1]), x["q"].device)
    if not DELTA[op]:
        del x["beta"]
    return x


def cotangents_for(op, x, **options):
    """Random gradients of o and final_state."""
    with torch.no_grad():
        o, state = op(**x, output_final_state=True, **options)
    return {"o": torch.randn_like(o), "final_state": torch.randn_like(state)}


def check_against_oracle(op, x, cotangents=None, hard=False, delta=None, **options):
    """Outputs and all gradients against the float64 oracle and plain torch in the dtype of q; returns the results."""
    dtype = x["q"].dtype
    oracle = partial(reference.kda, delta=DELTA[op] if delta is None else delta)
    cotangents = cotangents or cotangents_for(op, x, **options)
    ours = with_gradients(op, x, cotangents, **options)
    exact = with_gradients(oracle, double(x), double(cotangents), **options)
    rules = [partial(reference.chunks, operands=None if dtype == FP32 else dtype)]
    if x["q"].is_cuda or "recurrent" in op.__name__:
        rules.append(reference.recurrence)
    plain = [with_gradients(partial(oracle, rule=rule), x, cotangents, **options) for rule in rules]
    assert ours["o"].dtype == dtype
    assert ours["final_state"].dtype == FP32
    for name, ref in exact.items():
        worst = max((p[name] for p in plain), key=lambda out, ref=ref: rel_err(out, ref))
        testing.check_close(name, ours[name], ref, worst, testing.gradient_kind(name), dtype, hard)
    return ours


@pytest.mark.parametrize("delta", [True, False], ids=["kda", "gla"])
@pytest.mark.parametrize("gate", GATES)
def test_two_formulations_of_the_oracle_agree(gate, delta):
    x = double(inputs(chunk_kda, gate, T=130, HV=4, K=12, V=20, sequences=4))
    cotangents = {"o": torch.randn(1, 130, 4, 20).double(), "final_state": torch.randn(4, 4, 12, 20).double()}
    oracle = partial(reference.kda, delta=delta, cu_seqlens=torch.tensor([1, 1, 40, 41, 128]))
    a = with_gradients(oracle, x, cotangents)
    b = with_gradients(partial(oracle, rule=reference.chunks), x, cotangents)
    for name in a:
        assert rel_err(b[name], a[name]) < 1e-12, name


@pytest.mark.parametrize("delta", [True, False], ids=["kda", "gla"])
def test_gradients_of_the_oracle(delta):
    x = double(inputs(chunk_kda, T=5, HV=4, K=3, V=2))
    names = list(x)

    def f(*tensors):
        return reference.kda(**dict(zip(names, tensors, strict=True)), output_final_state=True, delta=delta)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in x.values()])


def test_oracle_with_one_decay_per_head_is_the_gated_delta_rule():
    from lt2_ext.reference.gdn import gated_delta_rule

    x = double(gdn_inputs(T=40, HV=4, K=12, V=20))
    o, state = gated_delta_rule(**x, output_final_state=True)
    wide = x | {"g": x["g"][..., None].expand(*x["g"].shape, 12)}
    o2, state2 = reference.kda(**wide, output_final_state=True)
    assert rel_err(o2, o) < 1e-13
    assert rel_err(state2, state) < 1e-13


PLANTED = {
    "late_decay": lambda x: x | {"g": x["g"].roll(1, 1)},
    "decays_of_the_next_channel": lambda x: x | {"g": x["g"].roll(1, -1)},
    "mean_decay": lambda x: x | {"g": x["g"].mean(-1, keepdim=True).expand_as(x["g"])},
    "scale": lambda x: x | {"q": x["q"] * 1.001},
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_comparison_finds_planted_bugs(bug):
    def broken(**kw):
        names = ("q", "k", "v", "g", "beta", "initial_state")
        return reference.kda(**kw | PLANTED[bug]({n: kw[n] for n in names}))

    x = inputs(chunk_kda, T=66, HV=4, K=16, V=16)
    with pytest.raises(AssertionError, match="relative error"):
        check_against_oracle(broken, x, cotangents_for(chunk_kda, x), delta=True)


@both_dtypes
@both_rules
@pytest.mark.parametrize("gate", GATES)
def test_gates(device, gate, op, dtype):
    x = inputs(op, gate, T=130, dtype=dtype, device=device)
    check_against_oracle(op, x, hard=gate in (*testing.STRONG_GATES, "opposite", "channels"))


@pytest.mark.parametrize("gate", ["reset", "opposite"])
@all_ops
def test_a_decay_of_nothing_has_no_gradient(device, op, gate):
    """Whatever e^g was, below e^-200 it is 0: exactly."""
    for dtype in (FP32, BF16):
        x = inputs(op, gate, T=70, K=64, V=64, dtype=dtype, device=device)
        x["g"] *= 10 if gate == "opposite" else 1
        reset = x["g"] <= -200
        assert reset.any()
        assert with_gradients(op, x, cotangents_for(op, x))["dg"][reset].count_nonzero() == 0


@both_dtypes
@pytest.mark.parametrize("beta", ["0", "1", "0.835", "2", "negative"])
def test_betas(device, beta, dtype):
    check_against_oracle(chunk_kda, inputs(chunk_kda, T=70, K=32, dtype=dtype, beta=beta, device=device))


@both_dtypes
@all_ops
def test_equal_keys(device, op, dtype):
    x = inputs(op, "-1e-3", T=130, K=128, V=128, dtype=dtype, keys="equal", beta="0.835", device=device)
    check_against_oracle(op, x, hard=True)


@both_dtypes
@both_rules
@pytest.mark.parametrize("keys", ["onehot", "rank2", "zero_rows", "long"])
def test_keys(device, keys, op, dtype):
    x = inputs(op, "small", T=130, dtype=dtype, keys=keys, beta=BETA_OF.get(keys, "sigmoid"), device=device)
    check_against_oracle(op, x, hard=keys == "rank2")


@pytest.mark.parametrize("T", LENGTHS)
def test_lengths(device, T):
    for op in OPS.values():
        check_against_oracle(op, inputs(op, T=T, H=1, HV=2, K=32, V=32, device=device))
    for op in CHUNKED.values():
        check_against_oracle(op, inputs(op, "mixed", T=T, K=32, V=32, dtype=BF16, device=device), hard=True)


@pytest.mark.slow
@pytest.mark.parametrize("T", [*range(128, 193), 1026, 4097])
def test_every_tail(device, T):
    for dtype, op in product((FP32, BF16), CHUNKED.values()):
        check_against_oracle(op, inputs(op, T=T, dtype=dtype, device=device))


SIZES = [(8, 8, 1, 2), (24, 29, 2, 4), (96, 192, 1, 1), (100, 36, 2, 2), (1, 3, 1, 1), (256, 512, 1, 1), (80, 40, 2, 4)]
SIZES += [(128, 128, 1, 4), (64, 192, 2, 2), (96, 128, 1, 3), (128, 64, 2, 2), (192, 384, 1, 1), (256, 64, 1, 2)]


@both_dtypes
@pytest.mark.parametrize("K, V, H, HV", SIZES)
def test_sizes(device, K, V, H, HV, dtype):
    for op in OPS.values():
        check_against_oracle(op, inputs(op, B=2, T=67, H=H, HV=HV, K=K, V=V, dtype=dtype, device=device))


def test_many_heads(device):
    """So many that they fill a GPU: its kernels then divide up a state otherwise."""
    for op, K in product(CHUNKED.values(), (64, 128)):
        check_against_oracle(op, inputs(op, T=70, H=34, HV=68, K=K, dtype=BF16, device=device))


@pytest.mark.parametrize("offsets", VARLEN.values(), ids=VARLEN)
def test_varlen(device, offsets):
    T = offsets[-1] + (6 if offsets[0] else 0)
    for op, (dtype, K, V), index in product(
        OPS.values(), ((FP32, 32, 24), (BF16, 64, 128)), (torch.int32, torch.int64)
    ):
        cu_seqlens = torch.tensor(offsets, dtype=index, device=device)
        x = inputs(op, T=T, HV=4, K=K, V=V, sequences=len(offsets) - 1, dtype=dtype, device=device)
        ours = check_against_oracle(op, x, cu_seqlens=cu_seqlens)
        with_cpu_copy, _ = op(**x, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens.cpu())
        assert torch.equal(with_cpu_copy, ours["o"])


@both_rules
def test_many_sequences_of_one_token(device, op):
    """N * HV beyond 65535, the limit of a CUDA grid's second axis: the same bits as a batch of rows."""
    N = 2100
    x = inputs(op, B=N, T=1, H=2, HV=32, K=8, V=8, device=device)
    o, state = op(**x, output_final_state=True)
    packed = {name: t if name == "initial_state" else t.transpose(0, 1) for name, t in x.items()}
    cu_seqlens = torch.arange(N + 1, dtype=torch.int32, device=device)
    o2, state2 = op(**packed, output_final_state=True, cu_seqlens=cu_seqlens)
    assert torch.equal(o2.transpose(0, 1), o)
    assert torch.equal(state2, state)
    ref, ref_state = reference.kda(**double(x), output_final_state=True, delta=DELTA[op])
    testing.check_close("o", o, ref)
    testing.check_close("final_state", state, ref_state)


@all_ops
def test_varlen_is_a_concatenation(device, op):
    offsets = [0, 33, 33, 100, 101]
    x = inputs(op, T=101, HV=4, K=24, V=16, sequences=4, device=device)
    o, state = op(**x, output_final_state=True, cu_seqlens=torch.tensor(offsets, device=device))
    for n in range(4):
        tokens = slice(offsets[n], offsets[n + 1])
        piece = {name: t[n : n + 1] if name == "initial_state" else t[:, tokens] for name, t in x.items()}
        o_n, state_n = op(**piece, output_final_state=True)
        assert torch.equal(o_n, o[:, tokens])
        assert torch.equal(state_n[0], state[n])


@all_ops
@pytest.mark.parametrize("B, T, offsets", [(2, 0, None), (0, 5, None), (1, 0, [0]), (1, 0, [0, 0, 0]), (1, 9, [0])])
def test_nothing_to_do(device, op, B, T, offsets):
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=device)
    N = B if offsets is None else len(offsets) - 1
    x = inputs(op, B=B, T=T, K=16, V=8, sequences=N, device=device)
    cotangents = {"o": torch.randn(B, T, 2, 8, device=device), "final_state": torch.randn(N, 2, 16, 8, device=device)}
    options = {"cu_seqlens": cu_seqlens}
    if DELTA[op]:
        x |= {"A_log": torch.randn(2, device=device), "dt_bias": torch.randn(32, device=device)}
        options["use_gate_in_kernel"] = True
    got = with_gradients(op, x, cotangents, **options)
    assert torch.equal(got["final_state"], x["initial_state"])
    assert torch.equal(got["dinitial_state"], cotangents["final_state"])
    for name in got.keys() - {"final_state", "dinitial_state"}:
        assert got[name].count_nonzero() == 0


@both_dtypes
@both_rules
def test_no_leak_between_sequences_rows_and_heads(device, op, dtype):
    """Whatever the first document holds, even NaN, the second does not change by a bit; nor do other rows and heads."""
    cu_seqlens = torch.tensor([0, 50, 120], device=device)
    x = inputs(op, T=120, HV=4, K=32, V=32, sequences=2, dtype=dtype, device=device)
    cotangents = cotangents_for(op, x, cu_seqlens=cu_seqlens)
    before = with_gradients(op, x, cotangents, cu_seqlens=cu_seqlens)
    for spoil in (torch.randn_like, lambda t: torch.full_like(t, float("nan"))):
        y = {name: t.clone() for name, t in x.items()}
        dy = {name: t.clone() for name, t in cotangents.items()}
        for name, t in [*y.items(), *dy.items()]:
            first = t[:1] if "state" in name else t[:, :50]
            first.copy_(-spoil(first).abs() if name == "g" else spoil(first))
        after = with_gradients(op, y, dy, cu_seqlens=cu_seqlens)
        for name in before:
            second = (lambda t: t[1]) if "state" in name else (lambda t: t[:, 50:])
            assert torch.equal(second(before[name]), second(after[name])), name

    x = inputs(op, B=2, T=70, H=4, K=32, V=32, dtype=dtype, device=device)
    before, _ = op(**x)
    for name in ("v", "g"):
        y = {n: t.clone() for n, t in x.items()}
        y[name][0] = float("nan")
        y[name][1, :, 3] = float("nan")
        after, _ = op(**y)
        assert torch.equal(after[1, :, :3], before[1, :, :3])
        assert after[0].isnan().all()


def test_later_tokens_change_nothing_before_them(device):
    for dtype, op in product((FP32, BF16), OPS.values()):
        x = inputs(op, T=140, K=32, V=32, dtype=dtype, device=device)
        other = inputs(op, "strong16", T=140, K=32, V=32, dtype=dtype, device=device)
        before, _ = op(**x)
        for t in (139, 101, 64, 63, 33, 16, 1):
            y = {name: s.clone() for name, s in x.items()}
            for name in y.keys() - {"initial_state"}:
                y[name][:, t:] = other[name][:, t:]
            after, _ = op(**y)
            assert torch.equal(after[:, :t], before[:, :t])


KDA_AXES = AXES | {"op": ["kda", "kda_recurrent"], "gate": ["log", "kernel", "kernel_no_bias"]}
KDA_AXES["beta"] = ["given", "sigmoid", "negative"]
GLA_AXES = AXES | {"op": ["gla", "gla_recurrent"], "gate": ["log"], "beta": ["none"], "l2norm": [False]}


@pytest.mark.parametrize("case", pairwise(KDA_AXES) + pairwise(GLA_AXES), ids=name_of)
def test_options_pairwise(device, case):
    op = OPS[case["op"]]
    x, options, cotangents = call_of(case, partial(inputs, op), device)
    check_against_oracle(op, x, cotangents, **options)


@all_ops
def test_v_first_and_grouped_heads(device, op):
    x = inputs(op, T=70, H=2, HV=6, K=24, V=40, device=device)
    x["initial_state"] = x["initial_state"].mT.contiguous()
    check_against_oracle(op, x, state_v_first=True)


def test_saturated_gate_and_beta(device):
    """Raw values far outside: softplus linear above 20, sigmoid at 0 and 1, a decay that underflows."""
    x = inputs(chunk_kda, T=70, HV=2, K=16, V=16, device=device)
    raw = torch.linspace(-100, 100, 70 * 2 * 16, device=device).view(1, 70, 2, 16)
    x |= {"g": raw, "beta": torch.linspace(100, -100, 140, device=device).view(1, 70, 2),
          "A_log": torch.tensor([0.0, 3.0], device=device),
          "dt_bias": torch.tensor([0.0, 5.0], device=device).repeat(16)}  # fmt: skip
    for op in (chunk_kda, fused_recurrent_kda):
        check_against_oracle(op, x, hard=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)


@pytest.mark.parametrize("raw", [-30.0, -5.0, 0.0, 5.0, 19.99, 20.01, 200.0])
def test_gate_is_softplus_to_the_last_digits(device, raw):
    """The decay of one token, read off a state of ones."""
    K = 40
    x = {n: torch.zeros(1, 1, 1, K, device=device) for n in "qkv"}
    state = torch.ones(1, 1, K, K, device=device)
    g = raw + torch.rand(1, 1, 1, K, device=device)
    options = {"use_gate_in_kernel": True, "A_log": torch.full((1,), -1.0, device=device)}
    _, final = chunk_kda(**x, g=g, beta=x["v"][..., 0], initial_state=state, output_final_state=True, **options)
    decay = reference.log_decay(g.double(), options["A_log"], None).exp()[0, 0, 0]
    limit = 3e-7 + 5 * 2**-24 * decay.log().abs()  # g is rounded to float32 before the exponential
    assert ((final[0, 0, :, 0] / decay - 1).abs() < limit).all()


@both_dtypes
@all_ops
def test_strides(device, op, dtype):
    x = inputs(op, B=2, T=66, HV=4, K=24, V=40, dtype=dtype, device=device)
    cotangents = cotangents_for(op, x)
    expected = with_gradients(op, x, cotangents)
    for views in zip(*(strided_copies(t) for t in [*x.values(), *cotangents.values()]), strict=True):
        y = dict(zip(x, views, strict=False))
        dy = dict(zip(cotangents, views[len(x) :], strict=True))
        assert_equal(with_gradients(op, y, dy), expected)


@both_dtypes
@both_rules
def test_packed_qkv_and_expanded_gradient(device, op, dtype):
    x = inputs(op, T=66, K=32, V=32, dtype=dtype, device=device)
    packed = torch.cat([x.pop(n).flatten(2) for n in "qkv"], -1).requires_grad_()
    q, k, v = (t.unflatten(-1, (2, 32)) for t in packed.split(64, -1))
    o, _ = op(q, k, v, **x)
    (grad,) = torch.autograd.grad(o.sum(), packed)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    o2, _ = op(*leaves, **x)
    grads = torch.autograd.grad(o2, leaves, torch.ones_like(o2))
    assert torch.equal(o, o2)
    assert torch.equal(grad, torch.cat([g.flatten(2) for g in grads], -1))


@all_ops
def test_poisoned_memory_changes_nothing(device, op, poison):
    for dtype, T in product((FP32, BF16), (1, 66)):
        x = inputs(op, T=T, HV=4, K=24, V=24, dtype=dtype, device=device)
        cotangents = cotangents_for(op, x)
        poisoned = with_gradients(op, x, cotangents)
        poison(False)
        assert_equal(with_gradients(op, x, cotangents), poisoned)
        poison(True)


@all_ops
def test_deterministic(device, op, threads):
    for dtype, (B, T, HV) in product((FP32, BF16), ((1, 200, 2), (2, 65, 4), (1, 40, 10))):
        x = inputs(op, B=B, T=T, HV=HV, dtype=dtype, device=device)
        cotangents = cotangents_for(op, x)
        threads(1)
        first = with_gradients(op, x, cotangents)
        for n in (1, 2, 3, 4):  # so many heads walk the tokens together as all threads are busy with
            threads(n)
            assert_equal(with_gradients(op, x, cotangents), first)


def test_other_float_dtypes_of_gates_and_state(device):
    x = inputs(chunk_kda, T=40, K=16, V=16, device=device)
    cotangents = cotangents_for(chunk_kda, x)
    for other in (BF16, torch.float16, torch.float64):
        y = x | {n: x[n].to(other) for n in ("g", "beta", "initial_state")}
        got = with_gradients(chunk_kda, y, cotangents)
        expected = with_gradients(chunk_kda, x | {n: y[n].float() for n in ("g", "beta", "initial_state")}, cotangents)
        assert got["dg"].dtype == got["dbeta"].dtype == got["dinitial_state"].dtype == other
        assert_equal(got, {n: t.to(got[n].dtype) for n, t in expected.items()})


@pytest.mark.parametrize("delta", [True, False], ids=["kda", "gla"])
def test_chunk_recurrent_split_and_step_agree(device, delta):
    chunk, recurrent = (chunk_kda, fused_recurrent_kda) if delta else (chunk_gla, recurrent_gla)
    x = inputs(chunk, T=150, HV=4, K=32, V=48, device=device)
    start, tokens = x.pop("initial_state"), list(x)
    o, state = chunk(**x, initial_state=start, output_final_state=True)
    for op, at in product((chunk, recurrent), (0, 1, 16, 33, 64, 77, 149)):
        o1, carried = op(*(x[n][:, :at] for n in tokens), initial_state=start, output_final_state=True)
        o2, final = op(*(x[n][:, at:] for n in tokens), initial_state=carried, output_final_state=True)
        assert rel_err(torch.cat([o1, o2], 1), o) < 1e-5
        assert rel_err(final, state) < 1e-5
    pool, pieces, at = start.clone(), [], 0
    for n in [1, 2, 3, 5, 8] * 7 + [7, 8, 2]:
        pieces.append(kda_step_(pool, *(x[name][:, at : at + n] for name in tokens), delta=delta))
        at += n
    assert at == 150
    assert rel_err(torch.cat(pieces, 1), o) < 1e-5
    assert rel_err(pool, state) < 1e-5


@pytest.mark.parametrize("delta", [True, False], ids=["kda", "gla"])
def test_one_decay_per_head_is_the_scalar_family(device, delta):
    x = gdn_inputs(T=150, HV=4, K=32, V=48, device=device)
    wide = x | {"g": x["g"][..., None].expand(*x["g"].shape, 32)}
    if not delta:
        del x["beta"], wide["beta"]
    chunk, scalar = (chunk_kda, chunk_gated_delta_rule) if delta else (chunk_gla, chunk_simple_gla)
    o, state = chunk(**wide, output_final_state=True)
    expected, expected_state = scalar(**x, output_final_state=True)
    assert rel_err(o, expected) < 1e-5
    assert rel_err(state, expected_state) < 1e-5


@both_rules
def test_exactly_representable_values_give_exact_results(device, op):
    """One-hot keys, beta in {0, 1}, no decay but resets of single channels, small integers: every sum is exact."""
    for dtype in (FP32, BF16):
        x = inputs(op, "zero", T=140, H=1, HV=2, K=16, V=16, keys="onehot", dtype=dtype, device=device)
        x["q"] = torch.randint(-1, 2, x["q"].shape, device=device).to(dtype)
        x["v"] = torch.randint(-1, 2, x["v"].shape, device=device).to(dtype)
        x["initial_state"] = torch.randint(-2, 3, x["initial_state"].shape, device=device).float()
        x["g"].masked_fill_(torch.rand_like(x["g"]) < 0.1, float("-inf"))
        if DELTA[op]:
            x["beta"] = torch.randint(0, 2, x["beta"].shape, device=device).float()
        o, state = op(**x, scale=1.0, output_final_state=True)
        ref, ref_state = reference.kda(**double(x), scale=1.0, output_final_state=True, delta=DELTA[op])
        assert torch.equal(o.double(), ref)
        assert torch.equal(state.double(), ref_state)


@both_rules
def test_autocast_and_compile(device, op):
    torch.compiler.reset()

    def under_autocast(**kw):
        with torch.autocast(device, dtype=BF16):
            return op(**kw)

    compiled = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")
    x = inputs(op, T=40, HV=4, K=16, V=24, device=device)
    cotangents = {"o": torch.randn_like(x["v"]), "final_state": torch.randn_like(x["initial_state"])}
    got = with_gradients(compiled, x, cotangents)
    low = x | {n: x[n].to(BF16) for n in "qkv"}
    expected = with_gradients(op, low, cotangents)
    assert got["o"].dtype == BF16
    assert got["dq"].dtype == got["final_state"].dtype == FP32
    assert_equal(got, {n: t.to(got[n].dtype) for n, t in expected.items()})


def step_inputs(B=3, t=1, H=2, HV=4, K=32, V=48, slots=None, dtype=FP32, device="cpu"):
    x = inputs(chunk_kda, B=B, T=t, H=H, HV=HV, K=K, V=V, dtype=dtype, device=device)
    del x["initial_state"]
    return {"state": torch.randn(slots or B, HV, K, V, device=device)} | x


def check_step(x, **options):
    """Output and pool against the float64 oracle and plain torch; slots that no row names keep every bit."""
    exact_o, exact_state = reference.kda_step(**double(x), **options)
    plain_o, plain_state = reference.kda_step(**x, **options)
    state = x["state"].clone(memory_format=torch.preserve_format)
    o = kda_step_(**x | {"state": state}, **options)
    dtype = x["q"].dtype
    assert o.dtype == dtype
    testing.check_close("o", o, exact_o, plain_o, dtype=dtype)
    testing.check_close("state", state, exact_state, plain_state, dtype=dtype)
    slots = options.get("slots")
    used = torch.arange(len(o), device=o.device) if slots is None else slots[(slots >= 0) & (slots < len(state))]
    untouched = torch.ones(len(state), dtype=torch.bool, device=state.device).index_fill(0, used, False)
    assert torch.equal(state[untouched], x["state"][untouched])
    return o, state


@both_dtypes
@pytest.mark.parametrize("t", range(1, 9))
def test_step_tokens(device, t, dtype):
    for delta, v_first in product((True, False), (True, False)):
        x = step_inputs(t=t, dtype=dtype, device=device)
        if v_first:
            x["state"] = x["state"].mT.contiguous()
        check_step(x, delta=delta, state_v_first=v_first)


@both_dtypes
@pytest.mark.parametrize("K, V, H, HV", [*SIZES, (33, 50, 2, 2), (132, 20, 1, 2)])
def test_step_sizes(device, K, V, H, HV, dtype):
    for v_first in (False, True):
        x = step_inputs(B=2, t=2, K=K, V=V, H=H, HV=HV, dtype=dtype, device=device)
        if v_first:
            x["state"] = x["state"].mT.contiguous()
        check_step(x, state_v_first=v_first)


def test_step_options(device):
    x = step_inputs(t=3, slots=9, B=6, device=device)
    slots = torch.tensor([7, -1, 0, 9, 3, -5], device=device)
    raw = {"g": 2 * torch.randn_like(x["g"]), "beta": torch.randn_like(x["beta"])}
    gate = {"A_log": torch.randn(4, device=device), "dt_bias": torch.randn(128, device=device)}
    options = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True}
    o, _ = check_step(x | raw | gate, slots=slots, allow_neg_eigval=True, scale=0.3, **options)
    assert o[[1, 3, 5]].count_nonzero() == 0
    check_step({n: t for n, t in x.items() if n != "beta"}, slots=slots, delta=False)
    x["state"][[1, 2, 4, 5, 6, 8]] = float("nan")
    kda_step_(**x, slots=slots)
    assert x["state"][[1, 2, 4, 5, 6, 8]].isnan().all()
    assert not x["state"][[0, 3, 7]].isnan().any()


@both_dtypes
@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
def test_step_on_a_bf16_state(device, v_first, dtype):
    """It is what a float32 state of the same numbers gives, rounded once; in a strided pool."""
    for t, (K, V) in product((1, 3), ((128, 128), (33, 50))):
        x = step_inputs(t=t, K=K, V=V, slots=5, dtype=dtype, device=device)
        slots = torch.tensor([3, -1, 0], device=device)
        pool = x["state"].mT.contiguous() if v_first else x["state"]
        rounded = F.pad(pool, (0, 3))[..., : pool.shape[-1]].bfloat16()
        exact = rounded.float()
        o = kda_step_(**x | {"state": rounded}, slots=slots, state_v_first=v_first)
        assert torch.equal(o, kda_step_(**x | {"state": exact}, slots=slots, state_v_first=v_first))
        assert torch.equal(rounded, exact.bfloat16())


def shape(*sizes, dtype=FP32):
    return torch.zeros(sizes, dtype=dtype)


REJECTED = {
    "g_shape": ({"g": shape(1, 4, 4)}, RuntimeError, r"kda: g must have shape \[B, T, HV, K\] = \[1, 4, 4, 8\], got"),
    "g_heads": ({"g": shape(1, 4, 2, 8)}, RuntimeError, r"g must have shape \[B, T, HV, K\] = \[1, 4, 4, 8\], got"),
    "beta": ({"beta": shape(1, 4, 2)}, RuntimeError, r"beta must have shape \[B, T, HV\] = \[1, 4, 4\], got"),
    "K": ({"q": shape(1, 4, 2, 257), "k": shape(1, 4, 2, 257)}, RuntimeError, "q must have K in 1..256, got 257"),
    "dt_bias": (
        {"use_gate_in_kernel": True, "A_log": shape(4), "dt_bias": shape(4)}, RuntimeError,
        r"dt_bias must have shape \[HV K\] = \[32\], got \[4\]",
    ),
    "no_A_log": ({"use_gate_in_kernel": True}, ValueError, "chunk_kda: use_gate_in_kernel must come with A_log"),
    "neg_eigval": ({"allow_neg_eigval": True}, ValueError, "must come with use_beta_sigmoid_in_kernel"),
    "double": ({n: shape(1, 4, 2, 8, dtype=torch.float64) for n in "qk"}, ValueError, "q must be float32.* bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_inputs(device, case):
    change, error, message = REJECTED[case]
    x = {"q": shape(1, 4, 2, 8), "k": shape(1, 4, 2, 8), "v": shape(1, 4, 4, 8), "g": shape(1, 4, 4, 8),
         "beta": shape(1, 4, 4)} | change  # fmt: skip
    with pytest.raises(error, match=message):
        chunk_kda(**{n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in x.items()})


def test_rejected_steps(device):
    x = step_inputs(t=9, device=device)
    with pytest.raises(RuntimeError, match=r"kda: q must have T in 1..8, got 9"):
        kda_step_(**x)
    x = step_inputs(B=2, device=device)
    with pytest.raises(RuntimeError, match=r"state must have shape \[slots, HV, K, V\] = \[2, 4, 32, 48\], got"):
        kda_step_(**x | {"state": x["state"].mT})
    with pytest.raises(RuntimeError, match=r"state must be float32 or bfloat16, got float16"):
        kda_step_(**x | {"state": x["state"].half()})
    with pytest.raises(RuntimeError, match="inference only"):
        kda_step_(**x | {"q": x["q"].requires_grad_()})


@pytest.mark.usefixtures("checks")
def test_checked_values(device):
    x = inputs(chunk_kda, T=4, K=8, V=8, device=device)
    with pytest.raises(ValueError, match=r"chunk_kda: g must be <= 0 \(the log of a decay\), got a maximum of 0.5"):
        chunk_kda(**x | {"g": x["g"].abs() * 0 + 0.5})


def test_float16_on_cuda(device):
    if device == "cpu":
        pytest.skip("float16 is a CUDA dtype here; the CPU rejects it")
    for (K, V), op in product(((64, 64), (96, 192), (128, 128)), OPS.values()):
        check_against_oracle(op, inputs(op, T=130, HV=4, K=K, V=V, dtype=torch.float16, device=device))
