"""Properties that hold for any input, on inputs that hypothesis makes up.

The examples are the same in every run; ``--hypothesis-profile=search`` looks for new ones.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lt2_ext import ops
from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.mixers import MIXERS
from lt2_ext.reference import causal_conv1d as conv_reference
from lt2_ext.reference import gdn as gdn_reference
from lt2_ext.reference import loop_state as loop_reference
from lt2_ext.testing import STRONG_GATES, check_close, gdn_inputs, rel_err

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**31 - 1)
RULES = (ops.chunk_gated_delta_rule, ops.fused_recurrent_gated_delta_rule)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Operators this small lose time to every further thread."""
    threads(1)


@st.composite
def offsets(draw, tokens: int) -> list[int]:
    """Of up to 4 packed sequences, some of them empty, with tokens of none before and after."""
    return sorted(draw(st.lists(st.integers(0, tokens), min_size=2, max_size=5)))


@st.composite
def gdn_calls(draw) -> dict:
    """Sizes and regimes for :func:`gdn_inputs`, offsets, and options of the operators."""
    tokens, packed = draw(st.integers(0, 100)), draw(st.booleans())
    heads = draw(st.integers(1, 3))
    cu_seqlens = draw(offsets(tokens)) if packed else None
    sizes = {
        "B": 1 if packed else draw(st.integers(1, 2)),
        "T": tokens,
        "H": heads,
        "HV": heads * draw(st.integers(1, 3)),
        "K": draw(st.integers(1, 70)),
        "V": draw(st.integers(1, 70)),
        "sequences": len(cu_seqlens) - 1 if packed else None,
        "dtype": draw(DTYPES),
        "gate": draw(st.sampled_from(["zero", "small", "logsigmoid", *STRONG_GATES])),
        "beta": draw(st.sampled_from(["sigmoid", "0", "0.835", "1"])),
        "keys": draw(st.sampled_from(["random", "equal", "onehot", "rank2", "zero_rows"])),
    }
    options = {
        "scale": draw(st.sampled_from([None, 0.3])),
        "use_qk_l2norm_in_kernel": draw(st.booleans()),
        "use_gate_in_kernel": draw(st.booleans()),
        "use_beta_sigmoid_in_kernel": draw(st.booleans()),
        "state_v_first": draw(st.booleans()),
    }
    if options["use_beta_sigmoid_in_kernel"]:
        options["allow_neg_eigval"] = draw(st.booleans())
    return {"seed": draw(SEEDS), "sizes": sizes, "cu_seqlens": cu_seqlens, "options": options}


def gdn_tensors(call: dict, device: str) -> dict[str, Tensor]:
    torch.manual_seed(call["seed"])
    x = gdn_inputs(device=device, **call["sizes"])
    if call["options"]["use_gate_in_kernel"]:
        x["g"] = torch.randn_like(x["g"])
        x |= {n: torch.randn(x["v"].shape[2], device=device) for n in ("A_log", "dt_bias")}
    if call["options"]["use_beta_sigmoid_in_kernel"]:
        x["beta"] = torch.randn_like(x["beta"])
    if call["options"]["state_v_first"]:
        x["initial_state"] = x["initial_state"].mT.contiguous()
    return x


def is_hard(call: dict) -> bool:
    """Whether the wider column of the tolerance table applies: strong gates, dependent keys, or nothing forgotten."""
    sizes, options = call["sizes"], call["options"]
    strong = options["use_gate_in_kernel"] or sizes["gate"] in STRONG_GATES
    return strong or sizes["keys"] != "random" or (sizes["gate"] == "zero" and sizes["beta"] == "1")


def cut(x: dict[str, Tensor], begin: int, end: int | None) -> dict[str, Tensor]:
    return x | {n: x[n][:, begin:end] for n in ("q", "k", "v", "g", "beta")}


