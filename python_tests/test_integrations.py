"""Models of transformers, and fla's functions, on these operators: same results, and a record of what ran where."""

import copy
import importlib.util
import sys
import time
import types

import pytest
import torch
from torch import Tensor

from lt2_ext.integrations import patch_fla, patch_transformers
from lt2_ext.reference import causal_conv1d as conv_reference
from lt2_ext.reference import gdn as gdn_reference
from lt2_ext.testing import PLAIN_FACTOR, PLAIN_FLOOR, check_close, gdn_inputs, rel_err

transformers = pytest.importorskip("transformers")

VOCAB = 97
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 4, "pad_token_id": None, "eos_token_id": None}  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
          "linear_value_head_dim": 24}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "Qwen3Next": SIZES | LINEAR | EXPERTS
    | {"shared_expert_intermediate_size": 32, "head_dim": 16, "num_key_value_heads": 2},
    "OlmoHybrid": SIZES,
}  # fmt: skip
LINEAR_LAYERS = 3  # of the 4


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def _plain_transformers():
    if importlib.util.find_spec("fla") and not torch.cuda.is_available():
        pytest.skip("transformers runs fla's Triton kernels where fla is installed")


@pytest.fixture(params=MODELS)
def model(request, _plain_transformers):
    """Random weights, large enough that every layer matters to the logits."""
    name = request.param
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.dim() > 1 and "conv" not in parameter_name and "embed" not in parameter_name:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (rows, length))


def test_the_linear_layers_matter(model):
    """Else nothing below could fail."""
    x = ids(1, 20)
    with torch.no_grad():
        before = model(x).logits
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):
                for p in layer.linear_attn.parameters():
                    p.mul_(0.5)
        assert rel_err(model(x).logits, before) > 0.1


@torch.no_grad()
def test_prefill_has_the_logits_of_transformers(model):
    x = ids(2, 150)
    plain = model(x).logits
    with patch_transformers() as routes:
        got = model(x).logits
    assert routes.ours == {"torch_chunk_gated_delta_rule": LINEAR_LAYERS, "causal_conv1d_fn": LINEAR_LAYERS}
    assert not routes.fallback
    check_close("logits", got, plain.double())
    assert not torch.equal(got, plain)
    assert torch.equal(model(x).logits, plain), "the originals are back"


