"""``lt2 demo``: its task, its data, its numbers, and one short run."""

from __future__ import annotations

import gzip
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from lt2_ext import cli
from lt2_ext.models import LT2
from lt2_ext.recipes import demo_facts, state_tracking, stdlib_bytes


@pytest.mark.parametrize("n", [2, 3, 4])
def test_product_table_is_a_group(n):
    elements, table = state_tracking.symmetric_group(n)
    order = math.factorial(n)
    assert len(set(elements)) == order
    everything = torch.arange(order)
    assert torch.equal(table[0], everything)
    assert torch.equal(table[:, 0], everything)
    assert all(len(set(row)) == order for row in table.tolist() + table.T.tolist())
    a, b, c = torch.meshgrid(everything, everything, everything, indexing="ij")
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])


def test_labels_are_the_products():
    elements, _ = state_tracking.symmetric_group(3)
    words, products = state_tracking.sample_words(5, 9, torch.Generator().manual_seed(0))
    for word, labels in zip(words.tolist(), products.tolist(), strict=True):
        order = (0, 1, 2)
        for letter, label in zip(word, labels, strict=True):
            order = tuple(order[i] for i in state_tracking.GENERATORS[letter])
            assert elements[label] == order


def test_the_task_has_no_answer_without_the_state():
    """Every product is about as likely: counting letters does not help."""
    _, products = state_tracking.sample_words(6000, 12, torch.Generator().manual_seed(0))
    shares = torch.bincount(products[:, -1], minlength=6) / 6000
    assert shares.max() < 0.25


def test_held_out_files_are_not_trained_on(tmp_path):
    for i in range(60):
        (tmp_path / f"m{i}.py").write_bytes(bytes([65 + i]) * 2 * stdlib_bytes.WINDOW)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_bytes(b"!" * 9000)
    corpus = stdlib_bytes.load(tmp_path)
    trained, held_out = set(corpus.train.tolist()), set(corpus.held_out.flatten().tolist())
    assert not trained & held_out
    assert corpus.files == (len(trained), len(held_out))
    assert len(trained) + len(held_out) == 60
    assert ord("!") not in trained | held_out
    with pytest.raises(SystemExit, match="too few Python sources under"):
        stdlib_bytes.load(tmp_path / "test")


def test_bits_per_byte():
    """A model that knows nothing needs 8 bits; one that doubts between two bytes needs 1, after the first byte."""
    windows = torch.randint(2, (3, 16), dtype=torch.uint8)
    assert stdlib_bytes.bits_per_byte(lambda x: torch.zeros(*x.shape, 256), windows) == pytest.approx(8)
    doubt = torch.full((256,), -100.0).index_fill(0, torch.tensor([0, 1]), 0.0)
    expected = (8 + 15) / 16
    assert stdlib_bytes.bits_per_byte(lambda x: doubt.expand(*x.shape, 256), windows) == pytest.approx(expected)


def test_gzip_bits_per_byte():
    text = b"for x in range(10):\n    print(x)\n" * 4
    size = len(gzip.compress(text, 9, mtime=0))
    windows = stdlib_bytes.as_bytes(text).expand(2, -1)
    assert stdlib_bytes.gzip_bits_per_byte(windows) == pytest.approx(8 * size / len(text))


def test_operators_equal_plain_pytorch():
    ticks = []
    for result in demo_facts.compare_operators(0.0, lambda: ticks.append(1)):
        assert result.error < 1e-4, result
        assert result.ratio > 0
    assert len(ticks) == len(demo_facts.CASES)


def test_streaming_fact_sees_a_difference(monkeypatch):
    assert max(demo_facts.streaming_differences(lambda: None).values()) < 1e-4
    forward = LT2.forward

    def forgetful(self, input_ids, state=None, **kw):
        if state is not None:
            state.reset()
        return forward(self, input_ids, state=state, **kw)

    monkeypatch.setattr(LT2, "forward", forgetful)
    assert min(demo_facts.streaming_differences(lambda: None).values()) > 1e-2


def test_short_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_facts, "CONTEXTS", (1024, 2048))
    plot = tmp_path / "demo.png"
    assert cli.main(["demo", "--seconds", "3", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    for text in ("1 State tracking", "2 Streaming", "3 Decoding", "4 Operators", "bits per byte; gzip", "not quality"):
        assert text in out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("args", [["--seconds", "0"], ["--plot", "/no/such/folder/demo.png"]])
def test_rejected_options(args, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *args])
    assert stop.value.code == 2
    assert f"{args[0]} must be" in capsys.readouterr().err