@given(call=gdn_calls(), where=st.floats(0, 1))
def test_chunks_tokens_and_splits_of_the_gated_delta_rule_are_the_equation(call, where, device):
    x = gdn_tensors(call, device)
    dtype, hard = call["sizes"]["dtype"], is_hard(call)
    options = call["options"] | {"output_final_state": True}
    cu_seqlens, tokens = call["cu_seqlens"], call["sizes"]["T"]
    packed = {} if cu_seqlens is None else {"cu_seqlens": torch.tensor(cu_seqlens, device=device)}
    want = gdn_reference.gated_delta_rule(**{n: t.double() for n, t in x.items()}, **packed, **options)
    at = round(where * tokens)
    for rule in RULES:
        for name, got, w in zip(("o", "state"), rule(**x, **packed, **options), want, strict=True):
            check_close(f"{rule.__name__}: {name}", got, w, dtype=dtype, hard=hard)
        if packed:
            continue
        head, state = rule(**cut(x, 0, at), **options)
        tail, state = rule(**cut(x, at, None) | {"initial_state": state}, **options)
        check_close(f"{rule.__name__}, split at {at}: o", torch.cat([head, tail], 1), want[0], dtype=dtype, hard=hard)
        check_close(f"{rule.__name__}, split at {at}: state", state, want[1], dtype=dtype, hard=hard)


@given(call=gdn_calls())
def test_packed_sequences_do_not_see_each_other(call, device):
    """Bit for bit: changing one sequence changes no other, forward or backward."""
    cu_seqlens = call["cu_seqlens"]
    if cu_seqlens is None:
        return
    x = gdn_tensors(call, device)
    options = call["options"] | {"output_final_state": True, "cu_seqlens": torch.tensor(cu_seqlens, device=device)}
    begin, end = cu_seqlens[-2:]

    def run(x: dict[str, Tensor]) -> list[Tensor]:
        leaves = {n: x[n].clone().requires_grad_() for n in ("q", "k", "v", "g", "beta")}
        o, state = ops.chunk_gated_delta_rule(**x | leaves, **options)
        grads = torch.autograd.grad(o.float().sum() + state.sum(), list(leaves.values()), materialize_grads=True)
        return [torch.cat([t[:, :begin], t[:, end:]], 1) for t in (o, *grads)] + [state[:-1]]

    changed = {n: t.clone() for n, t in x.items()}
    for name in ("q", "k", "v"):
        changed[name][:, begin:end] *= -1
    for a, b in zip(run(x), run(changed), strict=True):
        assert torch.equal(a, b)


@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    tokens=st.integers(1, 8),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=DTYPES,
    v_first=st.booleans(),
    spare=st.integers(0, 3),
    idle=st.booleans(),
)
def test_decode_steps_are_the_equation(seed, batch, tokens, heads, group, dims, dtype, v_first, spare, idle, device):
    torch.manual_seed(seed)
    HV, (K, V) = heads * group, dims
    x = gdn_inputs(batch, tokens, heads, K, V, HV, dtype=dtype, device=device)
    a, b = torch.randn(2, batch, tokens, HV, device=device)
    gate = (torch.randn(HV, device=device), torch.randn(HV, device=device))
    pool = torch.randn(batch + spare, HV, *((V, K) if v_first else (K, V)), device=device)
    slots = torch.randperm(batch + spare, device=device)[:batch]
    if idle:
        slots[0] = -1
    options = {"slots": slots, "state_v_first": v_first}
    args = [x["q"], x["k"], x["v"], a, b, *gate]
    want, want_pool = gdn_reference.gated_delta_step(pool.double(), *(t.double() for t in args), **options)
    got = ops.gated_delta_step_(pool, *args, **options)
    check_close("o", got, want, dtype=dtype, hard=True)
    check_close("state", pool, want_pool, dtype=dtype, hard=True)


@st.composite
def splits(draw, tokens: int) -> list[int]:
    """Lengths that add up to ``tokens``, all positive."""
    cuts = sorted(draw(st.sets(st.integers(1, max(tokens - 1, 1)), max_size=5)) - {tokens})
    return [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]


