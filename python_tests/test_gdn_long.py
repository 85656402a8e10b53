"""chunk_gated_delta_rule where GPUs cut sequences into segments, and in CUDA graphs and beside other streams."""

import itertools

import pytest
import torch

from lt2_ext import testing
from lt2_ext.ops import chunk_gated_delta_rule
from lt2_ext.reference import gdn as reference
from lt2_ext.testing import gdn_inputs

HALF = [torch.bfloat16, torch.float16]


def check_outputs(x, hard=False, **options):
    """o and the final state against the float64 oracle by chunks."""
    with torch.no_grad():
        o, state = chunk_gated_delta_rule(**x, output_final_state=True, **options)
        exact = {name: t.double() for name, t in x.items()}
        ref_o, ref_state = reference.gated_delta_rule(
            **exact, output_final_state=True, rule=reference.chunks, **options)
    testing.check_close("o", o, ref_o, hard=hard)
    testing.check_close("final_state", state, ref_state, dtype=o.dtype, hard=hard)


def long_inputs(device, dtype=torch.bfloat16, **sizes):
    if dtype == torch.float16 and device == "cpu":
        pytest.skip("float16 is a CUDA dtype here")
    return gdn_inputs(**({"T": 3000, "H": 1, "HV": 2, "K": 128, "V": 128, "dtype": dtype, "device": device} | sizes))


@pytest.mark.parametrize("gate", ["zero", "small", "logsigmoid", "strong16", "mixed", "reset"])
def test_gates(device, gate):
    x = long_inputs(device, gate=gate)
    x["g"][..., 0] *= 0.01  # heads that forget and heads that do not, in one launch
    check_outputs(x, hard=gate in testing.STRONG_GATES)


@pytest.mark.cuda
@pytest.mark.parametrize("K, V", [(64, 192), (96, 192), (128, 128), (192, 128)])
def test_more_maps_than_multiprocessors(K, V):
    x = long_inputs("cuda", H=8, HV=16, K=K, V=V, gate="zero")
    x["g"][..., 3::4] -= 0.1  # some heads forget
    check_outputs(x)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_more_clusters_than_are_resident(dtype):
    check_outputs(long_inputs("cuda", dtype, T=1100, H=8, HV=16, K=192, V=384, gate="mixed"))


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
@pytest.mark.parametrize("K, V", [(64, 64), (96, 192), (128, 64), (128, 128), (192, 384)])
def test_sizes(device, K, V, dtype):
    check_outputs(long_inputs(device, dtype, K=K, V=V, T=2500, gate="zero"))


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
@pytest.mark.parametrize("K, V", [(64, 64), (96, 192), (128, 128), (192, 384)])
def test_equal_keys(device, K, V, dtype):
    check_outputs(long_inputs(device, dtype, K=K, V=V, T=1500, keys="equal", gate="-1e-3", beta="0.835"), hard=True)


@pytest.mark.parametrize(
    "offsets", [(0, 0, 1, 64, 65, 300, 1900, 2931, 3000), (0, 2500, 2500, 2999, 3000), (0, 3000), (7, 2990)])
@pytest.mark.parametrize("K, V", [(96, 192), (128, 128), (192, 192)])
def test_varlen(device, offsets, K, V):
    x = long_inputs(device, sequences=len(offsets) - 1, K=K, V=V, gate="zero")
    x["v"][:, : offsets[0]] = x["v"][:, offsets[-1] :] = torch.nan  # of no sequence
    check_outputs_within(x, offsets)


def check_outputs_within(x, offsets):
    cu_seqlens = torch.tensor(offsets, device=x["q"].device)
    with torch.no_grad():
        o, state = chunk_gated_delta_rule(**x, output_final_state=True, cu_seqlens=cu_seqlens)
    for n, (begin, end) in enumerate(itertools.pairwise(offsets)):
        one = {name: t[n : n + 1] if name == "initial_state" else t[:, begin:end] for name, t in x.items()}
        exact = {name: t.double() for name, t in one.items()}
        ref_o, ref_state = reference.gated_delta_rule(**exact, output_final_state=True, rule=reference.chunks)
        testing.check_close(f"o of {n}", o[:, begin:end], ref_o)
        testing.check_close(f"state of {n}", state[n : n + 1], ref_state, dtype=o.dtype)


