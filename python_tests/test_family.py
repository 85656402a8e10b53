"""Every preset of one mixer, at its tiny size, learns real text without a NaN."""

import math

import pytest

from lt2_ext.models.mixers import MIXERS
from lt2_ext.recipes import family, stdlib_bytes


@pytest.fixture(scope="module")
def corpus():
    return stdlib_bytes.load(windows=2)


@pytest.mark.parametrize("mixer", [*MIXERS, "gdn-dsa"])
def test_learns(mixer, corpus, threads, monkeypatch):
    threads(1)
    monkeypatch.setattr(stdlib_bytes, "LENGTH", 128)
    result = family.run(f"tiny-{mixer}", corpus, steps=30, batch=4)
    assert all(map(math.isfinite, (*result.losses, result.bits, result.largest)))
    assert sum(result.losses[-5:]) / 5 < 0.7 * result.losses[0]
    assert result.bits < 6  # of the 8 that it starts with


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_learns_for_200_steps(mixer, corpus):
    result = family.run(f"tiny-{mixer}", corpus, steps=200, batch=2)
    assert all(map(math.isfinite, result.losses))
    assert result.bits < 4


def test_the_table(corpus, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(stdlib_bytes, "load", lambda windows: corpus)
    monkeypatch.setattr(stdlib_bytes, "LENGTH", 64)
    assert family.main(["--steps", "2", "--presets", "tiny-gdn", "tiny-linear", "--out", str(tmp_path / "t.md")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "t.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    assert {row[0] for row in rows} == {"| `tiny-gdn`", "| `tiny-linear`"}
    assert float(rows[0][4]) <= float(rows[1][4])
