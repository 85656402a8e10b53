"""The projections of a decode step against their oracle, and against themselves."""

import pytest
import torch

from lt2_ext.ops import linear_step, mlp_step
from lt2_ext.reference import block_ops as reference
from lt2_ext.testing import check_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=[FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def dtype(request, device):
    if (request.param == FP32) == (device == "cuda") and request.param != BF16:
        pytest.skip(f"{request.param} is no dtype of the {device} kernel")
    return request.param


def inputs(rows=3, K=72, outputs=(40,), norm=None, residual=False, swiglu=False, dtype=BF16, device="cpu"):
    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    x = {"x": randn(rows, K), "weights": [(randn(n, K).float() * K**-0.5).to(dtype) for n in outputs]}
    x |= {"norm_weight": None if norm is None else randn(K, dtype=norm)}
    return x | {"residual": randn(rows, outputs[0]) if residual else None, "swiglu": swiglu}


def as_dtype(x, dtype):
    def cast(t):
        return [cast(u) for u in t] if isinstance(t, list) else t.to(dtype) if isinstance(t, torch.Tensor) else t

    return {n: cast(t) for n, t in x.items()}


def check(x):
    ours, plain = linear_step(**x), reference.linear_step(**x)
    exact = reference.linear_step(**as_dtype(x, torch.float64))
    assert len(ours) == len(exact)
    for i, (out, ref, torchs) in enumerate(zip(ours, exact, plain, strict=True)):
        assert out.dtype == x["x"].dtype
        assert out.is_contiguous()
        check_close(f"out{i}", out, ref, torchs, "out", out.dtype)
    return ours


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 16])
def test_against_oracle(rows, dtype, device):
    for K in (8, 72, 264, 2048):
        for outputs in ((1,), (24,), (33, 5), (16, 8, 130, 1, 31, 7)):
            check(inputs(rows, K, outputs, dtype=dtype, device=device))


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16])
def test_norm_residual_and_swiglu(rows, dtype, device):
    for K in (72, 1032, 2048):
        for norm in (None, dtype, FP32):
            check(inputs(rows, K, (50, 9), norm, dtype=dtype, device=device))
            check(inputs(rows, K, (50,), norm, residual=True, dtype=dtype, device=device))
            check(inputs(rows, K, (50, 50), norm, swiglu=True, dtype=dtype, device=device))
            check(inputs(rows, K, (50, 50), norm, residual=True, swiglu=True, dtype=dtype, device=device))


def test_more_channels_than_fit_at_a_time(dtype, device):
    for rows, K in ((16, 8192), (5, 20000)):
        check(inputs(rows, K, (18,), dtype, residual=True, dtype=dtype, device=device))


@pytest.mark.cuda
def test_projections_of_a_large_model(device):
    for rows in (1, 8, 16):
        check(inputs(rows, 2048, (6144, 3072, 16, 16), BF16, device="cuda"))
        check(inputs(rows, 2048, (5632, 5632), BF16, swiglu=True, device="cuda"))
        check(inputs(rows, 5632, (2048,), residual=True, device="cuda"))


def test_shapes(dtype, device):
    x = inputs(6, dtype=dtype, device=device)
    (expected,) = linear_step(**x)
    for shape in ((2, 3, 72), (1, 6, 1, 72)):
        (out,) = linear_step(**x | {"x": x["x"].view(shape)})
        assert torch.equal(out, expected.view(*shape[:-1], 40))
    (alone,) = linear_step(**x | {"x": x["x"][0]})
    check_close("alone", alone, expected[0].double(), dtype=dtype)
    strided = torch.stack((x["x"], x["x"]), 1)[:, 1]
    assert torch.equal(linear_step(**x | {"x": strided})[0], expected)
    assert linear_step(**x | {"x": x["x"][:0]})[0].shape == (0, 40)


@pytest.mark.parametrize("rows", [1, 16])
def test_outputs_in_float32_are_those_that_are_rounded_else(rows, dtype, device):
    for K in (72, 20000):
        x = inputs(rows, K, (33, 5, 16), dtype, dtype=dtype, device=device)
        rounded = linear_step(**x)
        for floats in (1, 3):
            outputs = linear_step(**x, floats=floats)
            assert [o.dtype for o in outputs] == [dtype] * (3 - floats) + [FP32] * floats
            assert all(torch.equal(a.to(dtype), b) for a, b in zip(outputs, rounded, strict=True))
            if dtype != FP32:
                assert not torch.equal(outputs[-1], rounded[-1].float())


def test_a_row_does_not_depend_on_the_others(dtype, device):
    """Also when they are NaN."""
    for K in (72, 2048):
        x = inputs(8, K, (50, 50), dtype, swiglu=True, dtype=dtype, device=device)
        (expected,) = linear_step(**x)
        x["x"][1::2] = torch.nan
        (out,) = linear_step(**x)
        assert torch.equal(out[::2], expected[::2])
        assert out[1::2].isnan().all()


