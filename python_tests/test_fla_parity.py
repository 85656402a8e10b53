"""Outputs, final states and gradients of fla's naive references, where fla is installed: same names, same results."""

from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

from lt2_ext import ops, testing
from lt2_ext.testing import gdn_inputs, with_gradients

# ours: (fla's module, its function, the inputs it takes and their names there, sequence axis second from the front)
CASES = {
    ops.chunk_gated_delta_rule: ("gated_delta_rule", "naive_recurrent_gated_delta_rule", "q k v beta g", True),
    ops.chunk_kda: ("kda", "naive_recurrent_kda", "q k v g beta", True),
    ops.chunk_simple_gla: ("simple_gla", "naive_recurrent_simple_gla", "q k v g", True),
    ops.chunk_gla: ("gla", "naive_recurrent_gla", "q k v g", True),
    ops.chunk_delta_rule: ("delta_rule", "delta_rule_recurrence", "q k v beta", False),
}


def fla(module, function):
    pytest.importorskip("fla")
    return getattr(import_module(f"fla.ops.{module}.naive"), function)


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.__name__)
def test_the_recurrences(device, op):
    module, function, names, tokens_first = CASES[op]
    naive, names = fla(module, function), names.split()
    x = gdn_inputs(B=2, T=70, H=3, K=16, V=24, dtype=torch.float32, device=device)
    if module in ("kda", "gla"):
        x["g"] = x["g"][..., None] * torch.rand(16, device=device)
    x = {n: t for n, t in x.items() if n in [*names, "initial_state"]}

    def theirs(initial_state, output_final_state, **x):
        x = {n: t if tokens_first else t.transpose(1, 2) for n, t in x.items()}
        o, state = naive(*(x[n] for n in names), initial_state=initial_state, output_final_state=True)
        return o if tokens_first else o.transpose(1, 2), state

    o, state = op(**x, output_final_state=True)
    cotangents = {"o": torch.randn_like(o), "final_state": torch.randn_like(state)}
    ours, want = (with_gradients(f, x, cotangents) for f in (op, theirs))
    assert ours.keys() == want.keys()
    for name in ours:
        testing.check_close(name, ours[name], want[name].double(), None, testing.gradient_kind(name), torch.float32)


def test_linear_attention(device):
    q, k, v = (torch.randn(2, 50, 3, d, device=device) for d in (16, 16, 24))
    want, state = fla("linear_attn", "naive_recurrent_linear_attn")(q, k, v, output_final_state=True)
    o, final = ops.chunk_simple_gla(q, k, v, output_final_state=True)
    testing.check_close("o", o, want.double())
    testing.check_close("final_state", final, state.double())


def test_retention(device):
    """RetNet's decays are a schedule over heads that the caller gives."""
    q, k, v = (torch.randn(2, 50, 4, d, device=device) for d in (16, 16, 24))
    want = fla("retention", "naive_retention")(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    g_gamma = torch.log1p(-(2.0 ** -(5 + torch.arange(4, device=device))))
    testing.check_close("o", ops.chunk_simple_gla(q, k, v, g_gamma=g_gamma)[0], want.double())


def test_hgrn2(device):
    """GLA whose keys are what the decay leaves free."""
    q, v = (torch.randn(2, 50, 3, d, device=device) for d in (16, 24))
    g = F.logsigmoid(torch.randn(2, 50, 3, 16, device=device))
    want, _ = fla("gla", "naive_recurrent_gla")(q, 1 - g.exp(), v, g)
    testing.check_close("o", ops.chunk_gla(q, 1 - g.exp(), v, g)[0], want.double())
