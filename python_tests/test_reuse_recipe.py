"""The recipe that compares the modes of reuse: its recall task, what it measures, its table."""

import pytest
import torch

from lt2_ext.models import LT2
from lt2_ext.recipes import reuse


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def test_every_answer_of_recall_stands_in_the_text_once_before():
    _, (tokens, labels) = reuse.recall()
    assert tokens.shape == labels.shape == (reuse.TESTED, 2 * reuse.PAIRS * (1 + reuse.ROUNDS))
    for text, asked in zip(tokens[:8].tolist(), labels[:8].tolist(), strict=True):
        told = 2 * reuse.PAIRS
        pairs = dict(zip(text[:told:2], text[1:told:2], strict=True))
        assert len(pairs) == reuse.PAIRS
        assert set(asked[:told] + asked[told::2]) == {-100}
        assert asked[told + 1 :: 2] == text[told + 1 :: 2] == [pairs[key] for key in text[told::2]]


@torch.no_grad()
def test_decoding_measures_what_a_forward_does(monkeypatch):
    """With one loop there is nothing to hand on."""
    monkeypatch.setitem(reuse.SHAPE, "loop_count", 1)
    torch.manual_seed(0)
    model, (tokens, labels) = LT2(reuse.config(reuse.HYBRID, "none")), reuse.recall()[1]
    bits, right = reuse.measure(model, tokens[:4], labels[:4])
    assert bits > 7
    for mode in reuse.DECODED:
        model.config.state_reuse = mode
        assert reuse.measure(model, tokens[:4], labels[:4]) == (pytest.approx(bits, rel=1e-4), right)


def test_one_step_of_every_mode(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reuse, "LENGTH", 32)
    monkeypatch.setattr(reuse, "BATCH", {"text": 1, "recall": 1})
    monkeypatch.setattr(reuse, "TESTED", 64)
    monkeypatch.setattr(reuse, "TIMED", 4)
    monkeypatch.setattr(reuse, "PAIRS", 4)

    def here(jobs, steps, device, processes):  # not in processes, which would not see the patches
        return [reuse.run(job, steps, device) for job in jobs]

    monkeypatch.setattr(reuse, "run_all", here)
    out = tmp_path / "reuse.md"
    assert reuse.main(["--steps", "1", "--seeds", "7", "--context", "16", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == out.read_text().splitlines()
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ")[5:7] for line in lines[2:]}
    modes = [(p, m) for p, ms in reuse.TRAINED.items() for m in ms] + [(reuse.HYBRID, m) for m in reuse.DECODED]
    assert set(rows) == {(f"| `{pattern}`", f"`{mode}`") for pattern, mode in modes}
    of_one, of_all = (rows[f"| `{reuse.HYBRID}`", f"`{mode}`"] for mode in ("kv:first", "none"))
    assert 3 * int(of_one[0]) == int(of_all[0]) == 3 * 2 * 128 * 2  # loops, k and v, hidden_size, bytes
    assert of_one[1] == of_all[1]
