"""The ``lt2`` command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # name: (module with a main(argv), what it does)
    "doctor": ("lt2_ext.recipes.doctor", "check this installation: versions, instruction set, GPU, every operator"),
    "demo": ("lt2_ext.recipes.demo", "four facts about LT2 and a small training run, about 3 minutes"),
    "plan": ("lt2_ext.recipes.plan", "parameters, FLOPs and state of a model, before it runs"),
    "train": ("lt2_ext.recipes.train", "train a model on text"),
    "generate": ("lt2_ext.recipes.generate", "continue a text with a saved model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lt2",
        description="Fused operators and models for looped linear-time transformers.",
        epilog="example: lt2 doctor && lt2 demo; each command has its own --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(argv[:1]).command
    return int(importlib.import_module(COMMANDS[command][0]).main(argv[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main())
