"""Models of other packages on these operators. May import: lt2_ext.ops; transformers and fla where they are loaded.

    with patch_transformers() as routes:
        model.generate(...)
    print(routes)

Inside the context, the gated delta rule and the causal convolution of the package run here wherever the operators
support the call; any other call runs the original, and ``routes`` says why.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import build_info, ops
from .ops.causal_conv1d import MAX_WIDTH

Function = Callable[..., Any]
Arguments = dict[str, Any]  # of a call, by name
# Makes the call here, or raises _Unsupported before it has changed anything.
Adapter = Callable[[Arguments], Any]

MAX_KEY_DIM, MAX_VALUE_DIM = 256, 512


@dataclass
class Routes:
    """Calls since the context was entered. A function traced by torch.compile counts once per trace.

    Attributes:
        ours: by function, those that ran here.
        fallback: by function and reason, those that ran the original.
    """

    ours: Counter[str] = field(default_factory=Counter)
    fallback: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{name}: {n} x lt2_ext" for name, n in sorted(self.ours.items())]
        lines += [f"{name}: {n} x original ({why})" for (name, why), n in sorted(self.fallback.items())]
        return "\n".join(lines) or "no calls"


class _Unsupported(Exception):
    """The message says why the original runs."""


@contextmanager
def patch_transformers() -> Iterator[Routes]:
    """Route the gated delta rule and its causal convolution in transformers (Qwen3-Next, Qwen3.5, OLMo-hybrid, ..).

    Takes the model classes that are imported when the context is entered. Also makes packed documents
    (``cu_seq_lens_q``) possible, which transformers refuses without fla. Gradients flow.

    Raises:
        RuntimeError: no model with a gated delta rule has been imported.
    """
    found = [
        (module[name], adapter)
        for module in (vars(m) for n, m in list(sys.modules.items()) if n.startswith("transformers.models."))
        if "torch_chunk_gated_delta_rule" in module
        for name, adapter in _TRANSFORMERS.items()
        if name in module
    ]
    if not found:
        raise RuntimeError("patch_transformers: import or build the model first: none with a gated delta rule is here")
    with _patched(found) as routes:
        yield routes


@contextmanager
def patch_fla() -> Iterator[Routes]:
    """Route ``fla.ops.gated_delta_rule`` and ``fla.modules.causal_conv1d``, wherever their functions were imported to.

    Raises:
        RuntimeError: neither has been imported.
    """
    found = [
        (getattr(sys.modules[module], name), adapter)
        for module, adapters in _FLA.items()
        if module in sys.modules
        for name, adapter in adapters.items()
        if hasattr(sys.modules[module], name)
    ]
    if not found:
        raise RuntimeError(f"patch_fla: import fla first: none of {', '.join(_FLA)} is here")
    with _patched(found) as routes:
        yield routes


@contextmanager
def _patched(found: list[tuple[Function, Adapter]]) -> Iterator[Routes]:
    routes = Routes()
    routed = {id(original): _routed(original, adapter, routes) for original, adapter in found}
    back = {id(routed[id(original)]): original for original, _ in found}
    try:
        _replace(routed)
        yield routes
    finally:
        _replace(back)


def _replace(replacements: Mapping[int, Function]) -> None:
    """In every module, whatever was imported from wherever."""
    for module in list(sys.modules.values()):
        attributes = getattr(module, "__dict__", {})
        for name, value in list(attributes.items()):
            if id(value) in replacements:
                attributes[name] = replacements[id(value)]


def _routed(original: Function, adapter: Adapter, routes: Routes) -> Function:
    name, signature = original.__name__, inspect.signature(original)
    rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        x = dict(bound.arguments)
        for collected in rest:
            x |= x.pop(collected)
        try:
            result = adapter(x)
        except _Unsupported as e:
            routes.fallback[name, str(e)] += 1
            return original(*args, **kwargs)
        routes.ours[name] += 1
        return result

    return call


def _require(condition: object, reason: str) -> None:
    if not condition:
        raise _Unsupported(reason)


def _require_kernel(operator: str, x: Tensor) -> None:
    device = x.device.type
    half = (torch.bfloat16,) if device == "cpu" else (torch.bfloat16, torch.float16)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"lt2::{operator}", device.upper())
    _require(has_kernel and (device != "cuda" or build_info()["cuda_archs"]), f"no kernel for {device}")
    _require(x.dtype in (torch.float32, *half), f"{x.dtype} on {device}")


def _require_absent(x: Arguments, *names: str) -> None:
    for name in names:
        _require(x.get(name) is None, f"{name} given")


def _gated_delta_rule(f: Function, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    _require_kernel("gdn_fwd", q)
    _require(q.dtype == k.dtype == v.dtype, f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype}")
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]
    _require(1 <= K <= MAX_KEY_DIM and 1 <= V <= MAX_VALUE_DIM, f"head dimensions {K}, {V}")
    _require(H > 0 and HV % H == 0, f"{HV} value heads of {H} heads")
    return f(q, k, v, **options)


def _transformers_rule(f: Function) -> Adapter:
    def adapter(x: Arguments) -> Any:
        options = ("g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
        return _gated_delta_rule(
            f, x["query"], x["key"], x["value"], cu_seqlens=x.get("cu_seqlens"), **{n: x[n] for n in options}
        )

    return adapter


def _fla_rule(f: Function) -> Adapter:
    options = set(inspect.signature(f).parameters) - {"q", "k", "v"}

    def adapter(x: Arguments) -> Any:
        _require_absent(x, "gk", "gv", "cp_context", "head_first")
        if "transpose_state_layout" in x:  # the old name
            _require(not x["state_v_first"], "state_v_first and transpose_state_layout given")
            x["state_v_first"] = x["transpose_state_layout"]
        if not x.get("use_gate_in_kernel"):
            x |= {"A_log": None, "dt_bias": None}  # ignored there
        _require(not x["allow_neg_eigval"] or x["use_beta_sigmoid_in_kernel"], "allow_neg_eigval alone")
        given = {n: value for n, value in x.items() if n in options and value is not None}
        return _gated_delta_rule(f, x["q"], x["k"], x["v"], **given)

    return adapter


def _require_conv(operator: str, x: Tensor, weight: Tensor, activation: str | None) -> None:
    _require_kernel(operator, x)
    _require(activation in ("silu", "swish", None), f"activation {activation}")
    _require(weight.shape[-1] <= MAX_WIDTH, f"kernel size {weight.shape[-1]}")


def _require_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``x`` ``[B, .., D]``."""
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, x, weight, bias))
    _require(not needed, "a decode step that needs gradients")
    _require(state.dtype == x.dtype, f"a state of {state.dtype} for {x.dtype}")
    _require(list(state.shape) == [x.shape[0], *weight.shape], f"a state of shape {list(state.shape)}")


