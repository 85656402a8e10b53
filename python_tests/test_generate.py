"""``lt2 generate``: text from a saved model."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from lt2_ext.models import LT2
from lt2_ext.models.presets import preset
from lt2_ext.recipes import generate, text


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LT2(preset("tiny"))


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model")
    text.ByteTokenizer().save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("options", [(0.0, None, None), (0.7, 20, None), (1.3, None, 0.9)])
def test_stream_is_generate(model, options):
    ids = [256, 65, 66]
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    whole = model.generate(torch.tensor([ids]), 12, *options, generator=first)[0, 3:].tolist()
    assert list(generate.stream(model, ids, 12, *options, second)) == whole


def test_text_comes_as_it_is_made(folder, model, capsys, monkeypatch):
    """The prompt first, each token when it is known, and no control characters to the terminal."""
    written = []
    tokens = [ord("a"), 27, ord("\n"), 0xC3, 0xA9, text.ByteTokenizer.eos, ord("z")]

    def stream(*args):
        for token in tokens:
            written.append(capsys.readouterr().out)
            yield token

    monkeypatch.setattr(generate, "stream", stream)
    assert generate.main([folder, "pro\x1bmpt"]) == 0
    assert written == ["pro\ufffdmpt", "a", "\ufffd", "\n", "", "é"]
    assert capsys.readouterr().out == "\n"


def test_seed(folder, capsys):
    outs = []
    for seed in ("1", "1", "2"):
        assert generate.main([folder, "x", "--max-new-tokens", "30", "--seed", seed]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert outs[0].startswith("x")


def test_standard_input_and_interrupt(folder, capsys, monkeypatch):
    def stream(model, ids, *args):
        assert ids == [256, *b"from a pipe"]
        yield ord("!")
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    monkeypatch.setattr(generate, "stream", stream)
    assert generate.main([folder, "-"]) == 0
    assert capsys.readouterr().out == "from a pipe!\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "there is no folder nothing"),
        (["."], ". holds neither a saved model (config.json) nor a checkpoint of lt2 train"),
        (["model", "--max-new-tokens", "-1"], "max_new_tokens must be >= 0, got -1"),
        (["model", "--temperature", "nan"], "temperature must"),
        (["model", "--temperature", "inf"], "temperature must be a finite number, got inf"),
        (["model", "--top-p", "2"], "top_p must be in (0, 1] or None, got 2.0"),
        (["model", "--device", "tpu9"], "--device must be a device of this machine, got 'tpu9'"),
        (["weights-only"], "there is no weights-only/lt2_tokenizer.json"),
        (["no-weights"], "no no-weights/model.safetensors; weights are read from safetensors only"),
    ],
)
def test_mistakes_are_one_sentence(args, message, folder, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model.save("weights-only")
    model.save("no-weights")
    (tmp_path / "no-weights" / "model.safetensors").rename(tmp_path / "no-weights" / "pytorch_model.bin")
    assert generate.main(args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lt2 generate: ")
    assert message in lines[0]
