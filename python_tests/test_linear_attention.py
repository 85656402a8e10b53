"""The public functions of the relatives of the gated delta rule. Their kernels are those of test_gdn.py."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lt2_ext import ops, testing
from lt2_ext.reference import gdn as reference
from lt2_ext.reference.gdn import decay_between_tokens
from lt2_ext.testing import gdn_inputs, rel_err, with_gradients

FP32, BF16 = torch.float32, torch.bfloat16
SIMPLE = {"chunk": ops.chunk_simple_gla, "recurrent": ops.fused_recurrent_simple_gla}
DELTA = {"chunk": ops.chunk_delta_rule, "recurrent": ops.fused_recurrent_delta_rule}

both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
simple_ops = pytest.mark.parametrize("op", SIMPLE.values(), ids=SIMPLE)
delta_ops = pytest.mark.parametrize("op", DELTA.values(), ids=DELTA)


def double(x):
    return {n: t.double() for n, t in x.items()}


def check(op, oracle, x, hard=False, **options):
    """Outputs and gradients against the oracle in float64."""
    with torch.no_grad():
        o, state = op(**x, output_final_state=True, **options)
    cotangents = {"o": torch.randn_like(o), "final_state": torch.randn_like(state)}
    ours = with_gradients(op, x, cotangents, **options)
    exact = with_gradients(oracle, double(x), double(cotangents), **options)
    for name, ref in exact.items():
        testing.check_close(name, ours[name], ref, None, testing.gradient_kind(name), x["q"].dtype, hard)


def simple_oracle(g_gamma=None, **kw):
    if g_gamma is not None:
        kw["g"] = g_gamma.expand(kw["v"].shape[:3])
    return reference.gated_delta_rule(**kw, delta=False)


@both_dtypes
@simple_ops
@pytest.mark.parametrize("gate", ["none", "g", "g_gamma"])
@pytest.mark.parametrize("beta", [False, True])
def test_simple_gla(device, op, gate, beta, dtype):
    x = gdn_inputs(T=90, HV=4, K=32, V=48, sequences=3, dtype=dtype, device=device)
    if gate != "g":
        del x["g"]
    if gate == "g_gamma":
        x["g_gamma"] = -torch.rand(4, device=device)
    if not beta:
        del x["beta"]
    check(op, simple_oracle, x, scale=0.3, cu_seqlens=torch.tensor([0, 33, 33, 90], device=device))


@pytest.mark.parametrize("HV, K, V", [(2, 64, 64), (4, 128, 72)])
@pytest.mark.parametrize("gate", ["zero", "-0.01", "reset"])
def test_long_sequences(device, gate, HV, K, V):
    """Sequences that are worth cutting into segments, beside others that are not."""
    offsets = [0, 3, 3, 1200, 1264, 1500]
    x = gdn_inputs(T=1500, HV=HV, K=K, V=V, sequences=5, gate=gate, dtype=BF16, device=device)
    oracle = partial(simple_oracle, rule=reference.chunks)
    check(ops.chunk_simple_gla, oracle, x, hard=gate == "reset", cu_seqlens=torch.tensor(offsets, device=device))


@pytest.mark.cuda
@pytest.mark.parametrize("gate", ["strong16", "-30"])
def test_float16_at_strong_gates(gate):
    """What is left of the loss at the first token, e^-30 and less, is no number of the inputs' type."""
    x = gdn_inputs(T=130, K=64, V=64, gate=gate, dtype=torch.float16, device="cuda")
    check(ops.chunk_simple_gla, simple_oracle, x, hard=True)


@both_dtypes
@delta_ops
def test_delta_rule(device, op, dtype):
    x = gdn_inputs(T=90, HV=4, K=32, V=48, sequences=2, dtype=dtype, device=device)
    del x["g"]
    x["initial_state"] = x["initial_state"].mT.contiguous()
    options = {"use_qk_l2norm_in_kernel": True, "state_v_first": True}
    cu_seqlens = torch.tensor([0, 40, 90], device=device)
    check(op, reference.gated_delta_rule, x, hard=True, cu_seqlens=cu_seqlens, **options)


