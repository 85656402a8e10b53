"""``lt2 train``: what a step computes, what a run leaves behind, and that no crash changes it."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file

from lt2_ext.models import LT2, LT2Config
from lt2_ext.recipes import checkpoint, files, instruments, runlog, settings, shards, text, train
from lt2_ext.recipes.files import UserError
from lt2_ext.recipes.trainer import Trainer

TINY = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "model.layer_pattern=gdn,full",
    "model.loop_count=2",
    "data.path=book.txt",
    "data.held_out=0.1",
    "data.sequence_length=32",
    "train.steps=12",
    "train.batch_size=2",
    "train.grad_accumulation=2",
    "train.checkpoint_every=2",
    "train.eval_every=5",
    "train.eval_rows=4",
    "train.device=cpu",
    "optimizer.lr=1e-2",
    "model.preset=null",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = random.Random(0).choices(["loop", "state", "delta", "rule", "gate"], k=1500)
    Path("book.txt").write_text(" ".join(words))
    return tmp_path


def new_trainer(*changes, out="run"):
    run = settings.read([*TINY, f"out={out}", *changes])
    train.resolve(run)
    data = train.tokens_of(run)
    tokenizer = text.load(data)
    config = settings.model_config(run.model, tokenizer.vocab_size)
    return Trainer(run, config, shards.open_shards(data), tokenizer, files.checksum(data / shards.INDEX))


def contents(out):
    """All that a run ends with: weights, trainer state, and the log without times."""
    last = checkpoint.find(Path(out) / "checkpoints")[-1]
    log = [{k: v for k, v in r.items() if k != "tokens/s"} for r in runlog.read(Path(out) / "log.jsonl")]
    return load_file(last / "model.safetensors"), checkpoint.read_trainer(last), log


def assert_equal(a, b):
    """Bitwise, through dictionaries and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


class TestRun:
    def test_what_it_leaves(self, folder, capsys):
        assert train.main([*TINY, "out=run", "train.steps=60", "train.checkpoint_every=50"]) == 0
        out = capsys.readouterr().out
        assert "layer_pattern: gdn,full" in out
        assert "done: run/checkpoints/step-000000060" in out
        assert Path("run/loss.png").read_bytes()[:4] == b"\x89PNG"
        assert [p.name for p in checkpoint.find(Path("run/checkpoints"))] == ["step-000000050", "step-000000060"]
        records = runlog.read(Path("run/log.jsonl"))
        assert [r["step"] for r in records] == list(range(1, 61))
        assert records[-1]["loss"] < 0.75 * records[0]["loss"]
        assert records[-1]["held_out_loss"] < 0.75 * math.log(258)
        assert records[-1]["tokens"] == 60 * 128
        assert set(records[0]["grad_norms"]) == {"gdn", "full", "mlp", "norm", "embed_tokens", "rho"}
        assert len(records[0]["residual_rms"]) == 2
        assert all(r["tokens/s"] > 0 for r in records)
        page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
        assert all(f"`{field}`" in page for field in records[-1])
        model = LT2.load(checkpoint.find(Path("run/checkpoints"))[-1])
        assert model.config.vocab_size == 258

    def test_an_indexer_is_trained_and_has_a_loss_of_its_own(self, folder):
        sparse = ["model.layer_pattern=gdn,dsa", "model.index_topk=4", "train.dense_warmup_steps=20", "train.steps=60"]
        assert train.main([*TINY, *sparse, "out=run"]) == 0
        records = runlog.read(Path("run/log.jsonl"))
        assert records[-1]["loss"] < 0.75 * records[0]["loss"]
        losses = [r["index_loss"] for r in records]
        assert losses[19] < losses[0]
        trainer = new_trainer(*sparse, "train.dense_warmup_steps=1")
        for dense in (True, False):
            trainer.train_step(watch=False)
            assert trainer.model.dense_warmup == dense
        assert math.log(258) * 0.9 < records[0]["loss"] < math.log(258) * 1.3  # without it

    def test_transformers_reads_a_checkpoint(self, folder):
        transformers = pytest.importorskip("transformers")
        import lt2_ext.models.hf  # noqa: F401

        assert train.main([*TINY, "out=run", "train.steps=2"]) == 0
        last = checkpoint.find(Path("run/checkpoints"))[-1]
        tokens = torch.arange(12)[None]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(last)
        with torch.no_grad():
            assert torch.equal(theirs(tokens).logits, LT2.load(last)(tokens))

    def test_its_settings_are_a_settings_file(self, folder):
        assert train.main([*TINY, "out=run"]) == 0
        saved = settings.read(["run/settings.yaml"])
        assert saved.train.dtype == "fp32"
        assert saved.optimizer.warmup_steps == 1
        assert train.main(["run/settings.yaml", "out=again"]) == 0
        assert_equal(contents("again"), contents("run"))

    def test_prepared_tokens_and_isolated_documents(self, folder):
        assert train.main([*TINY, "out=a", "train.steps=2"]) == 0
        assert train.main([*TINY, "out=b", "train.steps=2", "data.path=a/data", "data.isolate_documents=true"]) == 0
        assert train.main([*TINY, "out=c", "train.steps=2", "train.dtype=bf16"]) == 0
        weights = [contents(out)[0]["embed_tokens.weight"] for out in "abc"]
        assert not torch.equal(weights[0], weights[2])
        assert all(w.dtype == torch.float32 for w in weights)

    def test_bpe(self, folder):
        pytest.importorskip("tokenizers")
        options = ["train.steps=1", "data.tokenizer=bpe", "data.vocab_size=300", "data.sequence_length=16"]
        assert train.main([*TINY, "out=run", *options]) == 0
        last = checkpoint.find(Path("run/checkpoints"))[-1]
        assert text.load(last).kind == "bpe"
        assert LT2.load(last).config.vocab_size == text.load(last).vocab_size