@torch.no_grad()
def test_cached_decode_has_the_logits_of_transformers(model):
    x = ids(2, 40)
    plain = model(x).logits
    with patch_transformers() as routes:
        out = model(x[:, :30], use_cache=True)
        steps = [out.logits]
        for t in range(30, 40):
            out = model(x[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    check_close("logits", torch.cat(steps, 1), plain.double())
    steps = LINEAR_LAYERS * 10
    assert routes.ours["causal_conv1d_update"] == routes.ours["torch_recurrent_gated_delta_rule"] == steps
    assert not routes.fallback


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_transformers_is(model):
    x = ids(2, 150)
    model.bfloat16()
    want = copy.deepcopy(model).float()(x).logits
    plain = model(x).logits
    with patch_transformers() as routes:
        got = model(x).logits
    assert not routes.fallback
    limit = PLAIN_FACTOR["out"] * rel_err(plain, want) + PLAIN_FLOOR[torch.bfloat16]["out"]
    assert rel_err(got, want) <= limit


@torch.no_grad()
def test_generate_gives_the_same_tokens(model):
    x = ids(2, 7)
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(x, **options)
    with patch_transformers() as routes:
        assert torch.equal(model.generate(x, **options), plain)
    assert routes.ours["torch_recurrent_gated_delta_rule"] == 11 * LINEAR_LAYERS


def test_gradients_flow(model):
    x = ids(2, 20)

    def gradients() -> list[Tensor]:
        return torch.autograd.grad(model(x, labels=x).loss, [p for p in model.parameters() if p.requires_grad],
                                   materialize_grads=True)  # fmt: skip

    plain = gradients()
    with patch_transformers() as routes:
        got = gradients()
    assert not routes.fallback
    for (name, _), g, p in zip(model.named_parameters(), got, plain, strict=True):
        check_close(name, g, p.double(), kind="gate_grad")


@torch.no_grad()
def test_packed_documents_are_separate_documents(model):
    """transformers refuses this without fla."""
    documents = [ids(1, n) for n in (9, 1, 30)]
    packed = torch.cat(documents, 1)
    offsets = torch.tensor([0, 9, 10, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    options = {"position_ids": positions, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "use_cache": False}
    options |= {"max_length_q": 30, "max_length_k": 30}
    with pytest.raises(ValueError, match="packed sequences"):
        model(packed, **options)
    with patch_transformers() as routes:
        got = model(packed, **options).logits
    assert not routes.fallback
    check_close("logits", got, torch.cat([model(d).logits for d in documents], 1).double())


@torch.no_grad()
def test_what_is_not_supported_runs_the_original(model):
    model.half()
    x = ids(1, 9)
    plain = model(x).logits
    with patch_transformers() as routes:
        assert torch.equal(model(x).logits, plain)
    assert not routes.ours
    assert routes.fallback == {
        ("torch_chunk_gated_delta_rule", "torch.float16 on cpu"): LINEAR_LAYERS,
        ("causal_conv1d_fn", "torch.float16 on cpu"): LINEAR_LAYERS,
    }
    assert "torch_chunk_gated_delta_rule: 3 x original (torch.float16 on cpu)" in str(routes)


def test_a_decode_step_that_needs_gradients_runs_the_original(model):
    x = ids(1, 9)
    with patch_transformers() as routes:
        out = model(x, use_cache=True)
        model(x[:, :1], past_key_values=out.past_key_values, use_cache=True).logits.sum()
    assert routes.fallback == {("causal_conv1d_update", "a decode step that needs gradients"): LINEAR_LAYERS}


def test_an_error_inside_brings_the_originals_back(model):
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    patch = patch_transformers()
    patch.__enter__()
    assert vars(module) != before
    with pytest.raises(KeyError):
        patch.gen.throw(KeyError())
    assert vars(module) == before


def test_without_a_model_there_is_nothing_to_patch(monkeypatch):
    for name in [n for n in sys.modules if n.startswith(("transformers.models.", "fla."))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RuntimeError, match="patch_transformers: import or build the model first"), patch_transformers():
        pass
    with pytest.raises(RuntimeError, match="patch_fla: import fla first"), patch_fla():
        pass


@torch.no_grad()
@pytest.mark.usefixtures("_plain_transformers")
def test_prefill_is_faster():
    """A layer of Qwen3-Next's proportions: T = 512, 8 heads of 128 and 16 value heads."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    sizes = {"hidden_size": 512, "linear_num_key_heads": 8, "linear_num_value_heads": 16}
    layer = Qwen3NextGatedDeltaNet(transformers.Qwen3NextConfig(**(MODELS["Qwen3Next"] | sizes | {
        "linear_key_head_dim": 128, "linear_value_head_dim": 128})), 0).eval()  # fmt: skip
    x = torch.randn(1, 512, 512)

    def seconds() -> float:
        start = time.perf_counter()
        layer(x)
        return time.perf_counter() - start

    plain, ours = [], []
    for _ in range(6):  # interleaved: a busy machine slows both
        plain.append(seconds())
        with patch_transformers():
            layer(x)
            ours.append(seconds())
    print(f"Qwen3-Next layer, T = 512: {min(plain) * 1e3:.1f} ms, patched {min(ours) * 1e3:.1f} ms, "
          f"{min(plain) / min(ours):.1f} x")  # fmt: skip
    assert min(ours) < min(plain)


# fla's entry points and signatures (0.6.0), for machines without it: computed by the oracles.


def fla_chunk(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs,
):  # fmt: skip
    return "original"


def fla_recurrent(
    q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, dt_bias=None,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    return "original"


def fla_conv(
    x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None,
    backend="triton", cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs,
):  # fmt: skip
    return "original"


def fla_conv_step(x, cache, residual=None, weight=None, bias=None, activation=None):
    return "original"


FLA = {
    "fla.ops.gated_delta_rule": {
        "chunk_gated_delta_rule": fla_chunk,
        "fused_recurrent_gated_delta_rule": fla_recurrent,
    },
    "fla.modules.causal_conv1d": {"causal_conv1d": fla_conv, "causal_conv1d_update": fla_conv_step},
}


@pytest.fixture(params=["signatures", "installed"])
def fla(request, monkeypatch):
    """A namespace of fla's functions, as a user's module that imported them before the patch."""
    if request.param == "signatures":
        for module, functions in FLA.items():
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
            for name, f in functions.items():
                f.__name__ = name
                setattr(sys.modules[module], name, f)
    user = types.ModuleType("user_of_fla")
    monkeypatch.setitem(sys.modules, "user_of_fla", user)
    for module, functions in FLA.items():
        try:
            imported = importlib.import_module(module)
        except Exception as e:  # without Triton, or without a driver
            pytest.skip(f"fla does not import: {type(e).__name__}: {e}")
        for name in functions:
            setattr(user, name, getattr(imported, name))
    user.is_installed = request.param == "installed"
    return user


def test_fla_rules_run_here(fla):
    x = gdn_inputs(T=70, HV=4, K=16, V=24, sequences=3)
    x["cu_seqlens"] = torch.tensor([0, 20, 20, 70])
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "scale": 0.3}
    want = gdn_reference.gated_delta_rule(
        **{n: t.double() if t.is_floating_point() else t for n, t in x.items()}, **options
    )
    with patch_fla() as routes:
        for name in FLA["fla.ops.gated_delta_rule"]:
            for got, w in zip(getattr(fla, name)(**x, **options), want, strict=True):
                check_close(name, got, w)
    assert routes.ours == {"chunk_gated_delta_rule": 1, "fused_recurrent_gated_delta_rule": 1}


def test_fla_positional_arguments_keep_their_meaning(fla):
    """The order of the two rules differs from each other's and from ours."""
    x = gdn_inputs(T=20, HV=4, K=16, V=24)
    q, k, v, g, beta, state = x.values()
    raw = beta.logit()
    want = gdn_reference.gated_delta_rule(q, k, v, g, 2 * beta, 0.3, state.mT, True, state_v_first=True,
                                          use_qk_l2norm_in_kernel=True)  # fmt: skip
    with patch_fla():
        chunk = fla.chunk_gated_delta_rule(q, k, v, g, raw, 0.3, state.mT, True, True, True, True, True)
        recurrent = fla.fused_recurrent_gated_delta_rule(
            q, k, v, g, None, None, raw, 0.3, state.mT, True, True, False, None, None, True, True, True
        )
    for got in (chunk, recurrent):
        for name, a, b in zip(("o", "state"), got, want, strict=True):
            check_close(name, a, b.double())


def test_fla_gate_in_the_kernel(fla):
    x = gdn_inputs(T=20, HV=4, K=16, V=24)
    gate = {"A_log": torch.randn(4), "dt_bias": torch.randn(4)}
    want = gdn_reference.gated_delta_rule(**x, **gate, use_gate_in_kernel=True)[0]
    with patch_fla():
        for name in FLA["fla.ops.gated_delta_rule"]:
            check_close(name, getattr(fla, name)(**x, **gate, use_gate_in_kernel=True)[0], want.double())
            ignored = getattr(fla, name)(**x, A_log=gate["A_log"])[0]
            check_close(name, ignored, gdn_reference.gated_delta_rule(**x)[0].double())


def test_fla_convolution_runs_here(fla):
    x, weight, bias = torch.randn(1, 30, 6), torch.randn(6, 4), torch.randn(6)
    state, offsets = torch.randn(2, 6, 4), torch.tensor([0, 12, 30])
    want, final = conv_reference.causal_conv1d(x, weight, bias, state, True, "silu", offsets)
    with patch_fla() as routes:
        got, got_final = fla.causal_conv1d(x, weight, bias, None, state, True, "silu", cu_seqlens=offsets)
        check_close("y", got, want.double())
        assert torch.equal(got_final, final)
        assert fla.causal_conv1d(x, weight, bias)[1] is None

        for shape in ((2, 6), (1, 2, 6), (2, 1, 6)):
            token, cache = torch.randn(2, 6), state.clone()
            y, out = fla.causal_conv1d_update(token.view(shape), cache, None, weight, bias, "swish")
            want, final = conv_reference.causal_conv1d(token[:, None], weight, bias, state, True)
            assert y.shape == shape
            check_close("y", y.view(2, 1, 6), want.double())
            assert out is cache
            assert torch.equal(cache, final)
    assert routes.ours == {"causal_conv1d": 2, "causal_conv1d_update": 3}
    assert not routes.fallback


def test_fla_calls_that_are_not_supported_run_the_original(fla):
    if fla.is_installed:
        pytest.skip("fla's own kernels do not run on a CPU")
    x = gdn_inputs(T=5, HV=4, K=16, V=24)
    wide = gdn_inputs(T=5, HV=4, K=264, V=24)
    tokens, weight = torch.randn(1, 5, 6), torch.randn(6, 4)
    with patch_fla() as routes:
        assert fla.chunk_gated_delta_rule(**x, cp_context=object()) == "original"
        assert fla.chunk_gated_delta_rule(**wide) == "original"
        assert fla.fused_recurrent_gated_delta_rule(**x, gk=torch.zeros(1, 5, 4, 16)) == "original"
        assert fla.causal_conv1d(tokens, weight, residual=tokens) == "original"
        assert fla.causal_conv1d(tokens, weight, activation="gelu") == "original"
        assert fla.causal_conv1d_update(tokens[0], torch.zeros(5, 6, 4).bfloat16(), None, weight) == "original"
    assert set(routes.fallback) == {
        ("chunk_gated_delta_rule", "cp_context given"),
        ("chunk_gated_delta_rule", "head dimensions 264, 24"),
        ("fused_recurrent_gated_delta_rule", "gk given"),
        ("causal_conv1d", "residual given"),
        ("causal_conv1d", "activation gelu"),
        ("causal_conv1d_update", "a state of torch.bfloat16 for torch.float32"),
    }
    assert not routes.ours