@pytest.mark.parametrize("op, delta", [(SIMPLE["chunk"], False), (ops.chunk_gated_delta_rule, True)])
def test_states_of_bf16_inputs_are_those_of_fp32(op, delta):
    """On a CPU: whatever is rounded for the outputs, what the states gain is not."""
    x = gdn_inputs(T=300, HV=4, K=96, V=80, dtype=BF16, device="cpu")
    exact = reference.gated_delta_rule(**double(x), delta=delta, output_final_state=True)[1]
    assert rel_err(op(**x, output_final_state=True)[1], exact) < 2e-5


def test_simple_gla_is_attention_without_a_softmax(device):
    """o = (scale Q K^T * E diag(beta)) V with E the decays between tokens: a third formulation."""
    x = gdn_inputs(B=2, T=70, H=2, HV=4, K=16, V=24, device=device)
    del x["initial_state"]
    o, _ = ops.chunk_simple_gla(**x)
    q, k, v, g, beta = (t.double().transpose(1, 2) for t in x.values())
    q, k = (t.repeat_interleave(2, 1) for t in (q, k))
    scores = 16**-0.5 * (q @ k.mT) * decay_between_tokens(g) * beta[..., None, :]
    assert rel_err(o, (scores @ v).transpose(1, 2)) < 1e-6


@pytest.mark.parametrize("gamma", [0.0, -1e-4, -8.0, -100.0, float("-inf")])
def test_constant_decays(device, gamma):
    """RetNet's, from none to a reset at every token, over several chunks."""
    x = gdn_inputs(T=150, K=32, V=32, device=device)
    del x["g"], x["beta"]
    x["g_gamma"] = torch.tensor([gamma, -0.03], device=device)
    o, state = ops.chunk_simple_gla(**x, output_final_state=True)
    want_o, want_state = simple_oracle(**double(x), output_final_state=True)
    testing.check_close("o", o, want_o)
    testing.check_close("state", state, want_state)


def test_long_sums_without_a_decay(device):
    """Positive features and no decay: the state grows with every token, its error relative to it does not."""
    x = gdn_inputs(T=3000, H=1, K=16, V=16, device=device)
    x = {"q": F.elu(3 * x["q"]) + 1, "k": F.elu(3 * x["k"]) + 1, "v": x["v"] + 1}
    o, state = ops.chunk_simple_gla(**x, output_final_state=True)
    want_o, want_state = simple_oracle(**double(x), output_final_state=True)
    testing.check_close("o", o, want_o)
    testing.check_close("state", state, want_state)


STEPS = {"simple": ops.simple_gla_step_, "delta": ops.delta_rule_step_}


@both_dtypes
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("t, K, V", [(1, 64, 64), (3, 33, 50), (8, 128, 40)])
@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
@pytest.mark.parametrize("optional", [False, True], ids=["bare", "gated"])
def test_step(device, step, t, K, V, v_first, optional, dtype):
    """In place on a pool: the oracle's numbers in the slots that rows name, no bit changed elsewhere, zeros for -1."""
    delta, slots = step == "delta", torch.tensor([3, -1, 0], device=device)
    x = gdn_inputs(B=3, T=t, HV=4, K=K, V=V, sequences=5, dtype=dtype, device=device)
    pool = x.pop("initial_state")
    gates = {n: x.pop(n) for n in ("g", "beta")}
    if optional:
        x |= {n: gate for n, gate in gates.items() if n == "beta" or not delta}
    stored = pool.mT.contiguous() if v_first else pool.clone()
    o = STEPS[step](stored, **x, slots=slots, scale=0.3, state_v_first=v_first)
    got = stored.mT if v_first else stored

    live = [0, 2]
    oracle = partial(reference.gated_delta_rule, delta=delta, scale=0.3, output_final_state=True)
    rows = double({n: value[live] for n, value in x.items()})
    want_o, want_state = oracle(**rows, initial_state=pool[slots[live]].double())
    testing.check_close("o", o[live], want_o, dtype=dtype)
    testing.check_close("state", got[slots[live]], want_state)
    assert o[1].count_nonzero() == 0
    assert torch.equal(got[[1, 2, 4]], pool[[1, 2, 4]])


