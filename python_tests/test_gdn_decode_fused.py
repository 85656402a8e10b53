"""gdn_decode_fused_: convolution, delta step and gated norm of a layer in one operator."""

import pytest
import torch

from lt2_ext.ops import causal_conv1d_step_, gated_delta_step_, gdn_decode_fused_
from lt2_ext.reference import gdn as reference
from lt2_ext.testing import check_close

FP32, BF16 = torch.float32, torch.bfloat16

both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def fused_inputs(B=3, t=1, H=2, HV=4, K=32, V=48, W=4, slots=None, dtype=FP32, device="cpu"):
    D = 2 * H * K + HV * V
    return {
        "state": torch.randn(slots or B, HV, K, V, device=device),
        "conv_state": torch.randn(slots or B, D, W, device=device).to(dtype),
        "qkv": torch.randn(B, t, D, device=device).to(dtype),
        "z": torch.randn(B, t, HV, V, device=device).to(dtype),
        "a": (2 * torch.randn(B, t, HV, device=device)).to(dtype),
        "b": torch.randn(B, t, HV, device=device).to(dtype),
        "conv_weight": torch.randn(D, W, device=device) / 2,
        "A_log": torch.randn(HV, device=device),
        "dt_bias": torch.randn(HV, device=device),
        "norm_weight": torch.randn(V, device=device),
    }


def pools(x):
    return {n: x[n].clone(memory_format=torch.preserve_format) for n in ("state", "conv_state")}


def check_against_oracle(x, **options):
    """Output and both pools; slots that no row names keep every bit."""
    dtype = x["qkv"].dtype
    exact = reference.decode_fused(**{n: t.double() for n, t in x.items()}, **options)
    plain = reference.decode_fused(**x, **options)
    after = pools(x)
    o = gdn_decode_fused_(**x | after, **options)
    assert o.dtype == dtype
    results = {"o": o, **after}
    for (name, ours), ref, torch_result in zip(results.items(), exact, plain, strict=True):
        check_close(name, ours, ref, torch_result, dtype=dtype)
    slots = options.get("slots")
    used = range(len(o)) if slots is None else slots.tolist()
    for name in ("state", "conv_state"):
        untouched = [n for n in range(len(x[name])) if n not in used]
        assert torch.equal(after[name][untouched], x[name][untouched])
    return o, after


@both_dtypes
@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
@pytest.mark.parametrize("t", [1, 2, 5, 8])
def test_tokens(device, t, v_first, dtype):
    x = fused_inputs(t=t, dtype=dtype, device=device)
    if v_first:
        x["state"] = x["state"].mT.contiguous()
    check_against_oracle(x, state_v_first=v_first)


@both_dtypes
@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
@pytest.mark.parametrize(
    "K, V, H, HV",
    [(64, 64, 2, 2), (96, 192, 1, 2), (128, 128, 2, 8), (192, 384, 1, 1), (256, 512, 1, 1), (20, 12, 3, 3)],
)
def test_head_shapes(device, K, V, H, HV, v_first, dtype):
    x = fused_inputs(B=2, t=2, K=K, V=V, H=H, HV=HV, dtype=dtype, device=device)
    if v_first:
        x["state"] = x["state"].mT.contiguous()
    check_against_oracle(x, state_v_first=v_first)


@both_dtypes
@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
@pytest.mark.parametrize("t", [1, 3])
def test_many_heads_of_one_value_head(device, t, v_first, dtype):
    """On GPUs a block may have a whole head."""
    x = fused_inputs(B=4, t=t, K=128, V=128, H=16, HV=16, dtype=dtype, device=device)
    if v_first:
        x["state"] = x["state"].mT.contiguous()
    check_against_oracle(x, state_v_first=v_first)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("v_first", [False, True], ids=["k_first", "v_first"])