@given(
    seed=SEEDS,
    batch=st.integers(1, 2),
    pieces=st.integers(1, 300).flatmap(splits),
    channels=st.integers(1, 130),
    width=st.integers(1, 16),
    dtype=DTYPES,
    activation=st.sampled_from(["silu", None]),
    with_bias=st.booleans(),
)
def test_splits_of_the_convolution_are_the_whole(seed, batch, pieces, channels, width, dtype, activation, with_bias):
    """Bit for bit, by any mixture of the forward and the step; and the whole is the equation."""
    torch.manual_seed(seed)
    x = torch.randn(batch, sum(pieces), channels).to(dtype)
    weight, state = torch.randn(channels, width), torch.randn(batch, channels, width).to(dtype)
    bias = torch.randn(channels) if with_bias else None
    whole, final = ops.causal_conv1d(x, weight, bias, state, True, activation)
    want = conv_reference.causal_conv1d(x.double(), weight.double(), bias, state.double(), True, activation)
    check_close("y", whole, want[0])
    assert torch.equal(final.double(), want[1])
    parts = []
    for i, piece in enumerate(x.split(pieces, 1)):
        if i % 2:
            parts.append(ops.causal_conv1d_step_(state, piece, weight, bias, activation=activation))
        else:
            y, state = ops.causal_conv1d(piece, weight, bias, state, True, activation)
            parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, final)


@given(
    seed=SEEDS,
    slots=st.integers(1, 6),
    shape=st.lists(st.integers(1, 5), max_size=3),
    pairs=st.lists(st.tuples(st.integers(-1, 6), st.integers(-1, 6)), max_size=8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    transposed=st.booleans(),
)
def test_slots_are_copied_and_zeroed_as_rows(seed, slots, shape, pairs, dtype, transposed, device):
    torch.manual_seed(seed)
    state = torch.randint(-99, 99, (slots, *shape)).to(device, dtype)
    if transposed and shape:
        state = state.transpose(0, 1).contiguous().transpose(0, 1)
    src, dst = (torch.tensor([p[i] for p in pairs], dtype=torch.int64, device=device) for i in (0, 1))
    want = loop_reference.loop_state_copy(state, src, dst)
    ops.loop_state_copy_(state, src, dst)
    assert torch.equal(state, want)
    for s in src.tolist():
        if 0 <= s < slots:
            want[s] = 0
    ops.loop_state_zero_(state, src)
    assert torch.equal(state, want)


@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    tokens=st.integers(1, 4),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    keys=st.integers(1, 700),
    dtype=DTYPES,
    loops=st.one_of(st.none(), st.integers(1, 3)),
    indices=st.lists(st.integers(-1, 4), min_size=6, max_size=6),
)
def test_decode_attention_is_the_equation(seed, batch, tokens, heads, dims, keys, dtype, loops, indices, device):
    torch.manual_seed(seed)
    (H, group), D = heads, dims[0]
    shape = (4, keys, H) if loops is None else (loops, 4, keys, H)
    q = torch.randn(batch, tokens, H * group, D, device=device).to(dtype)
    caches = [torch.randn(*shape, d, device=device).to(dtype) for d in dims]
    options = {"slots": torch.tensor(indices[:batch], device=device)}
    if loops is not None:
        options["loop_map"] = torch.tensor(indices[3 : 3 + batch], device=device)
    lengths = torch.randint(0, keys + 1, (batch,), device=device)
    want = loop_reference.loop_decode_attention(q.double(), *(c.double() for c in caches), lengths, **options)
    check_close("o", ops.loop_decode_attention(q, *caches, lengths, **options), want)


MODEL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "index_topk": 9}


@given(
    seed=SEEDS,
    mixers=st.lists(st.sampled_from(sorted(MIXERS)), min_size=1, max_size=3),
    window=st.integers(1, 70),
    loops=st.integers(1, 4),
    rows=st.integers(1, 2),
    pieces=st.integers(1, 60).flatmap(splits),
    gated=st.booleans(),
    residual=st.booleans(),
)
@torch.no_grad()
def test_any_split_through_the_state_is_one_forward(seed, mixers, window, loops, rows, pieces, gated, residual):
    torch.manual_seed(seed)
    shape = {"layer_pattern": ",".join(mixers), "num_hidden_layers": len(mixers), "window_size": window}
    options = {"loop_count": loops, "attn_output_gate": gated, "use_loop_residual": residual}
    model = LT2(LT2Config(**MODEL, **shape, **options))
    if residual:
        model.rho.normal_(std=0.3)
    x = torch.randint(64, (rows, sum(pieces)))
    state = model.new_state(rows, x.shape[1])
    got = torch.cat([model(piece, state=state) for piece in x.split(pieces, 1)], 1)
    assert rel_err(got, model(x)) < 1e-4
