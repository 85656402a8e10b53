"""The recipe that measures what an indexer catches, at a tiny size."""

import pytest
import torch

pytest.importorskip("matplotlib")

from lt2_ext.models.mixers import SparseAttention
from lt2_ext.recipes import selection, stdlib_bytes

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "index_head_dim": 16, "loop_count": 2}


@pytest.fixture
def corpus(tmp_path):
    for i in range(30):
        lines = [f"def function_{i}_{j}(self, x):\n    return self.value_{j % 7} + x * {j}\n" for j in range(60)]
        (tmp_path / f"module_{i}.py").write_text("".join(lines))
    return stdlib_bytes.load(tmp_path, windows=2)


def test_all_that_is_measured():
    model, tokens = stdlib_bytes.new_model(**selection.SPARSE | SMALL), torch.randint(256, (2, 90))
    measured = selection.measure(model, tokens)
    assert len(measured.caught) == 2
    assert all(0 < share < 1 for share in (*measured.caught, measured.random, measured.newest))
    assert [measured.overlap[i][i] for i in range(2)] == [1, 1]
    assert measured.overlap[0][1] == pytest.approx(measured.overlap[1][0])
    assert 0 < measured.overlap[0][1] < 1
    shared = stdlib_bytes.new_model(**selection.SPARSE | SMALL | {"state_reuse": "index:share"})
    assert selection.measure(shared, tokens).overlap == [[1, 1], [1, 1]]


def test_the_best_keys_catch_all(monkeypatch):
    def best(self, index, k, tokens):
        q, (k, *_) = self.project(seen[-1], tokens, None, None)
        return selection.attention(q, k).topk(self.topk).indices.int()

    seen = []
    model, tokens = stdlib_bytes.new_model(**selection.SPARSE | SMALL), torch.randint(256, (2, 90))
    model.layers[1].mixer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    monkeypatch.setattr(SparseAttention, "select", best)
    assert selection.measure(model, tokens).caught == pytest.approx([1, 1])


def test_a_trained_indexer_catches_more_than_a_random_one(corpus, threads):
    threads(1)
    model = stdlib_bytes.new_model(**selection.SPARSE | SMALL)
    history = stdlib_bytes.train(model, corpus.train, 0.0, lambda step: None, steps=100)
    assert history[-1].loss < 0.7 * history[0].loss
    measured = selection.measure(model, corpus.held_out[:, :200].long())
    assert min(measured.caught) > measured.random + 0.05


def test_its_report(corpus, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(stdlib_bytes, "load", lambda windows: corpus)
    monkeypatch.setattr(stdlib_bytes, "LENGTH", 64)
    for changes in selection.RUNS.values():
        monkeypatch.setitem(changes, "hidden_size", 32)
    assert selection.main(["--steps", "3", "--plot", str(tmp_path / "plot.png")]) == 0
    out = capsys.readouterr().out
    assert out.count("bits per byte of held-out files") == 4
    assert out.count("attention on its 32 keys") == 3
    assert out.count("loops 3 and 2") == 3
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
