"""Text to token ids and back: the bytes themselves, or a byte-level BPE of the ``tokenizers`` library.

A tokenizer is saved as ``lt2_tokenizer.json`` (kind, vocab_size, bos, eos) and, for BPE, ``tokenizer.json``, the file
that transformers reads.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .files import UserError, read_json, short, write

SETTINGS = "lt2_tokenizer.json"
BOS, EOS = "<|bos|>", "<|eos|>"


class Tokenizer(Protocol):
    """Every document is ``bos``, its text, ``eos``; ids are below ``vocab_size``."""

    kind: str
    vocab_size: int
    bos: int
    eos: int

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text, without bos and eos; text that spells a special token is text all the same."""

    def decoder(self) -> Callable[[int], str]:
        """A function that takes the ids of one text in turn and gives the characters each completes; of bos and eos
        none."""

    def save(self, folder: Path) -> None:
        """Write the files that :func:`load` reads."""


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 is bos, 257 is eos."""

    kind, vocab_size, bos, eos = "bytes", 258, 256, 257

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decoder(self) -> Callable[[int], str]:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: utf8.decode(bytes([token])) if token < 256 else ""

    def save(self, folder: Path) -> None:
        _save_settings(self, folder)


class BPETokenizer:
    """A ``tokenizers.Tokenizer``; ``bos`` and ``eos`` name its tokens, which may be the same one.

    Raises:
        UserError: It has no such tokens.
    """

    kind = "bpe"

    def __init__(self, tokenizer: Any, bos: str, eos: str) -> None:
        self.inner = tokenizer
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1
        self.bos, self.eos = (self._id(name) for name in (bos, eos))
        # Otherwise a document that spells "<|eos|>" would end where its author likes.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def _id(self, name: str) -> int:
        token = self.inner.token_to_id(name)
        if token is None:
            raise UserError(f"the tokenizer has no token {name!r}; name those that begin and end a text (--bos, --eos)")
        return int(token)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int64) for e in encoded]

    def decoder(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.inner, token) or ""

    def save(self, folder: Path) -> None:
        write(folder / "tokenizer.json", self.inner.to_str())
        _save_settings(self, folder)


def _save_settings(tokenizer: Tokenizer, folder: Path) -> None:
    settings = {name: getattr(tokenizer, name) for name in ("kind", "vocab_size", "bos", "eos")}
    write(folder / SETTINGS, json.dumps(settings) + "\n")


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as e:
        raise UserError("BPE needs the tokenizers library (pip install tokenizers)") from e
    return tokenizers


def _read_bpe(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"there is no {path}")
    try:
        return _tokenizers().Tokenizer.from_file(str(path))
    except UserError:
        raise
    except Exception as e:  # the library raises plain Exception
        raise UserError(f"{path} is not a file of the tokenizers library ({e})") from e


def import_bpe(path: Path, bos: str = BOS, eos: str = EOS) -> BPETokenizer:
    """The tokenizer in somebody's ``tokenizer.json``."""
    return BPETokenizer(_read_bpe(path), bos, eos)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens (258 are the bytes, bos and eos), learned from ``texts``."""
    library = _tokenizers()
    if not 258 <= vocab_size <= 2**20:
        raise UserError(f"the vocabulary must have 258..{2**20} tokens, got {vocab_size}")
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return BPETokenizer(inner, BOS, EOS)


def load(folder: Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote into ``folder``.

    Raises:
        UserError: It is missing, broken, or its two files do not belong together.
    """
    settings = read_json(folder / SETTINGS)
    if settings.get("kind") not in ("bytes", "bpe"):
        raise UserError(f"{folder / SETTINGS}: kind must be 'bytes' or 'bpe', got {short(settings.get('kind'))}")
    tokenizer: Tokenizer = ByteTokenizer()
    if settings["kind"] == "bpe":
        inner = _read_bpe(folder / "tokenizer.json")
        names = {token: name for name, token in inner.get_vocab(with_added_tokens=True).items()}
        ids = [settings.get(name) for name in ("bos", "eos")]
        bos, eos = (names.get(i) if type(i) is int else None for i in ids)
        if bos is None or eos is None:
            raise UserError(f"{folder / SETTINGS}: bos and eos must be tokens of tokenizer.json")
        tokenizer = BPETokenizer(inner, bos, eos)
    for name in ("vocab_size", "bos", "eos"):
        if settings.get(name) != getattr(tokenizer, name):
            raise UserError(
                f"{folder / SETTINGS}: {name} must be {getattr(tokenizer, name)}, got {short(settings.get(name))}"
            )
    return tokenizer


def for_transformers(tokenizer: Tokenizer) -> Any:
    """The same ids from a ``PreTrainedTokenizerFast``, which puts ``bos`` before a text."""
    from transformers import PreTrainedTokenizerFast

    library = _tokenizers()
    if isinstance(tokenizer, BPETokenizer):
        inner = library.Tokenizer.from_str(tokenizer.inner.to_str())
    else:  # every byte is a token, and none are merged
        inner = library.Tokenizer(library.models.BPE({c: b for b, c in enumerate(_byte_characters())}, []))
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = library.decoders.ByteLevel()
        inner.add_special_tokens([BOS, EOS])
    bos, eos = inner.id_to_token(tokenizer.bos), inner.id_to_token(tokenizer.eos)
    begin = library.processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.bos)])
    inner.post_processor = begin
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=eos, split_special_tokens=True
    )


def _byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where it is printable, else one from 256."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in shown else next(others)) for b in range(256)]


def printable(text: str) -> str:
    """``text`` with control characters replaced, all but newline and tab: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