def test_a_row_does_not_depend_on_how_many_there_are(dtype, device):
    for K in (72, 3072, 5632):
        x = inputs(16, K, (300,), dtype, residual=True, dtype=dtype, device=device)
        (expected,) = linear_step(**x)
        for rows in (1, 2, 4, 5, 8, 9):
            (out,) = linear_step(**x | {"x": x["x"][:rows], "residual": x["residual"][:rows]})
            assert torch.equal(out, expected[:rows]), (K, rows)


def test_what_follows_a_mixer(dtype, device):
    """The same bits as three operators, and so within their tolerance."""
    for rows in (1, 4, 5):
        o = inputs(rows, 72, (136,), residual=True, dtype=dtype, device=device)
        up = inputs(rows, 136, (200, 200), FP32, dtype=dtype, device=device)
        down = inputs(rows, 200, (136,), dtype=dtype, device=device)
        (h,) = linear_step(**o)
        (x,) = linear_step(**up | {"x": h, "swiglu": True})
        (expected,) = linear_step(**down | {"x": x, "residual": h})
        weights = *o["weights"], up["norm_weight"], *up["weights"], *down["weights"]
        assert torch.equal(mlp_step(o["x"], o["residual"], weights), expected)


def test_threads_change_no_bit(threads):
    x = inputs(3, 520, (700, 90), FP32, dtype=BF16)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(linear_step(**x))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.cuda
def test_weights_written_just_before():
    """Its weights are asked for while the kernel before it still runs."""
    x = torch.randn(1, 2048, device="cuda").to(BF16)
    weights = torch.randn(2, 6144, 2048, device="cuda").to(BF16)
    expected, w = [linear_step(x, [weight])[0] for weight in weights], weights[0].clone()
    for i in range(200):
        linear_step(x, [weights[0]])
        w.copy_(weights[i % 2])
        assert torch.equal(linear_step(x, [w])[0], expected[i % 2])


@pytest.mark.cuda
def test_a_chain_in_a_graph():
    """Each call reads what the two before it wrote, with launches that overlap."""
    layers = [inputs(4, 1024, (1024,), BF16, residual=True, device="cuda") for _ in range(20)]

    def run(h, settled=True, after=lambda: None):
        before = h
        for layer in layers:
            (out,) = linear_step(**layer | {"x": h, "residual": before}, settled=settled)
            before, h = h, out
            after()
        return h

    h = torch.randn(4, 1024, device="cuda").to(BF16)
    expected = run(h, False, torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(h)
    for _ in range(50):
        graph.replay()
        assert torch.equal(out, expected)


def test_is_inference_only():
    x = inputs()
    x["weights"][0].requires_grad_()
    with pytest.raises(RuntimeError, match="linear_step: inference only"):
        linear_step(**x)
    with torch.no_grad():
        linear_step(**x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(17, 72, dtype=BF16)}, r"x must have up to 16 rows of channels, got \[17, 72\]"),
        ({"weights": []}, "weights must be 1 to 8 tensors, got 0"),
        ({"weights": [torch.zeros(4, 64, dtype=BF16)]}, r"weights\[0\] must have shape \[N, K\] with K = 72, got"),
        ({"weights": [torch.zeros(4, 72)]}, r"weights\[0\] must have the dtype of x \(bfloat16\), got float32"),
        ({"weights": [torch.zeros(72, 4, dtype=BF16).T]}, r"weights\[0\] must be contiguous"),
        ({"swiglu": True}, "weights must be 2 tensors, got 1"),
        ({"norm_weight": torch.zeros(7)}, r"norm_weight must have shape \[K\] = \[72\], got \[7\]"),
        ({"norm_weight": torch.zeros(72, dtype=torch.float64)}, "norm_weight must be float32 or have the dtype of x"),
        ({"floats": 2}, r"floats must be in 0\.\.1, got 2"),
        ({"floats": 1, "residual": torch.zeros(3, 40, dtype=BF16)}, "residual must be None with .* float32 outputs"),
        ({"residual": torch.zeros(3, 7, dtype=BF16)}, r"residual must have the shape of the output \[3, 40\], got"),
    ],
)
def test_errors(change, message):
    with pytest.raises(RuntimeError, match=message):
        linear_step(**inputs() | change)


@pytest.mark.cuda
def test_errors_on_cuda():
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16 on CUDA, got float32"):
        linear_step(**inputs(dtype=FP32, device="cuda"))
    with pytest.raises(RuntimeError, match="x must have a multiple of 8 channels on CUDA, got"):
        linear_step(**inputs(K=12, device="cuda"))
