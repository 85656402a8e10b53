"""dsa_attention against the oracle, dense attention, and itself."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lt2_ext.ops import dsa_attention, lightning_indexer
from lt2_ext.reference import dsa
from lt2_ext.testing import check_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
# B, T, S, HQ, H, D, DV, topk
SHAPES = [
    (1, 1, 1, 1, 1, 8, 8, 1),
    (2, 1, 90, 4, 4, 64, 64, 33),
    (2, 37, 40, 3, 1, 24, 40, 5),
    (1, 100, 100, 16, 4, 64, 64, 16),
    (1, 70, 30, 16, 16, 16, 8, 17),
    (1, 65, 130, 8, 2, 128, 128, 150),
    (3, 40, 40, 5, 1, 96, 72, 1),
    (1, 90, 150, 16, 1, 96, 32, 140),
    (1, 40, 90, 4, 2, 32, 96, 77),
]


def inputs(B, T, S, HQ, H, D, DV, dtype=FP32):
    sizes = {"q": (B, T, HQ, D), "k": (B, S, H, D), "v": (B, S, H, DV)}
    return {n: torch.randn(size).to(dtype) for n, size in sizes.items()}


def on(device, x):
    """The arguments on ``device``."""
    return {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in x.items()}


def any_indices(B, T, S, topk):
    """Unique, in any order; some negative, some in the future, some of no key."""
    return torch.rand(B, T, S + 8).argsort(-1)[..., :topk].int() - 4


def with_gradients(op, x, indices, cotangents, **options):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in x.items()}
    o, lse = op(**leaves, indices=indices, return_lse=True, **options)
    alive = lse > -torch.inf
    loss = (o * cotangents["o"]).sum() + (lse * cotangents["lse"])[alive].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o.detach(), "lse": lse.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def check_against_oracle(x, indices, device="cpu", op=dsa_attention, **options):
    """The oracle runs on the CPU."""
    dtype = x["q"].dtype
    shape = (*x["q"].shape[:3], x["v"].shape[3])
    cotangents = {"o": torch.randn(shape).to(dtype), "lse": torch.randn(shape[:3])}
    double = {n: t.double() for n, t in x.items()}
    exact_cotangents = {n: t.double() for n, t in cotangents.items()}
    exact = with_gradients(dsa.dsa_attention, double, indices, exact_cotangents, **options)
    plain = with_gradients(dsa.dsa_attention, x, indices, cotangents, **options)
    ours = with_gradients(op, on(device, x), indices.to(device), on(device, cotangents), **on(device, options))
    assert all(t.device.type == device for t in ours.values())
    ours = on("cpu", ours)
    dead = exact["lse"] == -torch.inf
    assert torch.equal(ours["lse"] == -torch.inf, dead)
    for name, ref in exact.items():
        kind = "grad" if name.startswith("d") else "out"
        got, base = (t.masked_fill(dead, 0) if name == "lse" else t for t in (ours[name], plain[name]))
        check_close(name, got, ref.masked_fill(dead, 0) if name == "lse" else ref, base, kind, dtype)
    assert bool((ours["o"][dead] == 0).all())
    assert bool((ours["dq"][dead] == 0).all())
    assert ours["lse"].dtype == FP32
    assert ours["o"].dtype == ours["dq"].dtype == ours["dk"].dtype == ours["dv"].dtype == dtype
    return ours


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(device, shape, dtype):
    B, T, S, HQ, H, D, DV, topk = shape
    check_against_oracle(inputs(B, T, S, HQ, H, D, DV, dtype), any_indices(B, T, S, topk), device)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 3), (4, 2), (6, 2), (8, 8), (12, 3), (16, 1), (16, 4), (16, 16)])
def test_heads(device, heads):
    check_against_oracle(inputs(1, 40, 40, *heads, 16, 24), any_indices(1, 40, 40, 9), device, scale=0.4)


@both_dtypes
def test_all_keys_is_dense_attention(device, dtype):
    x = on(device, inputs(2, 60, 60, 4, 2, 32, 32, dtype))
    indices = torch.arange(64, dtype=torch.int32, device=device).expand(2, 60, 64)
    want = F.scaled_dot_product_attention(
        *(t.double().transpose(1, 2) for t in x.values()), is_causal=True, enable_gqa=True
    )
    check_close("o", dsa_attention(**x, indices=indices), want.transpose(1, 2), dtype=dtype)
    selected = lightning_indexer(torch.randn(2, 60, 2, 8), torch.randn(2, 60, 8), topk=60).to(device)
    check_close("o", dsa_attention(**x, indices=selected), want.transpose(1, 2), dtype=dtype)


def test_any_index_is_safe_and_only_visible_ones_count(device):
    x = inputs(1, 20, 20, 4, 2, 16, 16)
    indices = torch.full((1, 20, 4), -1, dtype=torch.int32)
    indices[0, :, 1] = torch.arange(20) // 2

    def ours():
        return dsa_attention(**on(device, x), indices=indices.to(device))

    expected = ours()
    for garbage in (-(2**31), -7, -1, 20, 2**31 - 1):
        for column in (0, 2, 3):
            indices[0, :, column] = garbage
        assert torch.equal(ours(), expected)
        check_against_oracle(x, indices, device)
    indices[0, :, 3] = torch.arange(1, 21)  # the next token
    assert torch.equal(ours(), expected)


def test_a_row_without_keys(device):
    x = inputs(1, 6, 6, 2, 1, 8, 8)
    indices = torch.full((1, 6, 3), -1, dtype=torch.int32)
    indices[0, 4] = torch.tensor([0, 2, 1])
    ours = check_against_oracle(x, indices, device)
    assert int((ours["o"] != 0).any(-1).any(-1).sum()) == 1
    assert bool((ours["dk"][:, 3:] == 0).all())
    none = check_against_oracle(x, indices[..., :0], device)
    assert all(bool((none[n] == 0).all()) for n in ("o", "dq", "dk", "dv"))


@pytest.mark.parametrize("B, T, S", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(device, B, T, S):
    x = {n: t.requires_grad_() for n, t in on(device, inputs(B, T, S, 2, 1, 8, 8)).items()}
    indices = torch.zeros(B, T, 3, dtype=torch.int32, device=device)
    o, lse = dsa_attention(**x, indices=indices, return_lse=True)
    assert o.shape == (B, T, 2, 8)
    assert bool((o == 0).all())
    assert bool((lse == -torch.inf).all())
    o.sum().backward()
    for t in x.values():
        assert t.grad is not None
        assert bool((t.grad == 0).all())


def test_a_key_that_is_named_twice_counts_twice(device):
    x = inputs(1, 12, 12, 2, 1, 8, 8)
    check_against_oracle(x, torch.randint(0, 4, (1, 12, 9), dtype=torch.int32), device)


def test_checks_refuse_a_key_that_is_named_twice(checks):
    x = inputs(2, 6, 6, 2, 1, 8, 8)
    indices = torch.full((2, 6, 4), 5, dtype=torch.int32)  # only the last query sees key 5
    indices[:, 5] = torch.tensor([5, 0, 1, -1])
    dsa_attention(**x, indices=indices)
    indices[1, 5, 2] = 5
    with pytest.raises(ValueError, match=r"dsa_attention: indices must name no visible key twice, got \[5\]"):
        dsa_attention(**x, indices=indices)
    cu = torch.tensor([0, 2, 6])
    packed = {n: t[:1] for n, t in x.items()}
    with pytest.raises(ValueError, match="twice"):
        dsa_attention(**packed, indices=torch.zeros(1, 6, 2, dtype=torch.int32), cu_seqlens=cu)
    dsa_attention(**packed, indices=torch.full((1, 6, 2), 4, dtype=torch.int32), cu_seqlens=cu)
    with pytest.raises(ValueError, match="twice"):
        dsa_attention(**x, indices=torch.ones(2, 6, 2, dtype=torch.int32), q_offset=torch.tensor([-3, 2]))


@pytest.mark.parametrize("offset", ["none", "int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents(device, dtype, offset):
    cu = torch.tensor([2, 2, 35, 36, 60, 60, 70], dtype=dtype)
    cu_k = torch.tensor([1, 7, 7, 40, 80, 85, 95], dtype=dtype)
    q_offset = {"none": None, "int": 4, "tensor": torch.tensor([0, 3, 30, 2, -1, -4])}[offset]
    x = inputs(1, 75, 100, 4, 2, 16, 24)
    indices = any_indices(1, 75, 40, 12)
    ours = check_against_oracle(x, indices, device, cu_seqlens=cu, cu_seqlens_k=cu_k, q_offset=q_offset)
    assert bool((ours["o"][:, :2] == 0).all())
    assert bool((ours["dk"][:, 95:] == 0).all())
    check_against_oracle(inputs(1, 75, 75, 4, 2, 16, 24), indices, device, cu_seqlens=cu, q_offset=q_offset)


@pytest.mark.parametrize("q_offset", [0, 7, -3, 100, "tensor"])
def test_positions(device, q_offset):
    q_offset = torch.tensor([3, 20], dtype=torch.int32) if q_offset == "tensor" else q_offset
    x, indices = inputs(2, 10, 30, 4, 2, 16, 16), any_indices(2, 10, 30, 11)
    check_against_oracle(x, indices, device, q_offset=q_offset)


@both_dtypes
def test_threads_and_garbage_change_nothing(dtype, threads):
    x, indices = inputs(1, 150, 150, 4, 1, 32, 32, dtype), any_indices(1, 150, 150, 40)
    cotangents = {"o": torch.randn(1, 150, 4, 32).to(dtype), "lse": torch.randn(1, 150, 4)}
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(with_gradients(dsa_attention, x, indices, cotangents))
    for other in results[1:]:
        assert all(torch.equal(other[n], t) for n, t in results[0].items())


def test_strided_arguments(device):
    x, indices = on(device, inputs(2, 33, 33, 4, 2, 16, 16)), any_indices(2, 33, 33, 7).to(device)
    cotangents = on(device, {"o": torch.randn(2, 33, 4, 16), "lse": torch.randn(2, 33, 4)})
    packed = torch.randn(2, 33, 4 + 2 + 2, 17, device=device)[..., 1:]
    strided = dict(zip("qkv", packed.split([4, 2, 2], 2), strict=True))
    for n, t in x.items():
        strided[n].copy_(t)
    wide = torch.zeros(2, 33, 9, dtype=torch.int32, device=device)
    wide[..., 2:] = indices
    expected = with_gradients(dsa_attention, x, indices, cotangents)
    cotangents = {"o": cotangents["o"].transpose(1, 2).contiguous().transpose(1, 2), "lse": cotangents["lse"]}
    got = with_gradients(dsa_attention, strided, wide[..., 2:], cotangents)
    assert all(torch.equal(got[n], t) for n, t in expected.items())


@both_dtypes
def test_the_future_and_other_documents_change_nothing(device, dtype):
    x, indices = on(device, inputs(1, 100, 100, 4, 2, 16, 16, dtype)), any_indices(1, 100, 100, 30).to(device)
    cu = torch.tensor([0, 40, 100], device=device)
    whole, packed = dsa_attention(**x, indices=indices), dsa_attention(**x, indices=indices, cu_seqlens=cu)
    late = {n: torch.cat([t[:, :60], torch.full_like(t[:, 60:], torch.nan)], 1) for n, t in x.items()}
    assert torch.equal(whole[:, :60], dsa_attention(**late, indices=indices)[:, :60])
    other = {n: torch.cat([torch.full_like(t[:, :40], torch.nan), t[:, 40:]], 1).requires_grad_() for n, t in x.items()}
    o = dsa_attention(**other, indices=indices, cu_seqlens=cu)
    assert torch.equal(packed[:, 40:], o[:, 40:])
    clean = {n: t.requires_grad_() for n, t in x.items()}
    want = dsa_attention(**clean, indices=indices, cu_seqlens=cu)[:, 40:].float().sum()
    got = o[:, 40:].float().sum()
    for a, b in zip(torch.autograd.grad(got, list(other.values())), torch.autograd.grad(want, list(clean.values())),
                    strict=True):  # fmt: skip
        assert torch.equal(a[:, 40:], b[:, 40:])


def good_part(B, T, S, topk):
    """Ascending indices of any ``topk`` keys that a query sees."""
    return lightning_indexer(torch.randn(B, T, 1, 8), torch.randn(B, S, 8), topk=topk)


def any_of_few(B, T, S, topk, few):
    """Ascending indices of any ``topk`` keys out of ``few`` that lie anywhere, key 12 among them."""
    keys = torch.cat([torch.tensor([12]), torch.randperm(S)[:few]]).unique()
    unseen = keys > torch.arange(S - T, S)[:, None]
    values, chosen = torch.rand(B, T, len(keys)).masked_fill(unseen, -torch.inf).topk(topk)
    indices = keys[chosen].masked_fill(values == -torch.inf, S).sort(-1).values
    return indices.masked_fill(indices == S, -1).int()


@pytest.mark.parametrize("few, topk", [(60, 40), (150, 40), (150, 20)], ids=["a_half", "a_quarter", "an_eighth"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 4), (8, 2), (8, 1), (16, 1)], ids=str)
def test_queries_that_select_from_the_same_few_keys(heads, few, topk):
    """Of an eighth of them the CPU copies rows for each query; of more it multiplies with all."""
    check_against_oracle(inputs(1, 200, 600, *heads, 64, 128, BF16), any_of_few(1, 200, 600, topk, few))


def test_unions_of_all_kinds_side_by_side():
    """64 queries each: none in common, few, few, a half of them, as many and as far apart as they may be."""
    T, S, topk = 256, 2000, 32
    spread = torch.linspace(0, S - T, 191).long()
    few = [spread[torch.randperm(191)[:topk].sort().values] for _ in range(128)]
    half = [spread[::3][torch.randperm(64)[:topk].sort().values] for _ in range(64)]
    half[-1][-1] = S - 1
    rows = [torch.randperm(S - T)[:topk].sort().values for _ in range(64)] + few + half
    x, indices = inputs(2, T, S, 8, 2, 64, 64, BF16), torch.stack(rows).int().expand(2, -1, -1).contiguous()
    check_against_oracle(x, indices)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 150, 150, 4, 4, 64, 64, 60),
        (1, 150, 300, 4, 2, 64, 64, 60),
        (2, 140, 310, 4, 2, 128, 64, 100),
        (1, 40, 290, 16, 4, 64, 128, 120),
        (1, 33, 70, 8, 1, 128, 128, 40),
        (1, 20, 50, 32, 2, 64, 64, 30),
    ],
    ids=str,
)
def test_selections_of_a_good_part_of_the_keys(shape):
    B, T, S, HQ, H, D, DV, topk = shape
    check_against_oracle(inputs(B, T, S, HQ, H, D, DV, BF16), good_part(B, T, S, topk))


def test_keys_that_nobody_selects_are_not_read(device):
    x = on(device, inputs(1, 30, 30, 2, 1, 16, 16))
    indices = any_indices(1, 30, 30, 10).to(device)
    indices[indices == 3] = -1
    expected = dsa_attention(**x, indices=indices)
    x["k"][:, 3] = torch.nan
    x["v"][:, 3] = torch.inf
    assert torch.equal(dsa_attention(**x, indices=indices), expected)


@pytest.mark.parametrize("dtype, D", [(FP32, 16), (BF16, 64)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("broken", ["k", "v", "q", "grad"])
@pytest.mark.parametrize("few", [0, 20, 50], ids=["anywhere", "a_half", "a_fifth"])
def test_what_is_not_finite_reaches_only_who_selects_it(dtype, D, broken, few):
    T = 200 if few else 30
    x, indices = inputs(1, T, T, 2, 1, D, D, dtype), any_of_few(1, T, T, 10, few) if few else good_part(1, T, T, 10)
    cotangents = {"o": torch.ones_like(x["q"]), "lse": torch.ones(1, T, 2)}
    expected = with_gradients(dsa_attention, x, indices, cotangents)
    row = 150 if few and broken in ("q", "grad") else 12
    (cotangents["o"] if broken == "grad" else x[broken])[:, row] = torch.nan
    got = with_gradients(dsa_attention, x, indices, cotangents)
    hit = (indices[0] == 12).any(1)
    if broken in ("q", "grad"):
        hit = torch.arange(T) == row
    keys = torch.zeros(T + 1, dtype=torch.bool)
    keys[indices[0, hit].long().flatten()] = True  # -1 is the last
    touched = {"dq": hit, "dk": keys[:T], "dv": keys[:T], "o": hit, "lse": hit}
    reached = {"k": {"o", "lse", "dq", "dk", "dv"}, "q": {"o", "lse", "dq", "dk", "dv"}, "v": {"o", "dq", "dk"},
               "grad": {"dq", "dk", "dv"}}[broken]  # fmt: skip
    for name, t in got.items():
        bad, clean = touched[name], ~touched[name]
        assert torch.equal(t[0, clean], expected[name][0, clean]), name
        assert bool(t[0, bad].isnan().any()) == (name in reached), name


def test_extreme_logits(device):
    x = inputs(1, 50, 50, 2, 1, 16, 16)
    x["q"] *= 1e4
    check_against_oracle(x, any_indices(1, 50, 50, 20), device, scale=1.0)
    x["k"] = -x["k"].abs() * 1e3
    x["q"] = x["q"].abs()
    check_against_oracle(x, any_indices(1, 50, 50, 20), device, scale=1.0)


@pytest.mark.parametrize("needed", ["q", "k", "v", "qk", "kv"])
def test_gradients_of_some(device, needed):
    x, indices = on(device, inputs(1, 20, 20, 4, 2, 8, 8)), any_indices(1, 20, 20, 6).to(device)
    all_of_them = {n: t.clone().requires_grad_() for n, t in x.items()}
    dsa_attention(**all_of_them, indices=indices).square().sum().backward()
    some = {n: t.clone().requires_grad_(n in needed) for n, t in x.items()}
    dsa_attention(**some, indices=indices).square().sum().backward()
    for n, t in some.items():
        assert t.grad is None if n not in needed else torch.equal(t.grad, all_of_them[n].grad)


def test_gradients_through_lse_alone(device):
    x, indices = inputs(1, 20, 20, 4, 2, 8, 8), any_indices(1, 20, 20, 6)
    ours = {n: t.to(device, copy=True).requires_grad_() for n, t in x.items()}
    exact = {n: t.double().requires_grad_() for n, t in x.items()}
    for op, leaves in ((dsa_attention, ours), (dsa.dsa_attention, exact)):
        _, lse = op(**leaves, indices=indices.to(leaves["q"].device), return_lse=True)
        lse[lse > -torch.inf].sum().backward()
    for n in "qk":
        check_close(n, ours[n].grad, exact[n].grad, kind="grad")
    assert bool((ours["v"].grad == 0).all())


def test_a_checkpoint_gives_the_same_gradients(device):
    x, indices = on(device, inputs(1, 20, 20, 4, 2, 8, 8)), any_indices(1, 20, 20, 6).to(device)
    grads = []
    for run in (lambda f, **x: f(**x), partial(checkpoint, use_reentrant=False)):
        leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
        run(dsa_attention, **leaves, indices=indices).square().sum().backward()
        grads.append([t.grad for t in leaves.values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_casts_queries_keys_and_values(device):
    x, indices = on(device, inputs(1, 30, 30, 4, 2, 16, 16)), any_indices(1, 30, 30, 6).to(device)
    with torch.autocast(device, BF16):
        out = dsa_attention(**x, indices=indices)
    assert torch.equal(out, dsa_attention(**{n: t.to(BF16) for n, t in x.items()}, indices=indices))


def test_double_backward_is_an_error(device):
    x, indices = on(device, inputs(1, 8, 8, 2, 1, 8, 8)), any_indices(1, 8, 8, 3).to(device)
    x["q"].requires_grad_()
    (grad,) = torch.autograd.grad(dsa_attention(**x, indices=indices).square().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_gradients_are_linear_in_the_loss(device):
    x, indices = on(device, inputs(1, 40, 40, 4, 2, 16, 16)), any_indices(1, 40, 40, 9).to(device)
    cotangents = on(device, {"o": torch.randn(1, 40, 4, 16), "lse": torch.randn(1, 40, 4)})
    once = with_gradients(dsa_attention, x, indices, cotangents)
    much = with_gradients(dsa_attention, x, indices, {n: 2.0**20 * t for n, t in cotangents.items()})
    assert all(torch.equal(much[n], 2.0**20 * once[n]) for n in ("dq", "dk", "dv"))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device, grad):
    x = {n: t.requires_grad_(grad) for n, t in on(device, inputs(1, 6, 6, 4, 2, 8, 16)).items()}
    indices = any_indices(1, 6, 6, 3).to(device)
    cu_seqlens = torch.tensor([0, 2, 6], device=device)
    args = (*x.values(), indices)
    torch.library.opcheck(torch.ops.lt2.dsa_attention_fwd.default, (*args, None, None, None, 0.5, 0))
    torch.library.opcheck(torch.ops.lt2.dsa_attention_fwd.default, (*args, cu_seqlens, None, None, 0.5, 0))
    if not grad:
        o, lse = dsa_attention(**x, indices=indices, return_lse=True)
        saved = (*args, o, lse, None, None, None, 0.5, 0)
        torch.library.opcheck(torch.ops.lt2.dsa_attention_bwd.default, (o, lse, *saved))
        torch.library.opcheck(torch.ops.lt2.dsa_attention_bwd.default, (o, None, *saved))


def test_compiles_in_one_graph(device):
    x, indices = on(device, inputs(1, 30, 30, 4, 2, 16, 16)), any_indices(1, 30, 30, 6).to(device)
    f = torch.compile(lambda **x: dsa_attention(**x, q_offset=0), fullgraph=True, backend="aot_eager")
    assert torch.equal(f(**x, indices=indices), dsa_attention(**x, indices=indices, q_offset=0))


WRONG = [
    ({"q": torch.zeros(1, 4, 2, 12)}, "q must have D a multiple of 8"),
    ({"q": torch.zeros(1, 4, 3, 8)}, r"q must have a multiple of k's heads \(2\)"),
    ({"q": torch.zeros(1, 4, 8)}, "q must have 4 dimensions"),
    ({"q": torch.zeros(1, 4, 4, 8).half()}, "q must be float32 or bfloat16"),
    ({"k": torch.zeros(1, 4, 2, 16)}, r"k must have shape \[B, S, H, D\]"),
    ({"k": torch.zeros(1, 4, 2, 8).to(BF16)}, "k must have the dtype of q"),
    ({"v": torch.zeros(1, 5, 2, 8)}, r"v must have shape \[B, S, H, DV\]"),
    ({"v": torch.zeros(1, 4, 2, 12)}, "v must have DV a multiple of 8"),
    ({"indices": torch.zeros(1, 4, 3)}, "indices must be int32"),
    ({"indices": torch.zeros(1, 5, 3, dtype=torch.int32)}, r"indices must have shape \[B, T, topk\]"),
    ({"q_offset": torch.zeros(2, dtype=torch.int64)}, r"q_offset must have shape \[N\] = \[1\], got \[2\]"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[f"{next(iter(w))}-{i}" for i, (w, _) in enumerate(WRONG)])
def test_wrong_arguments_are_named(wrong, message):
    x = inputs(1, 4, 4, 4, 2, 8, 8) | {"indices": torch.zeros(1, 4, 3, dtype=torch.int32)}
    with pytest.raises((ValueError, RuntimeError), match=f"dsa_attention: {message}"):
        dsa_attention(**x | wrong)
