"""Text to tokens to rows: ``lt2_ext.recipes.prepare``, its files, and the order in which training reads them."""

from __future__ import annotations

import itertools
import json
import sysconfig
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")

from lt2_ext.models import LT2, LT2Config
from lt2_ext.recipes import prepare, shards, text
from lt2_ext.recipes.files import UserError
from lt2_ext.recipes.rows import Rows

STDLIB = Path(sysconfig.get_path("stdlib"))
BOS, EOS = text.ByteTokenizer.bos, text.ByteTokenizer.eos


def run(*args):
    return prepare.main([str(a) for a in args])


@pytest.fixture
def folder(tmp_path):
    """A data folder of five documents, byte by byte."""
    source = tmp_path / "text"
    (source / "sub").mkdir(parents=True)
    for i in range(5):
        (source / "sub" / f"{i}.txt").write_text(f"document {i}, ümlaut\n" * (i + 1))
    assert run(source, "--out", tmp_path / "data", "--held-out", 0) == 0
    return tmp_path / "data"


def edit_index(folder, change):
    path = folder / shards.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_documents_come_back(folder):
    split = shards.open_shards(folder)["train"]
    tokens = split.read(0, len(split))
    expected = b"".join((f"document {i}, ümlaut\n" * (i + 1)).encode() for i in range(5))
    assert bytes(tokens[tokens < 256].tolist()) == expected
    assert np.count_nonzero(tokens == BOS) == np.count_nonzero(tokens == EOS) == 5
    assert tokens[0] == BOS
    assert tokens[-1] == EOS