def test_keys_longer_than_one(device):
    """What precedes a segment is forgotten only if no key keeps it: here a token multiplies the state along its key by
    -1.25 e^g = -0.9995, although e^g alone is 0.8. (On GPUs in fp16: the roundings of bf16 are kept as well.)"""
    x = long_inputs(device, torch.float16 if device == "cuda" else torch.bfloat16, gate="-0.22364", beta="1")
    x["k"] = (1.5 * x["k"][:, :1].float()).to(x["k"].dtype).expand_as(x["k"]).contiguous()
    check_outputs(x, hard=True)


def test_what_is_left_of_large_values(device):
    """A segment leaves out what precedes it only where no output would show it, however much larger it was."""
    x = long_inputs(device, gate="-0.05")
    x["v"][:, :1000] *= 1e5
    with torch.no_grad():
        o = chunk_gated_delta_rule(**x)[0]
        exact = {name: t.double() for name, t in x.items()}
        ref = reference.gated_delta_rule(**exact, rule=reference.chunks)[0]
    for i, (ours, theirs) in enumerate(zip(o.split(64, 1), ref.split(64, 1), strict=True)):
        testing.check_close(f"o of tokens from {64 * i} on", ours, theirs)


def test_value_first_states_and_l2norm(device):
    x = long_inputs(device, gate="small")
    x["initial_state"] = x["initial_state"].mT.contiguous()
    check_outputs(x, state_v_first=True, use_qk_l2norm_in_kernel=True)


def test_values_of_any_size(device):
    """P U is computed in fp16: the result must not depend on the scale of v."""
    x = long_inputs(device, T=300, gate="small")
    del x["initial_state"]
    for scale in (1e-20, 1e-6, 1.0, 1e8, 1e20):
        check_outputs(x | {"v": x["v"] * scale})


def test_columns_and_tokens_of_any_size(device):
    """Nor on how large other columns and tokens are: on Hopper a warp has one power of two for 16 columns."""
    x = long_inputs(device, T=300, gate="small")
    x["initial_state"] *= 0
    sizes = torch.logspace(-6, 0, 128, device=device)[torch.randperm(128).to(device)]
    columns = x | {"v": x["v"] * sizes.to(x["v"].dtype)}
    tokens = x | {"v": x["v"].clone()}
    tokens["v"][:, 70] *= 1e6
    for y, pieces in (columns, lambda t: t.split(1, -1)), (tokens, lambda t: (t[:, :70], t[:, 70:])):
        with torch.no_grad():
            o = chunk_gated_delta_rule(**y)[0]
            exact = {name: t.double() for name, t in y.items()}
            ref = reference.gated_delta_rule(**exact, rule=reference.chunks)[0]
        for ours, theirs in zip(pieces(o), pieces(ref), strict=True):
            testing.check_close("o", ours, theirs, hard=True)


@pytest.mark.parametrize("length", [1e-8, 1e-2, 10])
def test_keys_of_any_length(device, length):
    x = long_inputs(device, T=300, gate="small")
    x["k"] = (torch.nn.functional.normalize(x["k"].float(), dim=-1) * length).to(x["k"].dtype)
    x["beta"] = x["beta"] / max(1, length**2)
    check_outputs(x)


def test_a_column_of_nan_stays_one(device):
    x = long_inputs(device, T=200, V=64, gate="small")
    expected = chunk_gated_delta_rule(**x, output_final_state=True)
    x["v"][:, 20:, :, 8::16] = x["v"][:, 20:, :, 0::16] = torch.nan  # both columns of a thread
    for ours, theirs in zip(chunk_gated_delta_rule(**x, output_final_state=True), expected, strict=True):
        kept = torch.arange(64, device=device) % 8 != 0
        testing.check_close("other columns", ours[..., kept], theirs[..., kept].double(), dtype=torch.bfloat16)


@pytest.mark.cuda
@pytest.mark.parametrize("T", [100, 3000])
def test_cuda_graph(T):
    """A replay computes what the eager call does, on the inputs of the moment."""
    x = long_inputs("cuda", T=T)
    y = long_inputs("cuda", T=T)
    with torch.no_grad():
        chunk_gated_delta_rule(**x, output_final_state=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chunk_gated_delta_rule(**x, output_final_state=True)
        expected = chunk_gated_delta_rule(**y, output_final_state=True)
        for name, t in x.items():
            t.copy_(y[name])
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("T", [500, 3000])
def test_repeats_beside_another_stream(T):
    x = long_inputs("cuda", T=T, gate="mixed")
    busy = torch.randn(2048, 2048, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad():
        first = chunk_gated_delta_rule(**x, output_final_state=True)
        for _ in range(250):
            with torch.cuda.stream(stream):
                torch.matmul(busy, busy)
            again = chunk_gated_delta_rule(**x, output_final_state=True)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