@pytest.mark.parametrize("H", [2, 24])
@pytest.mark.parametrize("K, V", [(20, 12), (64, 64), (80, 160), (96, 192), (128, 128), (128, 256), (192, 384)])
def test_adjacent_taps_change_no_bit(K, V, H, v_first, dtype):
    """One token, one value head per key head and windows of four adjacent taps have a kernel of their own."""
    x = fused_inputs(B=3, H=H, HV=H, K=K, V=V, slots=4, dtype=dtype, device="cuda")
    slots = torch.tensor([3, 0, 2], device="cuda")
    if v_first:
        x["state"] = x["state"].mT.contiguous()
    o, after = check_against_oracle(x, slots=slots, state_v_first=v_first)
    apart = pools(x)
    apart["conv_state"] = torch.empty(*x["conv_state"].shape[:2], 5, dtype=dtype, device="cuda")[..., :4]
    apart["conv_state"].copy_(x["conv_state"])
    assert torch.equal(gdn_decode_fused_(**x | apart, slots=slots, state_v_first=v_first), o)
    assert all(torch.equal(apart[name], after[name]) for name in after)


@both_dtypes
@pytest.mark.parametrize("W", [1, 2, 3, 4, 7, 16])
def test_widths(device, W, dtype):
    check_against_oracle(fused_inputs(t=3, W=W, dtype=dtype, device=device))


@both_dtypes
def test_options(device, dtype):
    x = fused_inputs(B=4, t=2, slots=7, dtype=dtype, device=device)
    slots = torch.tensor([6, -1, 2, 7], device=device)
    bias = torch.randn(x["qkv"].shape[-1], device=device)
    o, _ = check_against_oracle(x | {"conv_bias": bias}, slots=slots, allow_neg_eigval=True, scale=0.7, eps=1e-2)
    assert o[[1, 3]].count_nonzero() == 0
    assert o[[0, 2]].count_nonzero() > 0


def test_rows_without_a_slot_give_zeros_whatever_their_inputs_are(device):
    x = fused_inputs(B=2, slots=3, device=device)
    slots = torch.tensor([1, 2**40], device=device)
    expected = gdn_decode_fused_(**x | pools(x), slots=slots)
    for name in ("qkv", "z", "a", "b"):
        x[name][1] = float("nan")
    x["state"][[0, 2]] = float("nan")
    assert torch.equal(gdn_decode_fused_(**x | pools(x), slots=slots), expected)
    assert expected[1].count_nonzero() == 0


@both_dtypes
def test_strided_pools_and_inputs(device, dtype):
    """One loop's part of bigger pools, taps outermost; slices of a projection as inputs. Neighbours keep every bit."""
    x = fused_inputs(B=2, t=3, slots=5, dtype=dtype, device=device)
    slots = torch.tensor([4, 1], device=device)
    after = pools(x)
    expected = gdn_decode_fused_(**x | after, slots=slots)
    states = torch.randn(5, 3, *x["state"].shape[1:], device=device)
    windows = torch.randn(x["conv_state"].shape[2], 2, *x["conv_state"].shape[:2], device=device).to(dtype)
    state, window = states[:, 1], windows[:, 1].permute(1, 2, 0)
    state.copy_(x["state"])
    window.copy_(x["conv_state"])
    before = states.clone(), windows.clone()
    sizes = (x["qkv"].shape[-1], x["z"].flatten(-2).shape[-1])
    projection = torch.cat([x["qkv"], x["z"].flatten(-2)], -1)
    qkv, z = projection.split(sizes, -1)
    inputs = {"state": state, "conv_state": window, "qkv": qkv, "z": z.unflatten(-1, x["z"].shape[-2:])}
    assert torch.equal(gdn_decode_fused_(**x | inputs, slots=slots), expected)
    assert torch.equal(state, after["state"])
    assert torch.equal(window, after["conv_state"])
    states[:, 1], windows[:, 1] = before[0][:, 1], before[1][:, 1]
    assert torch.equal(states, before[0])
    assert torch.equal(windows, before[1])


def test_equals_the_operators_one_after_the_other(device):
    x = fused_inputs(t=4, K=64, V=64, device=device)
    after = pools(x)
    o = gdn_decode_fused_(**x | after)
    apart = pools(x)
    y = causal_conv1d_step_(apart["conv_state"], x["qkv"], x["conv_weight"])
    q, k, v = (t.unflatten(-1, (-1, 64)) for t in y.split([128, 128, 256], -1))
    values = gated_delta_step_(apart["state"], q, k, v, x["a"], x["b"], x["A_log"], x["dt_bias"])
    normed = torch.nn.functional.rms_norm(values, (64,), x["norm_weight"], 1e-6)
    check_close("o", o, (normed * torch.nn.functional.silu(x["z"])).double())
    assert torch.equal(after["conv_state"], apart["conv_state"])
    check_close("state", after["state"], apart["state"].double())


