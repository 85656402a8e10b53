"""Files from strangers: nothing in them runs, nothing outside their folder is read, sizes are checked before memory is
taken, and what is wrong is one sentence."""

from __future__ import annotations

import json
import os
import pickle
import random
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.presets import PRESETS, preset
from lt2_ext.recipes import checkpoint, files, generate, plan, settings, shards, text, train
from lt2_ext.recipes.files import UserError

TINY = [
    "out=run", "model=tiny", "model.hidden_size=32", "model.num_attention_heads=2", "data.path=book.txt",
    "data.sequence_length=32", "train.steps=2", "train.batch_size=1", "train.grad_accumulation=1", "train.device=cpu",
]  # fmt: skip


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text and a finished run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("book.txt").write_text("loop state delta rule gate " * 40)
        assert train.main(TINY) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """The checkpoint of a copy of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    os.system(f"cp -r {trained}/. .")
    yield checkpoint.find(Path("run/checkpoints"))[-1]
    assert not Path("pwned").exists()


def refused(capsys, message, command=train.main, arguments=tuple(TINY)):
    assert command(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert len(lines[0]) < 1000


@contextmanager
def a_sentence(kind=UserError):
    """Nothing happens, or an error of this kind with a short message; which of them is in the list."""
    outcome = []
    try:
        yield outcome
        outcome.append("taken")
    except kind as e:
        message = str(e)
        outcome.append("refused")
    if outcome == ["refused"]:
        assert "\n" not in message
        assert len(message) < 2000


def forge(folder):
    """Make ``complete.json`` agree with the files, as an attacker would."""
    names = [p.name for p in folder.iterdir() if p.name != checkpoint.COMPLETE]
    entries = {n: {"bytes": (folder / n).stat().st_size, "crc32": files.checksum(folder / n)} for n in names}
    marker = json.loads((folder / checkpoint.COMPLETE).read_text())
    (folder / checkpoint.COMPLETE).write_text(json.dumps({**marker, "files": entries}))


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_the_bomb_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("pwned").exists()


class TestTrainerState:
    @pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, 2))])
    @pytest.mark.parametrize("value", [Bomb(), {"step": 2, "rng": Bomb()}])
    def test_pickle_bomb(self, run, write, value, capsys):
        write(value, run / checkpoint.TRAINER)
        forge(run)
        refused(capsys, "trainer.pt is refused: it must hold tensors and plain values only")

    def test_it_is_readable_with_weights_only(self, run):
        state = torch.load(run / checkpoint.TRAINER, weights_only=True)
        assert set(state) == {"step", "position", "optimizer", "rng", "data"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.update(step=1), "step and position must fit train.steps and batch_size"),
            (lambda s: s.update(step=-1, position=-1), "step and position must fit"),
            (lambda s: s.update(step=3, position=3), "step and position must fit"),
            (lambda s: s.update(step="2"), "step and position must fit"),
            (lambda s: s.update(data=7), "was trained on other data than book.txt"),
            (lambda s: s.pop("optimizer"), "trainer.pt does not fit the model"),
            (lambda s: s.update(optimizer=[]), "trainer.pt does not fit the model"),
            (lambda s: s["optimizer"]["state"].pop(0), "trainer.pt does not fit the model (KeyError: 0)"),
            (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg 0 must be torch.float32"),
            (lambda s: s["optimizer"].update(param_groups=[]), "trainer.pt does not fit the model"),
            (lambda s: s.pop("rng"), "rng must be that of cpu"),
            (lambda s: s["rng"].update(cpu=torch.zeros(5, dtype=torch.uint8)), "rng must be that of cpu"),
        ],
    )
    def test_hostile_values(self, run, change, message, capsys):
        state = checkpoint.read_trainer(run)
        change(state)
        torch.save(state, run / checkpoint.TRAINER)
        forge(run)
        refused(capsys, message)

    def test_not_a_dictionary(self, run, capsys):
        torch.save([1], run / checkpoint.TRAINER)
        forge(run)
        refused(capsys, "trainer.pt must hold a dictionary, got 'list'")

    @pytest.mark.filterwarnings("ignore")  # of torch's reader about what it finds
    def test_fuzz(self, run):
        """Bytes changed or cut at random: the state or a sentence, never another error."""
        path = run / checkpoint.TRAINER
        whole = path.read_bytes()
        outcomes = set()
        for seed in range(200):
            rng = random.Random(seed)
            data = bytearray(whole)
            for _ in range(rng.choice([1, 4, 64])):
                data[rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(4000)] = rng.randrange(256)
            path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
            with a_sentence() as outcome:
                checkpoint.read_trainer(run)
            outcomes.update(outcome)
        assert outcomes == {"taken", "refused"}


class TestCheckpoint:
    @pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json", "lt2_tokenizer.json"])
    def test_truncated_changed_missing(self, run, name, capsys):
        data = (run / name).read_bytes()
        (run / name).write_bytes(data[:-1])
        refused(capsys, f"{name} is truncated or was changed: bytes {len(data) - 1}")
        (run / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused(capsys, f"{name} is truncated or was changed")
        (run / name).unlink()
        refused(capsys, f"{name} is missing; remove {run} to go on from the checkpoint before it")

    @pytest.mark.parametrize("name", ["../../../book.txt", "/etc/passwd", "..", "a/b", ""])
    def test_path_traversal(self, run, name, capsys):
        edit_json(run / checkpoint.COMPLETE, lambda v: v["files"].update({name: {"bytes": 1, "crc32": 1}}))
        refused(capsys, "which is not a plain file name")

    def test_link(self, run, capsys):
        secret = (run / checkpoint.TRAINER).rename("secret")
        (run / checkpoint.TRAINER).symlink_to(secret.resolve())
        refused(capsys, "trainer.pt must be a regular file, not a link or a folder")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.update(format="x"), "must be of the format 'lt2 checkpoint 1'"),
            (lambda v: v.update(files=[]), "must be of the format"),
            (lambda v: v["files"].pop("trainer.pt"), "must list trainer.pt"),
            (lambda v: v["files"].update({"trainer.pt": [1]}), "trainer.pt is truncated or was changed"),
        ],
    )
    def test_hostile_marker(self, run, change, message, capsys):
        edit_json(run / checkpoint.COMPLETE, change)
        refused(capsys, message)


class TestModel:
    @pytest.mark.parametrize("command", [lambda a: generate.main(["run", "x"]), train.main])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"loop_count": 10**9}, "loop_count must be an integer in 1..8, got 1000000000"),
            ({"hidden_size": 2**31}, "hidden_size must be an integer in 1..131072"),
            ({"vocab_size": -5}, "vocab_size must be an integer in 1"),
            ({"vocab_size": 2**24}, "must have shape [16777216, 32], got [258, 32]"),
            ({"num_hidden_layers": 1024}, "must have shape"),
            ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
            ({"layer_pattern": "os.system"}, "unknown mixer 'os.system'"),
            ({"layer_pattern": ["gdn"]}, "layer_pattern must be a string"),
            ({"intermediate_size": "64"}, "intermediate_size must be an integer"),
            ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ],
    )
    def test_hostile_config(self, run, command, change, message, capsys):
        """Before memory is taken: the sizes are compared with limits and with the file of the weights."""
        edit_json(run / "config.json", lambda v: v.update(change))
        forge(run)
        refused(capsys, message, command)

    @pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '{"vocab_size": 1}', '"x"', "\xff"])
    def test_config_that_is_none(self, run, content, capsys):
        (run / "config.json").write_text(content, encoding="latin-1")
        forge(run)
        refused(capsys, "config.json" if content[1:] != '"vocab_size": 1}' else "missing", generate.main, ["run"])

    @pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, 2))])
    def test_pickle_bomb_for_weights(self, run, write, capsys):
        write({"embed_tokens.weight": Bomb()}, run / "model.safetensors")
        forge(run)
        refused(capsys, "is not a valid safetensors file")
        refused(capsys, "is not a valid safetensors file", generate.main, ["run"])

    def test_a_pickle_is_never_read_instead(self, run, capsys):
        (run / "model.safetensors").unlink()
        torch.save({"embed_tokens.weight": Bomb()}, run / "pytorch_model.bin")
        refused(capsys, "weights are read from safetensors only", generate.main, ["run"])

    def test_header_that_promises_too_much(self, run, capsys):
        header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        (run / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        refused(capsys, "is not a valid safetensors file", generate.main, ["run"])
        (run / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + header)
        refused(capsys, "is not a valid safetensors file", generate.main, ["run"])

    def test_a_state_that_cannot_be_allocated(self, run, capsys, monkeypatch):
        """No memory is lost: a smaller state is made afterwards."""
        model = LT2.load(run)
        with pytest.raises(RuntimeError) as e:
            model.new_state(1, 2**46)
        assert files.out_of_memory(e.value)
        model.generate(torch.tensor([[1]]), 2)
        arguments = ["run", "--max-new-tokens"]
        refused(capsys, "max_new_tokens must be <= 4294967296, got 10", generate.main, [*arguments, str(10**30)])
        monkeypatch.setattr(generate, "MOST_TOKENS", 2**50)
        refused(capsys, "out of memory: lower --max-new-tokens", generate.main, [*arguments, str(2**46)])

    def test_a_model_larger_than_the_memory_is_not_built(self, run, capsys, monkeypatch):
        def fail(*args):
            raise AssertionError("built")

        monkeypatch.setattr(LT2, "to", fail)
        sizes = ["model.hidden_size=131072", "model.num_attention_heads=1024", "model.num_hidden_layers=2"]
        refused(capsys, "training this model needs at least", train.main, [*TINY, "out=big", *sizes])

    def test_plan_allocates_nothing(self, capsys):
        sizes = ["hidden_size=131072", "num_attention_heads=1024", "vocab_size=16777216", "num_hidden_layers=100"]
        assert plan.main(["tiny", *sizes, "--context", str(2**30)]) == 0
        assert "TB in bf16" in capsys.readouterr().out


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FUZZ = hypothesis.settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


class TestFuzz:
    """Values at random in every place of a file: what it says, or one sentence; hypothesis prints what reproduces."""

    @FUZZ
    @hypothesis.given(st.sampled_from(settings.keys_of(settings.Run)) | st.text(max_size=12), JSON)
    def test_settings(self, key, value):
        with a_sentence():
            read = settings.read([f"{key}={json.dumps(value)}"])
            settings.model_config(read.model, 300)

    @FUZZ
    @hypothesis.given(st.dictionaries(st.sampled_from([*PRESETS["tiny"], "norm_placement", "x"]), JSON, max_size=4))
    def test_config(self, changes):
        sizes = {**preset("tiny").to_dict(), **changes}
        with a_sentence(ValueError):
            LT2Config.from_dict(sizes)

    @FUZZ
    @hypothesis.given(st.data())
    def test_shard_index(self, trained, data):
        folder = trained / "run" / "data"
        whole = (folder / shards.INDEX).read_text()
        index = json.loads(whole)
        entry = index["splits"]["train"][0]
        place = data.draw(st.sampled_from([index, index["splits"], entry]))
        place[data.draw(st.sampled_from([*place]))] = data.draw(JSON)
        (folder / shards.INDEX).write_text(json.dumps(index))
        with a_sentence():
            split = shards.open_shards(folder)["train"]
            split.read(0, len(split))
        (folder / shards.INDEX).write_text(whole)

    @FUZZ
    @hypothesis.given(st.sampled_from(["kind", "vocab_size", "bos", "eos"]), JSON)
    def test_tokenizer(self, tmp_path, key, value):
        good = {"kind": "bytes", "vocab_size": 258, "bos": 256, "eos": 257}
        (tmp_path / text.SETTINGS).write_text(json.dumps({**good, key: value}))
        with a_sentence():
            assert text.load(tmp_path).vocab_size == 258
