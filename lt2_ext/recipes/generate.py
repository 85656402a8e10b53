"""``lt2 generate``: a saved model continues a text, token by token as they come."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lt2_ext.models import LT2, Engine
from lt2_ext.models.sampling import check_options

from . import checkpoint, text
from .files import UserError, out_of_memory, run_command

MOST_TOKENS = 2**32


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lt2 generate",
        description="Continue a text with a saved model and print it as it comes. The folder is a checkpoint of lt2 "
        "train, or a run, whose newest checkpoint is taken. What is remembered of the text is a LoopState: one token "
        "costs the same however long the text is, but for attention layers.",
        epilog='example: lt2 generate runs/book "Once upon a time" --max-new-tokens 200 --temperature 0.8',
    )
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a run, a checkpoint, or a saved model")
    parser.add_argument("prompt", nargs="?", default="", help="text to continue, - for standard input, default none")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default 256")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token, default 0.8")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this total probability")
    parser.add_argument("--seed", type=int, help="of the draws, for the same text again")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    try:
        check_options(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    except ValueError as e:
        raise UserError(str(e).removeprefix("LT2.generate: ")) from e
    if args.max_new_tokens > MOST_TOKENS:
        raise UserError(f"max_new_tokens must be <= {MOST_TOKENS}, got {args.max_new_tokens}")
    if not math.isfinite(args.temperature):
        raise UserError(f"temperature must be a finite number, got {args.temperature}")
    folder = checkpoint.model_folder(args.model)
    model, tokenizer = checkpoint.load_model(folder, args.device), text.load(folder)
    known, needed = model.config.vocab_size, tokenizer.vocab_size
    if needed > known:
        raise UserError(f"{folder}: the tokenizer has {needed} tokens, but the vocabulary of the model is {known}")
    generator = torch.Generator(args.device)
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    ids = [tokenizer.bos, *tokenizer.encode([prompt])[0].tolist()]
    decode = tokenizer.decoder()
    print(text.printable(prompt), end="", flush=True)
    try:
        for token in stream(model, ids, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator):
            if token == tokenizer.eos:
                break
            if token < tokenizer.vocab_size:
                print(text.printable(decode(token)), end="", flush=True)
    except KeyboardInterrupt:
        pass
    except RuntimeError as e:
        if out_of_memory(e):
            raise UserError("out of memory: lower --max-new-tokens, or shorten the prompt") from e
        raise
    print()
    return 0


@torch.no_grad()
def stream(
    model: LT2,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Iterator[int]:
    """The tokens of ``model.generate``, each as soon as it is known."""
    if max_new_tokens == 0:
        return
    engine = Engine(model, 1, len(ids) + max_new_tokens, chunk=len(ids))
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    engine.add(ids, max_new_tokens, temperature, top_k, top_p, seed=seed)
    while engine.running:
        yield from engine.step().values()


if __name__ == "__main__":
    sys.exit(main())
