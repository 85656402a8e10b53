"""On CUDA, forward and backward of every family: in a graph, on another stream, beside other work, from threads, in
memory beyond 32-bit offsets. Always the bits of a plain call."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from lt2_ext import ops
from lt2_ext.testing import gate_values, gdn_inputs

pytestmark = pytest.mark.cuda
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
T = 200
Tensors = dict[str, Tensor]


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def rule(dtype: torch.dtype = BF16, channels: bool = False, without: tuple[str, ...] = (), K: int = 64) -> Tensors:
    x = gdn_inputs(B=2, T=T, H=2, HV=4, K=K, V=K, dtype=dtype, device="cuda")
    if channels:
        x["g"] = gate_values("logsigmoid", (2, T, 4, K), "cuda")
    return {n: t for n, t in x.items() if n not in without}


def attention() -> Tensors:
    return {"q": randn(2, T, 4, 64), "k": randn(2, T, 2, 64), "v": randn(2, T, 2, 64)}


def index() -> Tensors:
    return {"q_idx": randn(2, T, 4, 64), "k_idx": randn(2, T, 64), "w_idx": randn(2, T, 4)}


def selected(**x: Tensor) -> Tensor:
    """Of the keys before a query every third, in falling order."""
    places = torch.arange(T, device="cuda")
    indices = (places[:, None] - 3 * torch.arange(50, device="cuda")).clamp(min=-1).int()
    return ops.dsa_attention(**x, indices=indices.expand(2, -1, -1))


def loss(**x: Tensor) -> Tensor:
    _, lse = ops.window_attention(x["q"], x["k"], x.pop("v"), return_lse=True)
    return ops.indexer_loss(**x, lse=lse.detach())


stateful = partial(partial, output_final_state=True)
# name: operator with results that are tensors, its arguments that have gradients, drawn anew by each call
CASES: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], Callable[[], Tensors]]] = {
    "gdn": (stateful(ops.chunk_gated_delta_rule), rule),
    "gdn fp32": (stateful(ops.chunk_gated_delta_rule), partial(rule, FP32)),
    "gdn other sizes": (stateful(ops.chunk_gated_delta_rule), partial(rule, K=40)),
    "simple_gla": (stateful(ops.chunk_simple_gla), rule),
    "delta_rule": (stateful(ops.chunk_delta_rule), partial(rule, without=("g",))),
    "kda": (stateful(ops.chunk_kda), partial(rule, channels=True)),
    "kda fp16": (stateful(ops.chunk_kda), partial(rule, FP16, channels=True)),
    "kda fp32": (stateful(ops.chunk_kda), partial(rule, FP32, channels=True)),
    "gla": (stateful(ops.chunk_gla), partial(rule, channels=True, without=("beta",))),
    "causal_conv1d": (ops.causal_conv1d, lambda: {"x": randn(2, T, 64), "weight": randn(64, 4, dtype=FP32)}),
    "window_attention": (partial(ops.window_attention, window=70), attention),
    "dsa_attention": (selected, attention),
    "indexer_loss": (loss, lambda: index() | attention()),
    "swiglu": (ops.swiglu, lambda: {"gate": randn(T, 512), "up": randn(T, 512)}),
    "gated_rmsnorm": (ops.gated_rmsnorm, lambda: {"o": randn(T, 512), "z": randn(T, 512), "weight": randn(512)}),
    "loop_residual_rmsnorm": (
        partial(ops.loop_residual_rmsnorm, eps=1e-6),
        lambda: {"h": randn(T, 512), "h_in": randn(T, 512), "rho": randn(512), "weight": randn(512)},
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def run(name: str, x: Tensors) -> list[Tensor]:
    """The results, and the gradients of what of x has one, of a loss that is their square."""
    x = {n: t.detach().requires_grad_() for n, t in x.items()}
    outputs = CASES[name][0](**x)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    grads = torch.autograd.grad(outputs, list(x.values()), [o.detach() for o in outputs], allow_unused=True)
    assert any(g is not None for g in grads)
    return [*(o.detach() for o in outputs), *(g for g in grads if g is not None)]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {i} of {len(want)}"


@every_case
def test_a_replay_of_a_graph_is_a_call(name):
    """Forward and backward, on the inputs of the moment; nothing in them waits for the device."""
    x, y = CASES[name][1](), CASES[name][1]()
    want = run(name, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(name, x)
    for n, t in x.items():
        t.copy_(y[n])
    for _ in range(2):
        graph.replay()
        assert_equal(got, want)


@every_case
def test_runs_on_the_current_stream(name):
    """Its inputs are written late, on that stream."""
    x, side = CASES[name][1](), torch.cuda.Stream()
    want = run(name, x)
    late = {n: torch.zeros_like(t) for n, t in x.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for n, t in late.items():
            t.copy_(x[n])
        got = run(name, late)
    side.synchronize()
    assert_equal(got, want)


@pytest.mark.slow
@every_case
def test_repeats_beside_another_stream(name):
    x, busy, side = CASES[name][1](), randn(2048, 2048), torch.cuda.Stream()
    want = run(name, x)
    for _ in range(100):
        with torch.cuda.stream(side):
            torch.matmul(busy, busy)
        assert_equal(run(name, x), want)


def test_threads_of_python():
    """Each with a stream of its own, all operators at a time."""
    inputs = {name: make() for name, (_, make) in CASES.items()}
    want = {name: run(name, x) for name, x in inputs.items()}
    torch.cuda.synchronize()

    def repeat(name: str) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                assert_equal(run(name, inputs[name]), want[name])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(repeat, CASES))


FLAT = ("swiglu", "gated_rmsnorm", "loop_residual_rmsnorm")  # take rows as one axis


@pytest.mark.parametrize("name", [n for n in CASES if n not in FLAT])
def test_rows_beyond_32_bit_offsets(name):
    """The two rows of every argument 2^31 elements apart; arguments of a dtype lie in one allocation."""
    x, stride = CASES[name][1](), 2**31 + 64
    wide = {n: t for n, t in x.items() if t.dim() > 2 and n != "initial_state"}
    pools = {t.dtype: torch.zeros(stride + (1 << 20), dtype=t.dtype, device="cuda") for t in wide.values()}
    ends = dict.fromkeys(pools, 0)
    far = dict(x)
    for n, t in wide.items():
        far[n] = pools[t.dtype].as_strided(t.shape, (stride, *t.stride()[1:]), ends[t.dtype]).copy_(t)
        ends[t.dtype] += t[0].numel()
    assert max(ends.values()) <= 1 << 20
    assert_equal(run(name, far), run(name, x))