@both_dtypes
def test_tokens_at_once_equal_one_by_one(device, dtype):
    x = fused_inputs(t=8, dtype=dtype, device=device)
    once, apart = pools(x), pools(x)
    whole = gdn_decode_fused_(**x | once)
    tokens = ("qkv", "z", "a", "b")
    parts = [
        gdn_decode_fused_(**x | apart | dict(zip(tokens, part, strict=True)))
        for part in zip(*(x[n].split([3, 1, 4], 1) for n in tokens), strict=True)
    ]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert all(torch.equal(once[n], apart[n]) for n in once)


def test_deterministic(device, threads):
    x = fused_inputs(B=5, t=2, dtype=BF16, device=device)
    results = []
    for n in (1, 2, 3):
        threads(n)
        after = pools(x)
        results.append([gdn_decode_fused_(**x | after), *after.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_float16_on_cuda(device):
    if device == "cpu":
        pytest.skip("float16 is a CUDA dtype here; the CPU rejects it")
    check_against_oracle(fused_inputs(t=2, K=64, V=64, dtype=torch.float16, device=device))


@pytest.mark.cuda
def test_replays_of_a_cuda_graph():
    """Two steps in a graph, replayed, on states that change: as many eager steps."""
    x = fused_inputs(B=4, K=128, V=128, dtype=BF16, device="cuda")
    eager, captured = pools(x), pools(x)
    for _ in range(6):
        expected = gdn_decode_fused_(**x | eager)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gdn_decode_fused_(**x | pools(x))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gdn_decode_fused_(**x | captured)
        o = gdn_decode_fused_(**x | captured)
    for _ in range(3):
        graph.replay()
    assert torch.equal(o, expected)
    assert all(torch.equal(eager[n], captured[n]) for n in eager)


@pytest.mark.cuda
def test_states_that_are_not_in_pieces_of_16_bytes_are_an_error_on_cuda():
    x = fused_inputs(K=32, V=50, device="cuda")
    with pytest.raises(RuntimeError, match="states in aligned pieces of 16 bytes"):
        gdn_decode_fused_(**x)


def test_inputs_that_require_a_gradient_are_an_error(device):
    x = fused_inputs(device=device)
    x["norm_weight"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"gdn_decode_fused_: inference only, call it under torch.no_grad\(\)"):
        gdn_decode_fused_(**x)


@pytest.mark.usefixtures("checks")
def test_a_slot_used_twice_is_found_by_checks(device):
    with pytest.raises(ValueError, match=r"gdn_decode_fused_: slots must name no slot twice, got \[2, 0, 2\]"):
        gdn_decode_fused_(**fused_inputs(device=device), slots=torch.tensor([2, 0, 2], device=device))


REJECTED = {
    r"qkv must have 2 H K \+ HV V channels with HV = 4 .*, K = 32 and V = 48, got 300": ("qkv", (3, 1, 300)),
    r"z must have shape \[B, T, HV, V\] = \[3, 1, 4, 48\], got \[3, 1, 4, 32\]": ("z", (3, 1, 4, 32)),
    r"conv_state must have shape \[slots, D, W\] = \[3, 320, 4\], got \[2, 320, 4\]": ("conv_state", (2, 320, 4)),
    r"conv_weight must have W in 1..16, got 17": ("conv_weight", (320, 17)),
    r"conv_weight must have shape \[D, W\] = \[320, 4\], got \[300, 4\]": ("conv_weight", (300, 4)),
    r"norm_weight must have shape \[V\] = \[48\], got \[4\]": ("norm_weight", (4,)),
    r"a must have shape \[B, T, HV\] = \[3, 1, 4\], got \[3, 1, 2\]": ("a", (3, 1, 2)),
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejected_inputs(device, message):
    name, shape = REJECTED[message]
    with pytest.raises(RuntimeError, match=message):
        gdn_decode_fused_(**fused_inputs(device=device) | {name: torch.zeros(shape, device=device)})
