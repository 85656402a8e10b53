"""What a trainer logs about loops: attention to the first token, directions of writing."""

import pytest
import torch

from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.mixers import MIXERS, LinearMixer
from lt2_ext.recipes import instruments

IDS = torch.randint(64, (1, 60), generator=torch.Generator().manual_seed(0))


def make(pattern, **change):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "loop_count": 3}
    sizes = {"nsa_block_size": 8, "nsa_block_count": 2, "nsa_window_size": 8, "index_topk": 8, "index_head_dim": 16}
    return LT2(LT2Config(**shape | sizes | change, layer_pattern=pattern))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_its_own(mixer):
    model = make(mixer)
    want = model(IDS)
    found = instruments.probe(model, IDS)
    names = ["first_token_mass"] if mixer == "full" else []
    names += ["write_rank"] if issubclass(MIXERS[mixer], LinearMixer) else []
    assert list(found) == names
    assert all(len(values) == 3 for values in found.values())
    assert torch.equal(model(IDS), want)  # nothing of the probe stays


def test_a_first_token_that_all_attend_to():
    """Queries of zero attend to all alike; with keys of zero but for the first token's, all to that one."""
    model = make("full,gdn,full", loop_count=2)
    torch.nn.init.zeros_(model.layers[0].mixer.q_proj.weight)
    torch.nn.init.zeros_(model.layers[2].mixer.q_proj.weight)
    uniform = sum(1 / (t + 1) for t in range(30, 60)) / 30
    assert instruments.probe(model, IDS)["first_token_mass"] == pytest.approx([uniform, uniform], rel=1e-4)

    mixer = model.layers[0].mixer
    mixer.project = _to_the_first(mixer.project)
    mass = instruments.probe(model, IDS)["first_token_mass"]
    assert mass == pytest.approx([(1 + uniform) / 2] * 2, rel=1e-3)


def test_loops_without_full_attention():
    found = instruments.probe(make("full->window:8->full"), IDS)["first_token_mass"]
    assert found[0] > 0
    assert found[1] == 0
    assert found[2] > 0


def _to_the_first(project):
    def changed(*arguments):
        q, keys = project(*arguments)
        k = keys.k.clone()
        k[:, 1:] = 0
        return 1e4 * k[:, :1].expand_as(q), keys._replace(k=k)

    return changed


def test_the_rank_of_writes_lies_between_one_and_the_number_of_loops():
    ranks = instruments.probe(make("delta,full,gdn"), IDS)["write_rank"]
    assert ranks[0] == pytest.approx(1, abs=1e-5)
    assert ranks[0] < ranks[1] < ranks[2] < 3
    equal = make("delta")
    with torch.no_grad():
        for block in equal.layers:
            block.mixer.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    assert instruments.probe(equal, IDS)["write_rank"] == pytest.approx([1, 1, 1], abs=1e-4)


def test_effective_rank_of_orthogonal_rows_is_their_number():
    rows = torch.linalg.qr(torch.randn(5, 8, 8))[0][:, :3]
    assert instruments.effective_rank(rows).item() == pytest.approx(3, abs=1e-4)