def _transformers_conv(x: Arguments) -> Tensor:
    hidden, weight, cu_seqlens = x["hidden_states"].transpose(1, 2), x["weight"], x.get("cu_seq_lens_q")
    _require_conv("causal_conv1d_fwd", hidden, weight, x["activation"])
    _require(cu_seqlens is not None or x.get("seq_idx") is None, "seq_idx without cu_seq_lens_q")
    if cu_seqlens is not None:  # with a cache, earlier tokens stand before the documents
        _require(hidden.shape[0] == 1 and int(cu_seqlens[-1]) == hidden.shape[1], "packed documents with a cache")
    y, _ = ops.causal_conv1d(hidden, weight, x["bias"], activation=x["activation"], cu_seqlens=cu_seqlens)
    return y.transpose(1, 2)


def _transformers_conv_step(x: Arguments) -> Tensor:
    hidden, state, weight, bias = x["hidden_states"].transpose(1, 2), x["conv_state"], x["weight"], x["bias"]
    _require_conv("causal_conv1d_step_", hidden, weight, x["activation"])
    _require_step(state, hidden, weight, bias)
    return ops.causal_conv1d_step_(state, hidden, weight, bias, activation=x["activation"]).transpose(1, 2)


def _fla_conv(x: Arguments) -> tuple[Tensor, Tensor | None]:
    _require_absent(x, "residual", "cp_context", "seq_idx")
    _require(x["weight"] is not None, "no weight")
    _require_conv("causal_conv1d_fwd", x["x"], x["weight"], x["activation"])
    _require(x["x"].dim() == 3 and x["x"].shape[2] == x["weight"].shape[0], f"x of shape {list(x['x'].shape)}")
    names = ("x", "weight", "bias", "initial_state", "activation", "cu_seqlens")
    return ops.causal_conv1d(**{n: x[n] for n in names}, output_final_state=bool(x["output_final_state"]))


def _fla_conv_step(x: Arguments) -> tuple[Tensor, Tensor]:
    _require_absent(x, "residual")
    _require(x["weight"] is not None, "no weight")
    _require_conv("causal_conv1d_step_", x["x"], x["weight"], x["activation"])
    tokens = x["x"].reshape(-1, x["weight"].shape[0])  # one per sequence: [N, D], [1, N, D] or [N, 1, D]
    _require_step(x["cache"], tokens, x["weight"], x["bias"])
    y = ops.causal_conv1d_step_(x["cache"], tokens, x["weight"], x["bias"], activation=x["activation"])
    return y.view(x["x"].shape), x["cache"]


_TRANSFORMERS: dict[str, Adapter] = {
    "torch_chunk_gated_delta_rule": _transformers_rule(ops.chunk_gated_delta_rule),
    "torch_recurrent_gated_delta_rule": _transformers_rule(ops.fused_recurrent_gated_delta_rule),
    "causal_conv1d_fn": _transformers_conv,
    "causal_conv1d_update": _transformers_conv_step,
}
_FLA: dict[str, dict[str, Adapter]] = {
    "fla.ops.gated_delta_rule": {
        "chunk_gated_delta_rule": _fla_rule(ops.chunk_gated_delta_rule),
        "fused_recurrent_gated_delta_rule": _fla_rule(ops.fused_recurrent_gated_delta_rule),
    },
    "fla.modules.causal_conv1d": {
        "causal_conv1d": _fla_conv,
        "causal_conv1d_update": _fla_conv_step,
    },
}
