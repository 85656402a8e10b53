"""``lt2 plan`` and the presets: numbers against those published and against torch's own counts."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("tqdm")

from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.mixers import MIXERS
from lt2_ext.models.presets import PRESETS, preset
from lt2_ext.recipes import checkpoint, plan
from lt2_ext.recipes.trainer import count_parameters

SIZES = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "loop_count": 2}
OURO_EXIT_GATE = 2048 + 1  # counted in its publication, and no part of LT2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lt2-0.6b-gdn", 445_775_120),
        ("ouro-1.4b", 1_434_652_673 - OURO_EXIT_GATE),
        ("ouro-2.6b", 2_667_974_657 - OURO_EXIT_GATE),
    ],
)
def test_published_counts(name, parameters):
    assert count_parameters(preset(name)) == parameters


@pytest.mark.parametrize(
    ("name", "changes", "billions"),
    [
        ("lt2-0.6b-full", {}, "0.452"),
        ("lt2-0.6b-full", {"tie_word_embeddings": False}, "0.584"),
        ("lt2-1.3b-full", {}, "1.547"),
        ("lt2-1.3b-gdn", {}, "1.579"),
        ("lt2-1.3b-full-gdn", {}, "1.486"),
        ("lt2-1.3b-full-gdn", {"attn_output_gate": True}, "1.503"),
    ],
)
def test_published_digits(name, changes, billions):
    count = count_parameters(preset(name, **changes))
    assert abs(count / 1e9 - float(billions)) < 6e-4


@pytest.mark.parametrize("size", ["0.6b", "1.3b"])
def test_presets_of_one_mixer_have_the_size_of_that_of_attention(size):
    published = count_parameters(preset(f"lt2-{size}-full"))
    found = [mixer for mixer in MIXERS if f"lt2-{size}-{mixer}" in PRESETS]
    assert found == list(MIXERS)
    for mixer in found:
        assert abs(count_parameters(preset(f"lt2-{size}-{mixer}")) / published - 1) < 0.025, mixer
        assert set(preset(f"lt2-{size}-{mixer}").layer_types) == {mixer}


@pytest.mark.parametrize("name", ["lt2-1.3b-bookend", "lt2-1.3b-front", "lt2-1.3b-back"])
def test_hybrids_differ_in_the_order_of_their_layers_only(name):
    types = preset(name).layer_types
    assert sorted(types) == sorted(preset("lt2-1.3b-full-gdn").layer_types)
    assert count_parameters(preset(name)) == count_parameters(preset("lt2-1.3b-full-gdn"))


def test_the_hybrid_has_17_gdn_and_4_full_layers():
    types = preset("lt2-1.3b-full-gdn").layer_types
    assert (types.count("gdn"), types.count("full"), len(types)) == (17, 4, 21)
    assert types[-1] == "gdn"


def test_every_preset_is_a_model():
    for name in PRESETS:
        shallow = preset(name, num_hidden_layers=2, layer_pattern=preset(name).layer_types[0])
        assert 0 < count_parameters(shallow) < count_parameters(preset(name))


@pytest.mark.parametrize("pattern", ["full", "gdn", "gdn,full,gdn"])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(pattern, tied):
    """torch counts matrix products, and attention as if every token saw all; our operators it does not see."""
    model, length = LT2(LT2Config(**SIZES, layer_pattern=pattern, tie_word_embeddings=tied)), 12
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, length, dtype=torch.int64))
    hidden = 0
    for block in model.layers:
        if (m := block.mixer).__class__.__name__ == "GatedDeltaNet":
            hidden += 2 * 2 * m.conv_weight.numel() + 2 * plan.GDN_FLOPS * m.value_heads * m.key_dim * m.value_dim
    assert plan.forward_flops(model, length) == counter.get_total_flops() // length + hidden


def test_flops_of_a_selection():
    shape, sizes = {"layer_pattern": "dsa", "index_topk": 8, "loop_count": 2}, (2 * 3, 4 * 3 * SIZES["hidden_size"])
    full, sparse = (LT2(LT2Config(**SIZES | shape | {"layer_pattern": p})) for p in ("full", "dsa"))
    shared = LT2(LT2Config(**SIZES | shape | {"state_reuse": "index:share"}))
    own = sum(m.weight.numel() for n, m in sparse.layers[0].named_modules() if ".index_" in n)
    heads, dim = sparse.config.index_n_heads, sparse.config.index_head_dim
    index = sizes[0] * (2 * own + 2 * heads * dim * 100)
    assert plan.forward_flops(sparse, 100) - plan.forward_flops(full, 100) == index - 2 * sizes[1] * (100 - 8)
    assert plan.forward_flops(sparse, 100) - plan.forward_flops(shared, 100) == index // 2


def test_training_flops_average_over_the_sequence():
    for pattern in ("full", "window:5", "gdn", "dsa"):
        model = LT2(LT2Config(**SIZES, layer_pattern=pattern, index_topk=4))
        mean = sum(plan.forward_flops(model, t) for t in range(1, 13)) / 12
        assert plan.train_flops(model, 12) == pytest.approx(3 * mean, rel=1e-9), pattern


@pytest.mark.parametrize("pattern", ["gdn", "gdn,full,window:5", "full->window:7", "gdn,dsa,dsa"])
def test_state_is_what_a_model_allocates(pattern):
    config = LT2Config(**SIZES, layer_pattern=pattern)
    with torch.device("meta"):
        costs = plan.state_costs(LT2(config).to(torch.bfloat16).new_state(1, 40))
    state = LT2(config).to(torch.bfloat16).new_state(1, 40)
    assert sum(c.nbytes * c.count for c in costs) == state.nbytes
    assert sum(c.count for c in costs) == 6
    if "->" in pattern:
        assert [(c.mixer, c.loops, c.layers) for c in costs] == [("full", "1", 3), ("window:7", "2", 3)]


def test_what_reuse_spares_in_a_decode_step():
    """No product with the projections of loops 2 and 3; their keys are read all the same."""
    shape, bytes_of = {"layer_pattern": "dsa", "loop_count": 3, "index_topk": 10}, 2
    plain, reused = (
        LT2(LT2Config(**SIZES | shape, state_reuse=reuse)).to(torch.bfloat16)
        for reuse in ("none", "kv:first,index:share")
    )
    names = (".k_proj.", ".v_proj.", ".index_q_proj.", ".index_k_proj.", ".index_weights_proj.")
    spared = 2 * sum(p.numel() for n, p in plain.named_parameters() if any(name in n for name in names))
    layers, index = SIZES["num_hidden_layers"], plain.config.index_head_dim
    costs = [plan.decode_bytes(model, 100) for model in (plain, reused)]
    assert costs[0][0] - costs[1][0] == bytes_of * spared
    assert costs[0][1] - costs[1][1] == 2 * layers * bytes_of * 100 * index
    flops = [plan.forward_flops(model, 100) for model in (plain, reused)]
    assert flops[0] - flops[1] == 2 * spared + 2 * layers * 2 * plain.config.index_n_heads * index * 100


def test_output(capsys):
    assert plan.main(["lt2-1.3b-full-gdn", "--context", "32768"]) == 0
    out = capsys.readouterr().out
    assert "parameters 1,485,891,296: " in out
    assert "  gdn           1-4         17               1.23 MB     83.6 MB\n" in out
    assert "  full          1-4          4                268 MB     4.29 GB\n" in out
    assert "  one allocation, 4.38 GB a sequence: matrix 80.2 MB, conv 3.34 MB, k 2.15 GB, v 2.15 GB\n" in out
    assert "segments" not in out
    assert plan.main(["lt2-1.3b-gdn", "model.state_reuse=gdn:segment:512"]) == 0  # no keys: a quarter of the matrices
    out = capsys.readouterr().out
    assert "  one allocation, 212 MB a sequence: matrix 208 MB, conv 4.33 MB\n" in out
    assert "  a snapshot between segments has 56.2 MB of it: one matrix for all loops\n" in out


def test_sources_of_a_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("yaml")

    def first_line(*args):
        assert plan.main(list(args)) == 0
        return capsys.readouterr().out

    whole = first_line("tiny").partition(": ")[2]
    LT2(preset("tiny")).save("saved")
    assert first_line("saved").partition(": ")[2] == whole
    assert first_line("saved/config.json").partition(": ")[2] == whole
    assert "3 loops" in first_line("tiny", "loop_count=3")
    assert "3 loops" in first_line("saved", "model.loop_count=3")
    (tmp_path / "run.yaml").write_text("model: small\ndata: {path: a.txt, sequence_length: 100}\ntrain: {steps: 10}\n")
    out = first_line("run.yaml", "train.batch_size=2", "train.grad_accumulation=1")
    assert "vocabulary 258" in out
    assert "the run: 10 steps x 200 tokens = 2.00 k tokens" in out
    run = tmp_path / "run" / "checkpoints" / "step-000000007"
    run.parent.mkdir(parents=True)
    (tmp_path / "saved").rename(run)
    (run / checkpoint.COMPLETE).write_text("{}")
    assert first_line("run").partition(": ")[2] == whole


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tinny"], "there is no file or preset tinny; did you mean 'tiny'?"),
        (["8b"], "there is no file or preset 8b; presets: tiny, small"),
        (["tiny", "hiden_size=3"], "model: LT2Config: unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        (["tiny", "--context", "0"], r"--context must be in 1..1073741824, got 0"),
        (["bad.json"], "bad.json is not valid JSON"),
        (["hostile.json"], "model: LT2Config: loop_count must be an integer in 1..8, got 1000000000"),
        (["."], ". holds neither a saved model (config.json) nor a checkpoint of lt2 train"),
        (["no.yaml"], "there is no file no.yaml"),
    ],
)
def test_mistakes_are_one_sentence(args, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "hostile.json").write_text(json.dumps({**PRESETS["tiny"], "loop_count": 10**9}))
    assert plan.main(args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