class TestStep:
    def test_accumulation_is_one_large_batch(self, folder):
        """Also when documents end inside the rows, so that micro-batches have different numbers of targets."""
        Path("many").mkdir()
        rng = random.Random(0)
        for i in range(40):
            Path("many", f"{i}.txt").write_text("ab" * rng.choice([1, 2, 3, 30]))
        both = []
        for shape in (("train.batch_size=4", "train.grad_accumulation=1"), ()):
            options = ["data.path=many", "data.isolate_documents=true", "optimizer.clip=0", *shape]
            trainer = new_trainer(*options, "train.seed=3", out=f"run{len(both)}")
            parts = [trainer.rows.batch(i, 2, isolate=True).targets for i in (0, 2)]
            assert parts[0] != parts[1]
            record = trainer.train_step(watch=True)
            both.append((record, dict(trainer.model.named_parameters())))
        (one, _), (two, _) = both
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)

    def test_each_step_reads_the_next_rows(self, folder, monkeypatch):
        trainer, read = new_trainer(), []
        batch = trainer.rows.batch
        monkeypatch.setattr(trainer.rows, "batch", lambda at, n, isolate: read.append((at, n)) or batch(at, n, isolate))
        for _ in range(2):
            trainer.train_step(watch=False)
        assert read == [(0, 2), (2, 2), (4, 2), (6, 2)]

    def test_learning_rate(self, folder):
        trainer = new_trainer("train.steps=10", "optimizer.warmup_steps=4", "optimizer.lr=1", "optimizer.final_lr=0.5")
        rates = []
        for trainer.step in range(10):
            rates.append(trainer.learning_rate())
        assert rates[:4] == [0.25, 0.5, 0.75, 1]
        assert rates[6] == pytest.approx(0.75)
        assert rates[9] == pytest.approx(0.5)
        assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)

    def test_first_update_is_that_of_adamw(self, folder):
        """The first step of Adam moves every weight by lr against the sign of its gradient; matrices decay too."""
        trainer = new_trainer("optimizer.warmup_steps=0", "optimizer.lr=1e-3", "optimizer.final_lr=1")
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train_step(watch=False)
        after = dict(trainer.model.named_parameters())
        decay = {"embed_tokens.weight": 1e-4, "layers.0.mlp.up_proj.weight": 1e-4}
        decay |= {"norm.weight": 0.0, "rho": 0.0, "layers.0.mixer.A_log": 0.0, "layers.0.mixer.conv_weight": 0.0}
        for name, share in decay.items():
            moved = after[name].detach() - before[name] * (1 - share)
            assert moved.abs().median().item() == pytest.approx(1e-3, rel=1e-2), name

    def test_a_loss_that_is_not_finite_changes_nothing(self, folder):
        trainer = new_trainer()
        with torch.no_grad():
            trainer.model.norm.weight.fill_(math.inf)
        before = trainer.model.embed_tokens.weight.clone()
        with pytest.raises(UserError, match="loss is nan in step 1; begin again in another folder"):
            trainer.train_step(watch=False)
        assert torch.equal(before, trainer.model.embed_tokens.weight)
        assert trainer.step == 0

    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
    )
    def test_out_of_memory(self, folder, error, monkeypatch, capsys):
        """The last checkpoint stays, and a smaller batch goes on from it."""
        step = Trainer.train_step

        def fail(self, watch):
            if self.step == 5:
                raise error
            return step(self, watch)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", fail)
            assert train.main([*TINY, "out=run"]) == 2
        assert "out of memory: lower train.batch_size" in capsys.readouterr().err
        assert checkpoint.find(Path("run/checkpoints"))[-1].name == "step-000000004"
        advice = ["train.batch_size=1", "train.grad_accumulation=4", "train.gradient_checkpointing=true"]
        assert train.main([*TINY, "out=run", *advice]) == 0
        assert [r["step"] for r in runlog.read(Path("run/log.jsonl"))] == list(range(1, 13))

    def test_without_a_checkpoint_settings_may_change(self, folder, monkeypatch):
        def fail(self, watch):
            raise UserError("no step")

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", fail)
            assert train.main([*TINY, "out=run"]) == 2
        assert train.main([*TINY, "out=run", "optimizer.lr=1e-3"]) == 0

    def test_other_errors_are_not_hidden(self, folder, monkeypatch):
        def fail(self, watch):
            raise RuntimeError("a bug")

        monkeypatch.setattr(Trainer, "train_step", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            train.main([*TINY, "out=run"])


class TestInstruments:
    @pytest.mark.parametrize("options", [{}, {"use_loop_residual": False}, {"num_hidden_layers": 1}])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_watch_loops(self, options, checkpointing):
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "loop_count": 3}
        model = LT2(LT2Config(**{**sizes, **options}))
        model.gradient_checkpointing = checkpointing
        if model.rho is not None:
            torch.nn.init.normal_(model.rho)
        tokens = torch.randint(50, (2, 9))
        with instruments.watch_loops(model) as rms:
            model(tokens, labels=tokens).loss.backward()
        seen = rms[:3]
        h, expected = model.embed_tokens(tokens), []
        from lt2_ext.models.loop_state import Tokens

        where = Tokens(model.config, tokens.shape, tokens.device)
        for loop in range(3):
            h_in = h
            for block in model.layers:
                h, _ = block(h, where, None, None)
            if model.rho is not None:
                h = h + model.rho[loop] * h_in
            expected.append(h.square().mean().sqrt())
        torch.testing.assert_close(torch.stack(seen), torch.stack(expected))
        model(tokens)
        assert len(seen) == 3

    def test_grad_norms_add_up(self):
        config = LT2Config(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            layer_pattern="gdn,full,gdn",
            tie_word_embeddings=False,
        )
        model = LT2(config)
        tokens = torch.randint(50, (2, 9))
        model(tokens, labels=tokens).loss.backward()
        norms = instruments.grad_norms(model)
        assert set(norms) == {"gdn", "full", "mlp", "norm", "embed_tokens", "lm_head", "rho"}
        total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert math.hypot(*norms.values()) == pytest.approx(total.item(), rel=1e-5)
        own = torch.nn.utils.get_total_norm([p.grad for p in model.layers[1].mixer.parameters()])
        assert norms["full"] == pytest.approx(own.item(), rel=1e-6)


