"""``python -m lt2_ext.recipes.prepare``: text files and folders to token files that ``lt2 train`` reads."""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import shards, text
from .files import UserError, run_command, short

try:
    from tqdm import tqdm
except ModuleNotFoundError as e:
    raise SystemExit("lt2_ext.recipes.prepare needs tqdm. Install: pip install tqdm") from e

GROUP = 2**22  # characters that are tokenised at a time
LINE = 2**26  # the longest line of a .jsonl file that is read, in bytes

Tick = Callable[[int], object]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lt2_ext.recipes.prepare",
        description="Turn text into the tokens that lt2 train reads. A file is a document; so is each line of a .jsonl "
        'file, an object with the key "text". Folders are searched; hidden files, links and files that are not UTF-8 '
        "text are left out.",
        epilog="example: python -m lt2_ext.recipes.prepare /usr/lib/python3.11 --suffix .py --exclude site-packages "
        "--out data/stdlib",
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="TEXT", help="text files and folders")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--suffix", action="append", help="in folders, take only files that end so (may be repeated)")
    parser.add_argument("--exclude", action="append", default=[], help="folder or file name to leave out (as often)")
    parser.add_argument(
        "--tokenizer", default="bytes", help="bytes (default), bpe (trained on this text), or a tokenizer.json file"
    )
    parser.add_argument("--vocab-size", type=int, default=8192, help="largest size of a trained bpe, default 8192")
    parser.add_argument("--bos", default=text.BOS, help=f"token that begins a document, default {text.BOS}")
    parser.add_argument("--eos", default=text.EOS, help=f"token that ends one, default {text.EOS}; may be the same")
    parser.add_argument("--held-out", type=float, default=0.01, help="share of the documents to hold out, default 0.01")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.held_out <= 0.5:
        raise UserError(f"--held-out must be in 0..0.5, got {args.held_out:g}")
    if (args.out / shards.INDEX).exists():
        raise UserError(f"{args.out} already holds prepared data; choose another folder or remove it")
    corpus = Corpus(find(args.sources, args.suffix, args.exclude), args.held_out)
    tokenizer = make_tokenizer(args, corpus)
    args.out.mkdir(parents=True, exist_ok=True)
    writers = {s: shards.ShardWriter(args.out, s, shards.dtype_for(tokenizer.vocab_size)) for s in shards.SPLITS}
    documents: Counter[str] = Counter()
    with bar("tokens", corpus.nbytes) as tick:
        for split, ids in encode(tokenizer, corpus.read(tick)):
            writers[split].add(ids)
            documents[split] += 1
    if not documents["train"]:
        raise UserError(f"no text to train on in {', '.join(map(str, args.sources))}")
    tokenizer.save(args.out)
    entries = {split: writer.finish() for split, writer in writers.items()}
    shards.write_index(args.out, tokenizer.vocab_size, tokenizer.bos, entries)
    for split in shards.SPLITS:
        print(f"{split}: {documents[split]:,} documents, {sum(e['tokens'] for e in entries[split]):,} tokens")
    if corpus.skipped:
        print(f"left out: {len(corpus.skipped):,} files that are not UTF-8 text, the first is {corpus.skipped[0]}")
    print(f"{args.out}: {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}")
    return 0


def make_tokenizer(args: argparse.Namespace, corpus: Corpus) -> text.Tokenizer:
    if args.tokenizer == "bytes":
        return text.ByteTokenizer()
    if args.tokenizer != "bpe":
        return text.import_bpe(Path(args.tokenizer), args.bos, args.eos)
    with bar("vocabulary", corpus.nbytes) as tick:
        return text.train_bpe((d.text for d in corpus.read(tick) if d.split == "train"), args.vocab_size)


class bar:
    """A progress bar over bytes; on no terminal, none."""

    def __init__(self, what: str, total: int) -> None:
        self.inner = tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=None)

    def __enter__(self) -> Tick:
        self.inner.__enter__()
        return lambda n: self.inner.update(n)

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)


@dataclass
class Document:
    split: str
    text: str


def find(
    sources: Sequence[Path], suffixes: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[tuple[str, Path]]:
    """The files to read and their names, which decide what is held out; sorted, so the order is that of any machine."""
    found: list[tuple[str, Path]] = []
    for source in sources:
        if source.is_file():
            found.append((source.name, source))
        elif source.is_dir():
            for path in sorted(source.rglob("*")):
                name = path.relative_to(source).as_posix()
                hidden = any(part.startswith(".") or part in exclude for part in name.split("/"))
                wanted = suffixes is None or name.endswith(tuple(suffixes))
                if wanted and not hidden and not path.is_symlink() and path.is_file():
                    found.append((name, path))
        else:
            raise UserError(f"there is no file or folder {source}")
    if not found:
        raise UserError(f"no files in {', '.join(map(str, sources))}")
    return found


class Corpus:
    """The documents of files. Those held out follow from their names; of a single one, the end is held out."""

    def __init__(self, files: Sequence[tuple[str, Path]], held_out: float) -> None:
        self.files, self.held_out = files, held_out
        self.nbytes = sum(path.stat().st_size for _, path in files)
        self.skipped: list[Path] = []

    def read(self, tick: Tick) -> Iterator[Document]:
        self.skipped = []
        for name, path in self.files:
            if path.suffix == ".jsonl":
                yield from self._read_lines(name, path, tick)
                continue
            data = path.read_bytes()
            tick(len(data))
            try:
                content = data.decode()
            except UnicodeDecodeError:
                content = "\0"
            if "\0" in content:
                self.skipped.append(path)
            elif len(self.files) == 1:
                cut = len(content) - int(self.held_out * len(content))
                yield Document("train", content[:cut])
                if cut < len(content):
                    yield Document("held_out", content[cut:])
            elif content:
                yield Document(self._split(name), content)

    def _read_lines(self, name: str, path: Path, tick: Tick) -> Iterator[Document]:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(LINE + 1):
                number += 1
                tick(len(line))
                if len(line) > LINE:
                    raise UserError(f"{path}, line {number}, is longer than {LINE} bytes")
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                    content = value["text"]
                    content.encode()  # half of a surrogate pair is valid JSON, but not text
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
                    wrong = f'{path}, line {number}, must be an object with a string "text", got {short(line)}'
                    raise UserError(wrong) from e
                if content:
                    yield Document(self._split(f"{name}:{number}"), content)

    def _split(self, name: str) -> str:
        return "held_out" if zlib.crc32(name.encode(errors="surrogateescape")) < self.held_out * 2**32 else "train"


def encode(tokenizer: text.Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Split and ids of each document, ``bos`` and ``eos`` included (once, where they are the same token)."""
    end = [] if tokenizer.eos == tokenizer.bos else [tokenizer.eos]

    def flush(group: list[Document]) -> Iterator[tuple[str, NDArray[np.int64]]]:
        for document, ids in zip(group, tokenizer.encode([d.text for d in group]), strict=True):
            yield document.split, np.concatenate([[tokenizer.bos], ids, end]).astype(np.int64)

    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= GROUP:
            yield from flush(group)
            group, size = [], 0
    yield from flush(group)


if __name__ == "__main__":
    sys.exit(main())
