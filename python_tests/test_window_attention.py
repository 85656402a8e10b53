"""window_attention against the oracle with the same keys as indices, and in models."""

import pytest
import torch
from test_dsa_attention import BF16, FP16, FP32, check_against_oracle, inputs, on
from test_models import ids, make

from lt2_ext.models.mixers import attention
from lt2_ext.ops import window_attention
from lt2_ext.reference import dsa

# B, T, S, HQ, H, D, DV, window
SHAPES = [
    (1, 1, 1, 1, 1, 8, 8, 1),
    (2, 90, 90, 4, 2, 16, 24, 13),
    (1, 70, 150, 3, 1, 64, 64, 40),
    (2, 130, 70, 2, 2, 32, 32, 5),
    (1, 200, 200, 8, 2, 64, 64, 1),
    (1, 300, 300, 4, 1, 128, 128, 129),
    (2, 257, 400, 2, 2, 64, 64, 1000),
    (1, 20, 500, 16, 4, 128, 128, 300),
]


def newest(B, T, S, window, **options):
    """int32 ``[B, T, window]``: the last keys that each query sees."""
    indices = torch.full((B, T, window), -1, dtype=torch.int32)
    for d in dsa.documents(B, T, S, **options):
        seen = d.visible(d.keys.stop - d.keys.start).sum(1, keepdim=True)
        indices[d.row, d.queries] = (seen - 1 - torch.arange(window)).int()
    return indices


def check(x, window, device, **options):
    B, T, S = *x["q"].shape[:2], x["k"].shape[1]

    def op(indices, **x):
        return window_attention(window=window, **x)

    return check_against_oracle(x, newest(B, T, S, window, **options), device, op, **options)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(device, shape, dtype):
    check(inputs(*shape[:-1], dtype), shape[-1], device)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (16, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 77, 128, 500])
def test_tiles(window, heads, dim, dtype):
    check(inputs(2, 700, 700, *heads, dim, dim, dtype), window, "cuda")


@pytest.mark.parametrize("window", [1, 7, 200])
@pytest.mark.parametrize("offset", ["none", "tensor"])
def test_packed_documents(device, window, offset):
    cu = torch.tensor([2, 2, 135, 136, 260, 260, 270])
    cu_k = torch.tensor([1, 7, 7, 40, 280, 285, 295])
    q_offset = {"none": None, "tensor": torch.tensor([0, -3, 30, 90, -1, -4])}[offset]
    ours = check(inputs(1, 275, 300, 4, 2, 64, 64, BF16), window, device,
                 cu_seqlens=cu, cu_seqlens_k=cu_k, q_offset=q_offset)  # fmt: skip
    assert bool((ours["o"][:, :2] == 0).all())
    assert bool((ours["dk"][:, 295:] == 0).all())
    check(inputs(1, 275, 275, 4, 2, 64, 64, BF16), window, device, cu_seqlens=cu.int(), q_offset=q_offset)


@pytest.mark.parametrize("q_offset", [0, 70, -30, 1000, "tensor"])
def test_positions(device, q_offset):
    q_offset = torch.tensor([-100, 60]) if q_offset == "tensor" else q_offset
    check(inputs(2, 100, 200, 4, 2, 64, 64, BF16), 33, device, q_offset=q_offset)


@pytest.mark.parametrize("dim", [16, 64])
def test_what_a_query_does_not_see_changes_nothing(device, dim):
    """The future, older keys than the window, other documents; by no bit, forward and backward."""
    cu = torch.tensor([0, 150, 300], device=device)

    def results(x, first, last, **options):
        leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
        o = window_attention(**leaves, window=40, **options)[:, first:last]
        return o, *torch.autograd.grad(o.float().square().sum(), list(leaves.values()))

    x = on(device, inputs(1, 300, 300, 4, 2, dim, dim, BF16))
    for first, last, seen, options in ((200, 260, 161, {}), (150, 300, 150, {"cu_seqlens": cu})):
        other = {n: torch.randn_like(t) for n, t in x.items()}
        for n, t in x.items():
            seen_rows = slice(first if n == "q" else seen, last)
            other[n][:, seen_rows] = t[:, seen_rows]
        for a, b in zip(results(x, first, last, **options), results(other, first, last, **options), strict=True):
            assert torch.equal(
                a[:, first:last] if a.shape[1] == 300 else a, b[:, first:last] if b.shape[1] == 300 else b
            )


def test_strided_arguments(device):
    x = on(device, inputs(2, 90, 90, 4, 2, 64, 64, BF16))
    packed = torch.cat(list(x.values()), 2).requires_grad_()
    o = window_attention(*packed.split([4, 2, 2], 2), window=33)
    (grad,) = torch.autograd.grad(o.sum(), packed)
    leaves = [t.clone().requires_grad_() for t in x.values()]
    want = window_attention(*leaves, window=33)
    grads = torch.autograd.grad(want, leaves, torch.ones_like(want))
    assert torch.equal(o, want)
    assert torch.equal(grad, torch.cat(grads, 2))


def test_without_a_window_all_keys_are_seen(device):
    x = on(device, inputs(2, 90, 120, 4, 2, 64, 64, BF16))
    assert torch.equal(window_attention(**x), window_attention(**x, window=120))


@pytest.mark.parametrize("B, T, S", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(device, B, T, S):
    x = on(device, inputs(B, T, S, 4, 2, 64, 64))
    o, lse = window_attention(**x, return_lse=True)
    assert o.shape == (B, T, 4, 64)
    assert bool((o == 0).all() and (lse == -torch.inf).all())


def test_the_same_bits_each_time(device):
    x = on(device, inputs(1, 300, 300, 4, 2, 64, 64, BF16))
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in x.values()]
        o = window_attention(*leaves, window=50)
        results.append((o, *torch.autograd.grad(o.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_arguments_are_named():
    x = inputs(1, 4, 4, 4, 2, 8, 8)
    with pytest.raises(ValueError, match="window_attention: window must be None or at least 1, got 0"):
        window_attention(**x, window=0)
    with pytest.raises(ValueError, match="window_attention: k must have the dtype of q"):
        window_attention(**x | {"k": x["k"].to(BF16)})


@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
@pytest.mark.parametrize("kind", ["window", "full"])
def test_models_give_the_same_with_and_without_it(kind, layout, monkeypatch):
    model, x = make(kind, layer_pattern="window->full->window:3" if kind == "window" else "full"), ids(2, 40)
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    options = {"plain": {}, "packed": {"cu_seqlens": torch.tensor([0, 11, 12, 40])}, "padded": {"attention_mask": mask}}
    x = x[:1] if layout == "packed" else x
    results, calls = [], []
    for kernel in (False, True):
        monkeypatch.setattr(attention, "has_kernel", lambda q, kernel=kernel: kernel)
        monkeypatch.setattr(
            attention.ops, "window_attention", lambda *a, **b: calls.append(1) or window_attention(*a, **b)
        )
        results.append(model(x, **options[layout])[mask[: len(x)].bool() if layout == "padded" else ...])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert bool(calls) == ((kind, layout) != ("full", "plain"))