class TestProgress:
    def test_bar(self, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("COLUMNS", "120")
        progress = runlog.Progress(3, 20)
        time.sleep(0.2)
        progress.update(4, 2.5, 1234.4)
        shown = sys.stderr.getvalue()
        progress.close()
        assert "4/20 [00:00<00:0" in shown
        assert "loss 2.500, 1,234 tokens/s]" in shown

    def test_lines(self, monkeypatch, capsys):
        """On no terminal: a line now and then, not one per step."""
        progress = runlog.Progress(3, 20)
        progress.update(4, 2.5, 1234.4)
        assert capsys.readouterr() == ("", "")
        progress.said -= runlog.QUIET
        progress.begun -= 2
        progress.update(5, 2.4, 1234.4)
        progress.update(6, 2.3, 1234.4)
        progress.close()
        assert capsys.readouterr() == ("step 5/20: loss 2.400, 1,234 tokens/s, 00:15 left\n", "")


class Crash(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


class TestCrash:
    def test_kill_and_continue(self, folder):
        """SIGKILL at ten random moments: what a run ends with is the same, bit for bit."""
        arguments = [*TINY, "train.keep_checkpoints=1"]
        server = multiprocessing.get_context("forkserver")  # its processes are copies of one that has imported all
        server.set_forkserver_preload(["lt2_ext.recipes.train"])

        def start(out):
            process = server.Process(target=train.main, args=([*arguments, f"out={out}"],))
            process.start()
            return process

        whole = start("whole")
        whole.join()
        assert whole.exitcode == 0
        expected = contents("whole")
        rng, killed = random.Random(1), 0
        while killed < 10:
            out, lines, wait = f"run{killed}", rng.randrange(11), rng.uniform(0, 0.04)
            process, log = start(out), Path(out, "log.jsonl")
            while process.is_alive() and len(runlog.read(log)) < lines:
                time.sleep(0.005)
            time.sleep(wait)
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            again = start(out)
            again.join()
            assert again.exitcode == 0, (out, lines, wait)
            assert_equal(contents(out), expected)

    def test_every_write(self, folder, monkeypatch):
        """The process ends before each of the writes of a checkpoint in turn: there is always a whole one to continue
        from, and never half of one that counts."""
        saved, trainer = Path("checkpoints"), new_trainer("train.keep_checkpoints=1")
        trainer.train_step(watch=False)
        trainer.save(saved)
        trainer.train_step(watch=False)
        expected = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        calls, limit = 0, 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == limit:
                    raise Crash
                return function(*args, **kwargs)

            return call

        for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir")):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
        steps, done = [], False
        while not done:
            limit, target = 0, Path(f"crash{len(steps)}")
            shutil.copytree(saved, target)
            calls, limit = 0, len(steps) + 1
            try:
                trainer.save(target)
                done = True
            except Crash:
                found = checkpoint.find(target)
                for path in found:
                    checkpoint.verify(path)
                steps.append(checkpoint.read_trainer(found[-1])["step"])
        assert steps == sorted(steps)
        assert steps.count(1) > 12
        assert steps.count(2) > 5
        limit = 0
        new = new_trainer("train.keep_checkpoints=1")
        new.load(checkpoint.find(target)[-1])
        assert_equal({n: p.detach() for n, p in new.model.named_parameters()}, expected)
        for crashed in ("crash2", f"crash{steps.index(2) - 1}", f"crash{len(steps) - 2}"):
            new.step = 3
            new.save(Path(crashed))
            assert [p.name for p in Path(crashed).iterdir()] == ["step-000000003"]

    def test_stop_and_continue(self, folder, capsys):
        """Ctrl-C saves; the log has every step once."""
        handler = signal.getsignal(signal.SIGINT)
        assert train.main([*TINY, "out=whole"]) == 0
        step = Trainer.train_step

        def interrupt(self, watch):
            if self.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, watch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train_step", interrupt)
            assert train.main([*TINY, "out=run"]) == 130
        assert "stopped after step 5; the same command continues from" in capsys.readouterr().out
        assert signal.getsignal(signal.SIGINT) is handler
        assert train.main([*TINY, "out=run"]) == 0
        assert_equal(contents("run"), contents("whole"))
        assert train.main([*TINY, "out=run"]) == 0  # nothing left to do

    def test_unfinished_line_of_the_log(self, folder):
        assert train.main([*TINY, "out=run"]) == 0
        with open("run/log.jsonl", "a") as file:
            file.write('{"step": 13, "lo')
        log = runlog.Log(Path("run/log.jsonl"), 5)
        log.close()
        assert [r["step"] for r in runlog.read(Path("run/log.jsonl"))] == [1, 2, 3, 4, 5]

    def test_one_run_at_a_time(self, folder, capsys):
        Path("run").mkdir()
        with train.only_one(Path("run")):
            result = []
            thread = threading.Thread(target=lambda: result.append(train.main([*TINY, "out=run"])))
            thread.start()
            thread.join()
        assert result == [2]
        assert "another run is training in run" in capsys.readouterr().err

    def test_disk_full(self, folder, monkeypatch, capsys):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device", "trainer.pt")

        assert train.main([*TINY, "out=run", "train.steps=2"]) == 0
        Path("run/settings.yaml").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", full)
            assert train.main([*TINY, "out=run", "train.steps=4"]) == 2
        assert "No space left on device: trainer.pt" in capsys.readouterr().err
        assert [p.name for p in checkpoint.find(Path("run/checkpoints"))] == ["step-000000002"]


class TestSettings:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["data.sequnce_length=3"], "unknown key 'data.sequnce_length'; did you mean 'data.sequence_length'?"),
            (["steps=3"], "unknown key 'steps'; did you mean 'train.steps'?"),
            (["zzz=3"], "unknown key 'zzz'; known keys: out, model, data.path"),
            (["model.hiden_size=3"], "model: LT2Config: unknown key 'hiden_size'; did you mean 'hidden_size'?"),
            (["model=lt2-0.6b-gnd"], "model: there is no preset 'lt2-0.6b-gnd'; did you mean 'lt2-0.6b-gdn'?"),
            (["model.hidden_size=-3"], "model: LT2Config: hidden_size must be an integer in 1..131072, got -3"),
            (["model.vocab_size=100"], "model.vocab_size must be at least the 258 of the data, got 100"),
            (["model.hidden_size=131072", "model.num_attention_heads=1024"], "training this model needs at least"),
            (["train.steps=1.5"], "train.steps must be an integer, got 1.5"),
            (["train.steps=true"], "train.steps must be an integer, got True"),
            (["train.steps=0"], "train.steps must be in 1..1e+09, got 0"),
            (["optimizer.lr=fast"], "optimizer.lr must be a number, got 'fast'"),
            (["optimizer.lr=.nan"], "optimizer.lr must be a number, got nan"),
            (["data.verify=1"], "data.verify must be true or false, got 1"),
            (["data=book.txt"], "data must be a section of keys and values, got 'book.txt'"),
            (["out.x=1"], "out.x: out is not a section, but 'run'"),
            (["out={x: 1}"], "out must be text, got {'x': 1}"),
            (["train.dtype=fp8"], "train.dtype must be auto, bf16 or fp32, got 'fp8'"),
            (["train.device=tpu9"], "train.device must be a device of this machine, got 'tpu9'"),
            (["train.steps=[1"], "train.steps=[1 is not valid YAML"),
            (["no.yaml"], "there is no file no.yaml"),
            (["a.yaml", "b.yaml"], "one settings file at most, got a.yaml b.yaml"),
            (["bad.yaml"], "bad.yaml must hold keys and values, got [1, 2]"),
            (["code.yaml"], "code.yaml:  is not valid YAML (could not determine a constructor"),
            (["data.path=none.txt"], "there is no file or folder none.txt"),
            (["data.path="], "data.path must be text, got None"),
            (["data.sequence_length=100000"], "too few for one row of 100000"),
        ],
    )
    def test_mistakes_are_one_sentence(self, arguments, message, folder, capsys):
        Path("bad.yaml").write_text("[1, 2]")
        Path("code.yaml").write_text("out: !!python/object/apply:os.system [touch pwned]")
        assert train.main([*TINY, "out=run", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("lt2 train: ")
        assert message in lines[0]
        assert not Path("pwned").exists()

    def test_aliases_do_not_explode(self, folder, capsys):
        lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
        Path("bomb.yaml").write_text("\n".join([*lines, "out: *a29"]))
        assert train.main(["bomb.yaml"]) == 2
        assert len(capsys.readouterr().err) < 1000

    def test_file_and_overrides(self, folder):
        Path("a.yaml").write_text("model: tiny\noptimizer: {lr: 1e-3, warmup_steps: null}\ntrain:\n  steps: 5\n")
        run = settings.read(["a.yaml", "train.steps=7", "model.loop_count=3"])
        assert (run.optimizer.lr, run.train.steps) == (1e-3, 7)
        config = settings.model_config(run.model, 300)
        assert (config.loop_count, config.vocab_size, config.hidden_size) == (3, 300, 128)

    def test_defaults_are_the_recipe_of_the_paper(self):
        run = settings.read([])
        train.resolve(run)
        t, o = run.train, run.optimizer
        assert t.steps * t.batch_size * t.grad_accumulation * run.data.sequence_length == 100_270_080_000
        assert (o.lr, o.beta1, o.beta2, o.weight_decay, o.clip) == (3e-4, 0.9, 0.95, 0.1, 1.0)
        assert (o.warmup_steps, o.final_lr, t.seed) == (10_000, 1e-6, 777)

    def test_another_run_is_not_continued(self, folder, capsys):
        assert train.main([*TINY, "out=run", "train.steps=4"]) == 0
        for change, message in (
            ("optimizer.lr=3e-3", "is of a run with optimizer.lr = 0.01, now it is 0.003; use that value, or another"),
            ("train.batch_size=3", "is of a run with batch_size x grad_accumulation = 4, now it is 6"),
            ("model.loop_count=3", "is of a run with model.loop_count = 2, now it is 3"),
            ("data.tokenizer=bpe", "was made with data.tokenizer = 'bytes', now it is 'bpe'"),
        ):
            assert train.main([*TINY, "out=run", "train.steps=4", change]) == 2
            assert message in capsys.readouterr().err
        assert train.main([*TINY, "out=run", "train.steps=4", "train.log_every=3"]) == 0

    def test_other_data_is_refused(self, folder, capsys):
        assert train.main([*TINY, "out=run", "train.steps=4"]) == 0
        Path("book.txt").write_text("another text " * 200)
        assert train.main([*TINY, "out=other", "train.steps=4"]) == 0
        assert train.main([*TINY, "out=run", "train.steps=4", "data.path=other/data"]) == 2
        assert "was trained on other data than other/data" in capsys.readouterr().err

    def test_keys(self, capsys):
        assert train.main(["--keys"]) == 0
        printed = capsys.readouterr().out
        assert all(key.rpartition(".")[2] in printed for key in settings.keys_of(settings.Run))
        assert json.loads(json.dumps(settings.flat(settings.Run())))["train.seed"] == 777
