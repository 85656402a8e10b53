"""The operators of lt2_ext.ops.block_ops and add_rmsnorm against their oracles, and against themselves."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lt2_ext.ops import add_rmsnorm, gated_rmsnorm, loop_residual_rmsnorm, rope_cache_, swiglu
from lt2_ext.reference import block_ops as reference
from lt2_ext.reference import loop_state as loop_reference
from lt2_ext.testing import check_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWWISE = {  # operator, oracle, names of activations, whether there is a weight
    "add_rmsnorm": (add_rmsnorm, loop_reference.add_rmsnorm, ("x", "residual"), True),
    "swiglu": (swiglu, reference.swiglu, ("gate", "up"), False),
    "gated_rmsnorm": (gated_rmsnorm, reference.gated_rmsnorm, ("o", "z"), True),
}

every_op = pytest.mark.parametrize("name", ROWWISE)
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def inputs(name, shape=(2, 5, 72), dtype=FP32, device="cpu"):
    if dtype == FP16 and torch.device(device).type == "cpu":
        pytest.skip("float16 is a CUDA dtype")
    _, _, activations, weighted = ROWWISE[name]
    x = {n: torch.randn(shape, device=device).to(dtype) for n in activations}
    return x | {"weight": torch.randn(shape[-1], device=device)} if weighted else x


def with_gradients(op, tensors, cotangents):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    lost, given = zip(*used, strict=True)
    grads = torch.autograd.grad(lost, list(leaves.values()), given, materialize_grads=True)
    results = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def cotangents_of(name, x):
    first = next(iter(x.values()))
    return [torch.randn_like(first) for _ in range(2 if name == "add_rmsnorm" else 1)]


def check_op(name, x, cotangents):
    op, oracle, *_ = ROWWISE[name]
    dtype = next(iter(x.values())).dtype
    ours = with_gradients(op, x, cotangents)
    exact = with_gradients(oracle, {n: t.double() for n, t in x.items()}, cotangents)
    plain = with_gradients(oracle, x, cotangents)
    for key, ref in exact.items():
        check_close(key, ours[key], ref, plain[key], "grad" if key.startswith("d") else "out", dtype)
    assert ours["out0"].dtype == dtype
    return ours


def assert_equal(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


@every_op
@every_dtype
@pytest.mark.parametrize("T", [0, 1, 2, 3, 65, 130])
def test_against_oracle(name, dtype, T, device):
    for D in (3, 8, 15, 64, 65, 300):
        if D == 3 and name == "add_rmsnorm" and dtype != torch.float32:
            continue  # the gradient is a sum over three channels that cancels: rounding of the inputs is what is left
        x = inputs(name, (2, T, D), dtype, device)
        check_op(name, x, cotangents_of(name, x))


@every_op
@every_dtype
@pytest.mark.parametrize("D", [128, 256, 1000, 1024, 1536, 2048, 2049, 4096, 8192])
def test_wide_rows(name, dtype, D, device):
    x = inputs(name, (9, D), dtype, device)
    check_op(name, x, cotangents_of(name, x))


@every_op
def test_shapes(name, device):
    for shape in ((48,), (3, 48), (2, 3, 4, 48), (70000, 2), (0, 8)):
        x = inputs(name, shape, device=device)
        check_op(name, x, cotangents_of(name, x))


def test_each_output_of_add_rmsnorm_alone(device):
    x = inputs("add_rmsnorm", device=device)
    a, b = cotangents_of("add_rmsnorm", x)
    for cotangents in ((a, None), (None, b)):
        check_op("add_rmsnorm", x, cotangents)


@both_dtypes
def test_add_rmsnorm_is_the_loop_boundary_with_rho_one(dtype, device):
    x = inputs("add_rmsnorm", (7, 200), dtype, device)
    gated = loop_residual_rmsnorm(x["residual"], x["x"], torch.ones(200, device=device), x["weight"])
    for a, b in zip(add_rmsnorm(**x), gated, strict=True):
        assert torch.equal(a, b)


def test_add_rmsnorm_in_the_dtype_of_the_residual(device):
    x = inputs("add_rmsnorm", device=device)
    h, normed = add_rmsnorm(x["x"].bfloat16(), x["residual"], x["weight"])
    assert h.dtype == normed.dtype == FP32
    assert torch.equal(h, x["residual"] + x["x"].bfloat16())


@every_op
@both_dtypes
def test_strided_inputs(name, dtype, device):
    """Halves of a projection, heads inside a wider row, transposed rows, a transposed last axis, broadcast rows."""
    second = ROWWISE[name][2][1]
    full = inputs(name, (4, 6, 3, 40), dtype, device)
    cotangents = cotangents_of(name, full)
    expected = with_gradients(ROWWISE[name][0], full, cotangents)

    def slice_of_wider(t):
        return torch.cat([t, t], -1)[..., :40] if t.dim() > 1 else t

    def inside_a_row(t):
        return torch.cat([t.flatten(2), t.flatten(2)], -1)[..., 120:].unflatten(-1, (3, 40)) if t.dim() > 1 else t

    def transposed_rows(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t

    def transposed_last(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t

    for layout in (slice_of_wider, inside_a_row, transposed_rows, transposed_last):

        def op(layout=layout, **leaves):
            return ROWWISE[name][0](**{n: layout(t) for n, t in leaves.items()})

        assert_equal(with_gradients(op, full, [layout(c) for c in cotangents]), expected)
    full[second] = full[second][:1, :, :1].expand(4, 6, 3, 40)
    check_op(name, full, cotangents)


@every_op
@both_dtypes
def test_threads_change_no_bit(name, dtype, threads):
    x = inputs(name, (3, 700, 130), dtype)
    cotangents = cotangents_of(name, x)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(with_gradients(ROWWISE[name][0], x, cotangents))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.cuda
@every_op
@both_dtypes
def test_runs_change_no_bit(name, dtype):
    x = inputs(name, (5000, 256), dtype, "cuda")
    cotangents = cotangents_of(name, x)
    first = with_gradients(ROWWISE[name][0], x, cotangents)
    for _ in range(3):
        assert_equal(with_gradients(ROWWISE[name][0], x, cotangents), first)


@every_op
def test_gradients_only_where_needed(name, device):
    x = inputs(name, device=device)
    cotangents = cotangents_of(name, x)
    full = with_gradients(ROWWISE[name][0], x, cotangents)
    for needed in x:
        leaves = {n: t.detach().requires_grad_(n == needed) for n, t in x.items()}
        outputs = ROWWISE[name][0](**leaves)
        torch.autograd.backward(outputs, cotangents if isinstance(outputs, tuple) else cotangents[0])
        assert torch.equal(leaves[needed].grad, full[f"d{needed}"])
        assert all(t.grad is None for n, t in leaves.items() if n != needed)


@pytest.mark.parametrize("name", ["swiglu", "gated_rmsnorm"])
def test_extreme_gates(name, device):
    """silu saturates without NaN, and NaN is not hidden."""
    x = inputs(name, (2, 64), device=device)
    gate = x["gate" if name == "swiglu" else "z"]
    gate[0, :4] = torch.tensor([-1e4, 1e4, -90.0, 90.0])
    check_op(name, x, cotangents_of(name, x))
    gate[1, 3] = float("nan")
    out = ROWWISE[name][0](**x)
    assert out[1, 3].isnan()
    assert torch.isfinite(out[0]).all()


@pytest.mark.parametrize("name", ["add_rmsnorm", "gated_rmsnorm"])
def test_weight_in_the_dtype_of_the_parameters(name, device):
    x = inputs(name, device=device)
    x["weight"] = x["weight"].bfloat16()
    assert with_gradients(ROWWISE[name][0], x, cotangents_of(name, x))["dweight"].dtype == BF16


def test_swiglu_under_autocast(device):
    x = inputs("swiglu", device=device)
    with torch.autocast(device, BF16):
        out = swiglu(**x)
    assert torch.equal(out, swiglu(x["gate"].bfloat16(), x["up"].bfloat16()))


@every_op
def test_without_gradients_the_same_bits(name, device):
    x = inputs(name, device=device)
    recorded = with_gradients(ROWWISE[name][0], x, cotangents_of(name, x))
    with torch.no_grad():
        outputs = ROWWISE[name][0](**{n: t.requires_grad_() for n, t in x.items()})
    for i, out in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
        assert torch.equal(out, recorded[f"out{i}"])
        assert not out.requires_grad


@every_op
def test_checkpointed(name, device):
    x = inputs(name, device=device)
    cotangents = cotangents_of(name, x)

    def op(**leaves):
        return checkpoint(ROWWISE[name][0], *leaves.values(), use_reentrant=False)

    assert_equal(with_gradients(op, x, cotangents), with_gradients(ROWWISE[name][0], x, cotangents))


@every_op
def test_double_backward_is_an_error(name):
    x = {n: t.requires_grad_() for n, t in inputs(name).items()}
    outputs = ROWWISE[name][0](**x)
    loss = sum(o.square().sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
    (gradient,) = torch.autograd.grad(loss, next(iter(x.values())), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


# rope_cache_


def rope_inputs(B=3, t=2, HQ=4, H=2, D=24, DV=40, S=9, slots=5, angle_rows=None, dtype=FP32, device="cpu"):
    if dtype == FP16 and torch.device(device).type == "cpu":
        pytest.skip("float16 is a CUDA dtype")
    angles = torch.randn(B if angle_rows is None else angle_rows, t, D // 2, device=device) * 10
    shapes = {"k_cache": (slots, S, H, D), "v_cache": (slots, S, H, DV)}
    shapes |= {"q": (B, t, HQ, D), "k": (B, t, H, D), "v": (B, t, H, DV)}
    x = {n: torch.randn(s, device=device).to(dtype) for n, s in shapes.items()}
    places = torch.stack([torch.randperm(S)[:t] for _ in range(B)]).to(device)
    return x | {"cos": angles.cos(), "sin": angles.sin(), "places": places}


def check_rope(x, slots=None):
    slots = None if slots is None else torch.tensor(slots, device=x["q"].device)
    exact = reference.rope_cache(**{n: t.double() if n != "places" else t for n, t in x.items()}, slots=slots)
    plain = reference.rope_cache(**x, slots=slots)
    ours = rope_cache_(**x, slots=slots), x["k_cache"], x["v_cache"]
    for name, out, ref, torchs in zip(("q", "k_cache", "v_cache"), ours, exact, plain, strict=True):
        check_close(name, out, ref, torchs, dtype=x["q"].dtype)
    assert torch.equal(ours[2], plain[2])
    return ours


@every_dtype
@pytest.mark.parametrize("D,DV", [(2, 2), (24, 40), (64, 64), (128, 128), (130, 6), (64, 0)])
def test_rope_cache(D, DV, dtype, device):
    for HQ, H, t in ((4, 2, 1), (6, 1, 3), (3, 3, 8)):
        check_rope(rope_inputs(t=t, HQ=HQ, H=H, D=D, DV=DV, dtype=dtype, device=device))


def test_rope_cache_angles_of_all_rows(device):
    check_rope(rope_inputs(angle_rows=1, device=device))


@every_dtype
def test_rope_cache_of_queries_alone(dtype, device):
    x = rope_inputs(H=0, D=64, DV=64, dtype=dtype, device=device)
    q = reference.rotate(x["q"].double(), x["cos"], x["sin"])
    check_close("q", rope_cache_(**x), q, reference.rotate(x["q"], x["cos"], x["sin"]), dtype=dtype)


def test_rope_cache_slots_and_places_out_of_range(device):
    x = rope_inputs(B=6, t=2, device=device)
    x["places"][:2] = torch.tensor([[-1, 9], [2**62, -(2**62)]])
    before = x["k_cache"].clone()
    check_rope(x, [0, 1, -1, 5, 4, 2])
    for untouched in (0, 1, 3):
        assert torch.equal(x["k_cache"][untouched], before[untouched])
    assert not torch.equal(x["k_cache"][4], before[4])


@both_dtypes
def test_rope_cache_strides(dtype, device):
    x = rope_inputs(D=32, DV=32, dtype=dtype, device=device)
    expected = reference.rope_cache(**x)
    q = rope_cache_(**{n: t.clone() for n, t in x.items()})
    fused = torch.cat([x[n].flatten(2) for n in ("q", "k", "v")], -1)
    parts = fused.split([128, 64, 64], -1)
    pool = torch.zeros(5, 3, 9, 2, 64, device=device).to(dtype)
    k_cache, v_cache = pool[:, 1].split(32, -1)
    k_cache.copy_(x["k_cache"])
    v_cache.copy_(x["v_cache"])
    views = {n: p.unflatten(-1, (-1, 32)) for n, p in zip(("q", "k", "v"), parts, strict=True)}
    assert torch.equal(rope_cache_(**x | views | {"k_cache": k_cache, "v_cache": v_cache}), q)
    assert torch.equal(v_cache, expected[2])
    check_close("k", k_cache, reference.rope_cache(**{n: t.double() if n != "places" else t for n, t in x.items()})[1])
    assert not pool[:, ::2].any()


def test_rope_cache_is_inference_only():
    x = rope_inputs()
    x["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="rope_cache_: inference only"):
        rope_cache_(**x)
    with torch.no_grad():
        rope_cache_(**x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def f(x, residual, weight):
        h, normed = add_rmsnorm(x * 2, residual, weight)
        return gated_rmsnorm(normed, h, weight), swiglu(h, normed)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (3, 5) if dynamic else (3,):
        x = inputs("add_rmsnorm", (2, T, 20))
        cotangents = [torch.randn(2, T, 20), torch.randn(2, T, 20)]
        assert_equal(with_gradients(compiled, x, cotangents), with_gradients(f, x, cotangents))


def test_opcheck_add_rmsnorm():
    for grad in (False, True):
        x, residual, weight = (t.requires_grad_(grad) for t in inputs("add_rmsnorm", (2, 3, 20)).values())
        torch.library.opcheck(torch.ops.lt2.loop_residual_rmsnorm_fwd.default, (residual, x, None, weight, 1e-6))
    x, weight = x.detach(), weight.detach()
    args = (x, x * 2, x * 3, torch.rand(6), None, None, weight)
    torch.library.opcheck(torch.ops.lt2.loop_residual_rmsnorm_bwd.default, args)
    with pytest.raises(RuntimeError, match="h_in must be given with rho only"):
        torch.ops.lt2.loop_residual_rmsnorm_bwd(*args[:5], torch.ones(20), weight)


REJECTED = {
    r"gate must be float32 or bfloat16 \(or float16 on CUDA\), got float16": (
        "swiglu",
        {"gate": torch.ones(2, 6).half()},
    ),
    r"up must have the dtype of gate \(float32\), got bfloat16": ("swiglu", {"up": torch.ones(2, 6).bfloat16()}),
    r"up must have the shape of gate \[2, 6\], got \[2, 7\]": ("swiglu", {"up": torch.ones(2, 7)}),
    r"z must have the shape of o \[2, 6\], got \[6\]": ("gated_rmsnorm", {"z": torch.ones(6)}),
    r"weight must have shape \[D\] = \[6\], got \[7\]": ("gated_rmsnorm", {"weight": torch.ones(7)}),
    "weight must have a float dtype": ("gated_rmsnorm", {"weight": torch.ones(6, dtype=torch.int64)}),
}


@pytest.mark.parametrize("message", REJECTED)
def test_rejects(message):
    name, wrong = REJECTED[message]
    with pytest.raises((ValueError, RuntimeError), match=f"{name}: {message}"):
        ROWWISE[name][0](**inputs(name, (2, 6)) | wrong)


ROPE_REJECTED = {
    r"q must have shape \[B, t, HQ, D\], got \[3, 4, 24\]": {"q": torch.ones(3, 4, 24)},
    "q must have an even D": {"q": torch.ones(3, 2, 4, 23)},
    r"k_cache must have shape \[slots, S, H, D\] = \[5, 9, 2, 8\]": {"q": torch.ones(3, 2, 4, 8)},
    r"k must have the dtype of q \(float32\), got bfloat16": {"k": torch.ones(3, 2, 2, 24).bfloat16()},
    r"v must have shape \[B, t, H, DV\]": {"v": torch.ones(3, 2, 2, 24)},
    "v_cache must have a contiguous last axis": {"v_cache": torch.ones(5, 9, 40, 2).transpose(2, 3)},
    r"cos must have shape \[B or 1, t, D / 2\] = \[3, 2, 12\], got \[2, 2, 12\]": {"cos": torch.ones(2, 2, 12)},
    "sin must be float32, got bfloat16": {"sin": torch.ones(3, 2, 12).bfloat16()},
    "places must be int64, got int32": {"places": torch.zeros(3, 2, dtype=torch.int32)},
    "slots must be contiguous int64 of shape": {"slots": torch.zeros(2, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", ROPE_REJECTED)
def test_rope_cache_rejects(message):
    with pytest.raises(RuntimeError, match="rope_cache_: " + message):
        rope_cache_(**rope_inputs() | ROPE_REJECTED[message])
