"""``python -m lt2_ext.recipes.evaluate``: a saved model on tasks of lm-evaluation-harness (extra ``eval``)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, text
from .files import UserError, run_command, write

# The eight tasks that the LT2 paper averages.
PAPER = "arc_easy,arc_challenge,hellaswag,piqa,winogrande,openbookqa,sciq,boolq"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lt2_ext.recipes.evaluate",
        description="Score a saved model on tasks of lm-evaluation-harness, which fetches their data on first use. A "
        "task of your own is a YAML file in the harness's format: a folder of them is searched before its list.",
        epilog="example: python -m lt2_ext.recipes.evaluate runs/book --tasks arc_easy,piqa --limit 100",
    )
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a run, a checkpoint, or a saved model")
    parser.add_argument("--tasks", default=PAPER, help=f"separated by commas, default those of the paper: {PAPER}")
    parser.add_argument("--task-folder", type=Path, help="folder with YAML files of tasks; only these are known then")
    parser.add_argument("--num-fewshot", type=int, help="solved examples before each question, default the task's")
    parser.add_argument("--limit", type=int, help="documents per task, for a quick look")
    parser.add_argument("--batch-size", type=int, default=8, help="default 8")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens that a question may have, default 2048")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    for name in ("limit", "batch_size", "max_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the harness forks
    try:
        import lm_eval
        import lm_eval.models.huggingface
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ModuleNotFoundError as e:
        raise UserError(f"evaluation needs {e.name} (pip install 'lm_eval[hf]')") from e
    if args.task_folder is not None and not args.task_folder.is_dir():
        raise UserError(f"--task-folder must be a folder, there is no {args.task_folder}")
    model = harness_model(args.model, args.device, args.batch_size, args.max_length)
    manager = TaskManager(
        include_path=None if args.task_folder is None else str(args.task_folder),
        include_defaults=args.task_folder is None,
    )
    tasks = args.tasks.split(",")
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks: there is no task {unknown[0]!r} in {args.task_folder or 'lm-evaluation-harness'}")
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        log_samples=False,
    )
    print(make_table(results))
    if args.out is not None:
        write(args.out, json.dumps(results["results"], indent=1, default=str) + "\n")
        print(f"results: {args.out}")
    return 0


def harness_model(path: Path, device: str, batch_size: int, max_length: int) -> Any:
    """The model in a folder as the harness takes it; every text begins with ``bos``, as in training."""
    from lm_eval.models.huggingface import HFLM

    from lt2_ext.models.hf import LT2ForCausalLM, LT2HFConfig

    class Harness(HFLM):
        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Without a ``bos`` from the tokenizer: here the harness puts one before each text itself, and the model
            would be asked to predict the second one."""
            self.add_bos_token = False
            try:
                return list(super().loglikelihood_rolling(requests, disable_tqdm))
            finally:
                self.add_bos_token = True

    folder = checkpoint.model_folder(path)
    tokenizer, model = text.load(folder), checkpoint.load_model(folder, device)
    with torch.device("meta"):
        wrapped = LT2ForCausalLM(LT2HFConfig(**model.config.to_dict()))
    wrapped.model = model
    return Harness(
        pretrained=wrapped.eval(),
        tokenizer=text.for_transformers(tokenizer),
        backend="causal",
        max_length=max_length,
        batch_size=batch_size,
        device=device,
        add_bos_token=True,
    )


if __name__ == "__main__":
    sys.exit(main())
