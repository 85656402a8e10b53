"""Claims about looping, measured on real modules and operators: docs/theory.md says what they mean."""

from itertools import pairwise

import pytest
import torch

from lt2_ext.ops import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from lt2_ext.recipes import theory
from lt2_ext.recipes.theory import WINDOW, new_model

IDS = torch.arange(40)[None] % 64
LONG = torch.arange(8 * WINDOW + 8)[None] % 64


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_loops_of_a_delta_rule_erase_with_rank_T(loops):
    """Each loop has keys of its own, as h differs: in every token and head the T steps erase T directions."""
    ranks = theory.change_ranks(theory.effective_operators(new_model("delta", loops), IDS))
    assert ranks.shape == (40, 2)
    assert (ranks == loops).all()


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_the_rank_collapses_where_keys_coincide(loops):
    """Blocks that add nothing leave h, so every loop has the same key, and T steps erase no more than one direction."""
    model = theory.repeat_keys(new_model("delta", loops))
    assert (theory.change_ranks(theory.effective_operators(model, IDS)) == 1).all()


def test_the_rank_is_at_most_that_of_the_keys():
    """Eight steps within a plane: rank 2."""
    plane = torch.randn(1, 1, 3, 2, 16)
    k = (torch.randn(1, 8, 3, 1, 2) @ plane)[..., 0, :]
    assert (theory.change_ranks(theory.operators(k, torch.rand(1, 8, 3))) == 2).all()


@pytest.mark.parametrize("loops, layers", [(1, 1), (2, 1), (4, 1), (8, 1), (2, 3)])
def test_looped_windows_reach_as_far_as_stacked_ones(loops, layers):
    """T loops of N layers: the token itself and T N (w - 1) before it, by the derivative of a real model."""
    model = new_model("window", loops, layers)
    assert theory.reach(theory.influence(model, LONG)) == min(loops * layers * (WINDOW - 1) + 1, LONG.shape[1])


def test_reach_is_where_a_change_of_a_token_stops():
    """The same without a derivative: another token just outside changes no bit of the logits, just inside it does."""
    model, last = new_model("window", 4), LONG.shape[1] - 1
    logits, span = model(LONG)[0, -1], 4 * (WINDOW - 1)
    for back, changed in ((span, True), (span + 1, False)):
        other = LONG.clone()
        other[0, last - back] = 63 - other[0, last - back]
        assert torch.equal(model(other)[0, -1], logits) != changed


def test_a_residual_stream_caps_the_effective_reach():
    """With 95 % of the stream carried along, 90 % of the influence of other tokens comes from one window at any number
    of loops, although the reach grows with each; behind the first window it falls by more than tenfold per window."""
    for loops in (1, 2, 4, 8):
        effect = theory.influence(theory.mix_share(new_model("window", loops), LONG, 0.05), LONG).detach()
        assert theory.reach(effect) == loops * (WINDOW - 1) + 1
        assert theory.horizon(effect) <= WINDOW
        windows = [effect[n * (WINDOW - 1) + 1 : (n + 1) * (WINDOW - 1) + 1].norm() for n in range(min(loops, 3))]
        for near, far in pairwise(windows):
            assert far < 0.1 * loops * near


def test_a_smaller_residual_share_reaches_farther():
    horizons = [
        theory.horizon(theory.influence(theory.mix_share(new_model("window", 8), LONG, share), LONG).detach())
        for share in (0.05, 0.5, 0.9)
    ]
    assert horizons[0] < horizons[1] < horizons[2]


@pytest.mark.parametrize("K", [2, 5, 16])
def test_K_steps_with_beta_2_are_any_orthogonal_matrix(K):
    Q = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64))[0]
    k = theory.reflections(Q).float()
    E = theory.operators(k[None, :, None], torch.full((1, K, 1), 2.0))[0, 0]
    torch.testing.assert_close(E.double(), Q, atol=1e-5, rtol=0)


@pytest.mark.parametrize("op", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_reflections_need_negative_eigenvalues(op):
    """n steps along one key multiply what a state holds there by (1 - beta)^n: without ``allow_neg_eigval`` never by
    less than 0, whatever the raw beta; with it nearly by (-1)^n, which is the parity of n."""
    n, raw = 5, torch.tensor([-20.0, -1.0, 0.0, 1.0, 20.0])
    k = torch.zeros(len(raw), n, 1, 8)
    k[..., 3] = 1
    state = torch.eye(8).expand(len(raw), 1, 8, 8)
    beta = raw[:, None, None].expand(-1, n, 1)
    for neg in (False, True):
        options = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": neg, "output_final_state": True}
        _, E = op(k, k, torch.zeros_like(k), None, beta, initial_state=state, **options)
        eigenvalue = (1 - raw.sigmoid() * (1 + neg)) ** n
        torch.testing.assert_close(torch.linalg.det(E[:, 0]), eigenvalue, atol=1e-5, rtol=1e-5)
        assert (E[:, 0, 3, 3].min() < -0.99) == neg


def test_trained_gates_keep_the_determinant_positive():
    """Of a real delta layer in any number of loops, for its betas are below 1."""
    E = theory.effective_operators(new_model("delta", 4), IDS)
    assert (torch.linalg.det(E.double()) > 0).all()


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    assert theory.main(["--plot", str(tmp_path / "theory.png")]) == 0
    assert (tmp_path / "theory.png").read_bytes()[:4] == b"\x89PNG"