def test_shards_of_any_size_read_the_same(tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, 1000)
    for shard_tokens in (1, 7, 1000, 2000):
        folder = tmp_path / str(shard_tokens)
        folder.mkdir()
        writer = shards.ShardWriter(folder, "train", "uint16", shard_tokens)
        for piece in np.split(ids, [0, 3, 400, 401]):
            writer.add(piece)
        entries = writer.finish()
        assert len(entries) == -(-1000 // shard_tokens)
        shards.write_index(folder, 300, 0, {"train": entries, "held_out": []})
        split = shards.open_shards(folder)["train"]
        for start, count in ((0, 1000), (0, 1), (5, 20), (999, 1), (393, 14)):
            assert np.array_equal(split.read(start, count), ids[start : start + count])


def test_what_is_a_document(tmp_path, capsys):
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.py").write_text("")
    for hidden in (".hidden.py", ".git", "vendored"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "c.py").write_text("c")
    (tmp_path / "link.py").symlink_to(tmp_path / "b.txt")
    (tmp_path / "lines.jsonl.py").write_text("d")
    (tmp_path / "records.jsonl").write_text('{"text": "e"}\n\n{"text": "f", "id": 1}\n{"text": ""}\n')
    args = ["--suffix", ".py", "--suffix", ".jsonl", "--exclude", "vendored", "--held-out", 0]
    assert run(tmp_path, "--out", tmp_path / "out", *args) == 0
    out = capsys.readouterr().out
    assert "train: 4 documents, 12 tokens" in out
    assert "left out: 1 files that are not UTF-8 text" in out
    assert "binary.py" in out
    split = shards.open_shards(tmp_path / "out")["train"]
    assert bytes(t for t in split.read(0, 12).tolist() if t < 256) == b"adef"


def test_held_out_documents_are_not_trained_on(tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_bytes(bytes([i]) if i else b"x")
    assert run(tmp_path, "--out", tmp_path / "out", "--held-out", 0.2) == 0
    splits = shards.open_shards(tmp_path / "out")
    train, held_out = (set(splits[s].read(0, len(splits[s])).tolist()) - {BOS, EOS} for s in shards.SPLITS)
    assert not train & held_out
    assert len(train | held_out) == 100
    assert 5 < len(held_out) < 40


def test_the_end_of_a_single_text_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_text("a" * 900 + "b" * 100)
    assert run(tmp_path / "book.txt", "--out", tmp_path / "out", "--held-out", 0.1) == 0
    splits = shards.open_shards(tmp_path / "out")
    assert set(splits["train"].read(1, 900).tolist()) == {ord("a")}
    assert splits["held_out"].read(0, 102).tolist() == [BOS, *[ord("b")] * 100, EOS]


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return text.train_bpe([p.read_text() for p in sorted((STDLIB / "json").glob("*.py"))], 600)


class TestTokenizers:
    SAMPLE = "def f(x):\n    return '\u00e9\u4e2d\U0001f600' + x  # <|eos|>\n"

    def same(self, tokenizer):
        (ids,) = tokenizer.encode([self.SAMPLE])
        assert tokenizer.bos not in ids
        assert tokenizer.eos not in ids  # "<|eos|>" in a document is text
        assert ids.max() < tokenizer.vocab_size
        decode = tokenizer.decoder()
        pieces = [decode(i) for i in [tokenizer.bos, *ids.tolist(), tokenizer.eos]]
        assert "".join(pieces) == self.SAMPLE
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)  # a character of four bytes comes out whole
        return ids

    def test_bytes(self, tmp_path):
        ids = self.same(text.ByteTokenizer())
        text.ByteTokenizer().save(tmp_path)
        assert np.array_equal(self.same(text.load(tmp_path)), ids)
        assert bytes(ids.tolist()) == self.SAMPLE.encode()

    def test_bpe(self, bpe, tmp_path):
        ids = self.same(bpe)
        assert bpe.vocab_size == 600
        assert len(ids) < 0.8 * len(self.SAMPLE.encode())
        bpe.save(tmp_path)
        assert np.array_equal(self.same(text.load(tmp_path)), ids)

    def test_imported(self, bpe, tmp_path):
        bpe.save(tmp_path)
        path = tmp_path / "tokenizer.json"
        with pytest.raises(UserError, match="the tokenizer has no token '<s>'"):
            text.import_bpe(path, bos="<s>")
        both = text.import_bpe(path, bos=text.EOS, eos=text.EOS)
        documents = [prepare.Document("train", "ab"), prepare.Document("train", "c")]
        ids = np.concatenate([ids for _, ids in prepare.encode(both, documents)])
        assert np.count_nonzero(ids == both.eos) == 2
        assert ids[0] == both.eos

    def test_transformers_reads_it(self, bpe, tmp_path):
        transformers = pytest.importorskip("transformers")
        bpe.save(tmp_path)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        plain = self.SAMPLE.replace(text.EOS, "")
        assert theirs.encode(plain) == bpe.encode([plain])[0].tolist()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kind": "pickle"}, "kind must be 'bytes' or 'bpe', got 'pickle'"),
            ({"kind": "bytes", "vocab_size": 10**12}, "vocab_size must be 258, got 1000000000000"),
            ({"kind": "bpe", "bos": [0], "eos": 1}, "bos and eos must be tokens"),
            ([], "must hold a JSON object"),
        ],
    )
    def test_broken_settings(self, bpe, tmp_path, settings, message):
        bpe.save(tmp_path)
        (tmp_path / text.SETTINGS).write_text(json.dumps(settings))
        with pytest.raises(UserError, match=message):
            text.load(tmp_path)

    def test_broken_bpe(self, bpe, tmp_path):
        bpe.save(tmp_path)
        (tmp_path / "tokenizer.json").write_text('{"model": 1}')
        with pytest.raises(UserError, match="is not a file of the tokenizers library"):
            text.load(tmp_path)

    def test_prepare_with_bpe(self, tmp_path, capsys):
        pytest.importorskip("tokenizers")
        args = ["--suffix", ".py", "--tokenizer", "bpe", "--vocab-size", 500, "--out", tmp_path / "out"]
        assert run(STDLIB / "json", *args) == 0
        assert "bpe, vocabulary 500" in capsys.readouterr().out
        split = shards.open_shards(tmp_path / "out")["train"]
        decode = text.load(tmp_path / "out").decoder()
        assert "".join(map(decode, split.read(0, 40).tolist())) in (STDLIB / "json" / "__init__.py").read_text()

    def test_control_characters_do_not_reach_a_terminal(self):
        assert text.printable("a\x1b[2J\r\tb\né") == "a\ufffd[2J\ufffd\tb\né"