def test_steps_continue_a_sequence(device):
    x = gdn_inputs(B=2, T=20, K=32, V=32, device=device)
    state = x.pop("initial_state")
    o, want = ops.chunk_simple_gla(**x, initial_state=state, output_final_state=True)
    first = {n: t[:, :11] for n, t in x.items()}
    o1, pool = ops.chunk_simple_gla(**first, initial_state=state, output_final_state=True)
    pieces = [o1]
    for at, end in ((11, 12), (12, 20)):
        pieces.append(ops.simple_gla_step_(pool, **{n: t[:, at:end] for n, t in x.items()}))
    assert rel_err(torch.cat(pieces, 1), o) < 1e-5
    assert rel_err(pool, want) < 1e-5


def test_reset_in_a_step(device):
    """g = -inf leaves nothing of the state."""
    x = gdn_inputs(B=1, T=1, K=8, V=8, gate="-inf", device=device)
    state = x.pop("initial_state")
    ops.simple_gla_step_(state, **x)
    want = (x["beta"][0, 0, :, None] * x["k"][0, 0])[..., :, None] * x["v"][0, 0, :, None]
    torch.testing.assert_close(state[0], want)


def test_step_takes_expanded_gates(device):
    x = gdn_inputs(B=3, T=2, K=16, V=16, device=device)
    pool = x.pop("initial_state")
    g = torch.tensor([-0.1, -0.2], device=device)
    a, b = pool.clone(), pool.clone()
    x.pop("beta")
    o = ops.simple_gla_step_(a, **x | {"g": g.expand(3, 2, 2)})
    want = ops.simple_gla_step_(b, **x | {"g": g.expand(3, 2, 2).contiguous()})
    assert torch.equal(o, want)
    assert torch.equal(a, b)


def test_rejected():
    x = gdn_inputs(T=4, K=8, V=8)
    with pytest.raises(ValueError, match="chunk_simple_gla: g_gamma must come without g, got both"):
        ops.chunk_simple_gla(**x, g_gamma=torch.zeros(2))
    del x["g"]
    with pytest.raises(ValueError, match=r"fused_recurrent_simple_gla: g_gamma must have shape \[2\], got \[3\]"):
        ops.fused_recurrent_simple_gla(**x, g_gamma=torch.zeros(3))
    state = x.pop("initial_state")
    with pytest.raises(ValueError, match="simple_gla_step_: beta must have the dtype of g"):
        ops.simple_gla_step_(state, **x, g=torch.zeros(1, 4, 2, dtype=BF16))
    with pytest.raises(RuntimeError, match=r"lt2::gdn: b must have shape \[B, T, HV\] = \[1, 4, 2\], got \[1, 4, 3\]"):
        ops.delta_rule_step_(state, x["q"], x["k"], x["v"], torch.zeros(1, 4, 3))
    with pytest.raises(RuntimeError, match="delta_rule_step_: inference only"):
        ops.delta_rule_step_(state, x["q"].requires_grad_(), x["k"], x["v"])


@pytest.mark.parametrize("op, step", [(SIMPLE["chunk"], STEPS["simple"]), (DELTA["chunk"], STEPS["delta"])])
def test_compiles_in_one_graph(device, op, step):
    x = gdn_inputs(T=12, K=16, V=16, device=device)
    state = x.pop("initial_state")
    del x["g"]

    def f(state, x):
        o, final = op(**x, initial_state=state, output_final_state=True)
        return o, step(final, **{n: t[:, :2] for n, t in x.items()}), final

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(state, x), f(state, x), strict=True):
        assert torch.equal(got, want)
