"""The ``lt2`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lt2",
        description="Fused operators and models for looped linear-time transformers.",
        epilog="example: lt2 doctor && lt2 demo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="check this installation: versions, instruction set, GPU, a test of every operator",
        description="One line per fact, then OK (exit 0) or the problems with their fixes (exit 1).",
        epilog="example: LT2_CPU_ISA=avx2 lt2 doctor",
    )
    commands.add_parser(
        "demo",
        add_help=False,
        help="four facts about LT2 and a small training run, about 3 minutes (lt2 demo --help)",
    )
    args, rest = parser.parse_known_args(argv)
    if args.command == "demo":
        from .recipes import demo

        return demo.main(rest) or 0
    if rest:
        parser.error(f"doctor takes no arguments, got {' '.join(rest)}")
    from . import doctor

    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