class TestRefused:
    """What is wrong with a data folder is one sentence."""

    def refused(self, folder, message, **options):
        with pytest.raises(UserError, match=message) as e:
            shards.open_shards(folder, **options)
        assert "\n" not in str(e.value)

    def shard(self, folder):
        return folder / "train-00000.bin"

    def test_truncated(self, folder):
        data = self.shard(folder).read_bytes()
        self.shard(folder).write_bytes(data[:-2])
        message = (
            f"train-00000.bin is truncated or was changed: it has {len(data) - 2} bytes, the index says {len(data)}"
        )
        self.refused(folder, message)
        self.refused(folder, message, verify=False)

    def test_corrupted(self, folder):
        data = bytearray(self.shard(folder).read_bytes())
        data[100] ^= 1
        self.shard(folder).write_bytes(data)
        self.refused(folder, "train-00000.bin is corrupted: its checksum is")
        shards.open_shards(folder, verify=False)

    def test_missing(self, folder):
        self.shard(folder).unlink()
        self.refused(folder, "train-00000.bin is missing")

    @pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "sub/x.bin", "..", "", None, "a\0b", ["x"]])
    def test_outside_the_folder(self, folder, name):
        (folder.parent / "secret.bin").write_bytes(self.shard(folder).read_bytes())
        edit_index(folder, lambda index: index["splits"]["train"][0].update(file=name))
        self.refused(folder, "which is not a plain file name")

    def test_link(self, folder):
        secret = self.shard(folder).rename(folder.parent / "secret.bin")
        self.shard(folder).symlink_to(secret)
        self.refused(folder, "must be a regular file, not a link")

    def test_tokens_beyond_the_vocabulary(self, folder):
        """An index that fits its files all the same: the embedding table is never read outside."""
        data = np.full(len(self.shard(folder).read_bytes()) // 2, 65535, dtype="<u2").tobytes()
        self.shard(folder).write_bytes(data)
        edit_index(folder, lambda index: index["splits"]["train"][0].update(crc32=zlib.crc32(data)))
        split = shards.open_shards(folder)["train"]
        with pytest.raises(UserError, match="the data has the token 65535, but its vocabulary ends at 257"):
            split.read(0, 4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda i: i.update(format="x"), "format must be 'lt2 tokens 1', got 'x'"),
            (lambda i: i.update(vocab_size=-1), "vocab_size must be an integer in 1"),
            (lambda i: i.update(vocab_size=True), "vocab_size must be an integer in 1"),
            (lambda i: i.update(dtype="object"), "dtype must be 'uint16' for this vocab_size, got 'object'"),
            (lambda i: i.update(bos=258), "bos must be an integer in 0..257, got 258"),
            (lambda i: i["splits"].pop("held_out"), "splits must name train and held_out"),
            (lambda i: i["splits"].update(train={"file": "x"}), "train must list files"),
            (lambda i: i["splits"]["train"][0].update(tokens=10**30), "tokens must be an integer in 1"),
            (lambda i: i["splits"]["train"][0].pop("crc32"), "crc32 must be an integer in 0"),
        ],
    )
    def test_hostile_index(self, folder, change, message):
        edit_index(folder, change)
        self.refused(folder, message)

    def test_index_that_is_no_index(self, folder):
        (folder / shards.INDEX).write_text("[" * 100_000)
        self.refused(folder, "is not valid JSON")
        (folder / shards.INDEX).write_text("[]")
        self.refused(folder, "must hold a JSON object")
        (folder / shards.INDEX).unlink()
        self.refused(folder, "make it with: python -m lt2_ext.recipes.prepare TEXT")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no-such-file"], "there is no file or folder no-such-file"),
        (["text", "--suffix", ".c"], "no files in text"),
        (["text", "--held-out", "0.9"], r"--held-out must be in 0..0.5, got 0.9"),
        (["text", "--tokenizer", "nothing.json"], "there is no nothing.json"),
        (
            ["text", "--tokenizer", "bpe", "--vocab-size", "100"],
            r"the vocabulary must have 258..1048576 tokens, got 100",
        ),
        (["bad.jsonl"], 'bad.jsonl, line 2, must be an object with a string "text"'),
        (["surrogate.jsonl"], 'surrogate.jsonl, line 1, must be an object with a string "text"'),
        (["binary"], "no text to train on in binary"),
        (["text", "--out", "text/a.txt"], "File exists: text/a.txt"),
    ],
)
def test_mistakes_are_one_sentence(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    Path("text/a.txt").write_text("hello " * 50)
    Path("bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    Path("surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    Path("binary").write_bytes(b"\xff")
    out = [] if "--out" in args else ["--out", "out"]
    assert run(*args, *out) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("python -m lt2_ext.recipes.prepare: ")
    assert message in lines[0]
    assert not Path("out", shards.INDEX).exists()


def test_prepared_data_is_not_overwritten(folder, capsys):
    assert run(__file__, "--out", folder) == 2
    assert "already holds prepared data" in capsys.readouterr().err


def split_of(count, vocab_size=1000, bos=0):
    return shards.Split([np.arange(count, dtype=np.uint16) % vocab_size], bos=bos, vocab_size=vocab_size)


class TestRows:
    def test_every_token_is_a_target_once(self):
        rows = Rows(split_of(100), 12, seed=None)
        assert rows.count == 9
        batch = rows.batch(0, rows.count)
        assert batch.tokens[:, 1:].flatten().tolist() == list(range(1, 100))
        assert batch.targets == 99
        assert batch.cu_seqlens is None

    def test_epochs_have_orders_of_their_own(self):
        rows = Rows(split_of(1000), 11, seed=3)
        epochs = [[rows.row(e * rows.count + i) for i in range(rows.count)] for e in range(3)]
        for order in epochs:
            assert sorted(order) == list(range(rows.count))
        assert len({tuple(order) for order in epochs}) == 3
        other = Rows(split_of(1000), 11, seed=4)
        assert [other.row(i) for i in range(rows.count)] != epochs[0]

    def test_the_order_does_not_depend_on_the_past(self):
        straight, jumping = Rows(split_of(1000), 11, seed=3), Rows(split_of(1000), 11, seed=3)
        batches = [straight.batch(4 * i, 4).tokens for i in range(80)]  # more than three epochs of 99 rows
        for i in (79, 0, 25, 24, 50):
            assert torch.equal(jumping.batch(4 * i, 4).tokens, batches[i])

    def test_isolated_documents(self, folder):
        rows = Rows(shards.open_shards(folder)["train"], 40, seed=0)
        plain, batch = rows.batch(0, 4), rows.batch(0, 4, isolate=True)
        assert torch.equal(batch.tokens, plain.tokens.view(1, -1))
        bounds = batch.cu_seqlens.tolist()
        starts = [i for i, t in enumerate(batch.tokens[0].tolist()) if t == BOS or i % 40 == 0]
        assert bounds == [*starts, 160]
        assert batch.targets == 160 - len(starts)

        torch.manual_seed(0)
        config = LT2Config(vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, loop_count=2)
        model = LT2(config)
        loss = model(batch.tokens, labels=batch.tokens, cu_seqlens=batch.cu_seqlens).loss
        losses, targets = [], 0
        for start, end in itertools.pairwise(bounds):
            if end - start > 1:
                piece = batch.tokens[:, start:end]
                losses.append(model(piece, labels=piece).loss * (end - start - 1))
                targets += end - start - 1
        assert targets == batch.targets
        torch.testing.assert_close(loss, sum(losses) / targets)

    def test_too_little_data(self):
        with pytest.raises(UserError, match=r"the data has 100 tokens, too few for one row of 101"):
            Rows(split_of(100), 101, seed=0)
        assert Rows(split_of(100), 100, seed=0).count == 1
