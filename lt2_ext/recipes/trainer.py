"""One step of training, evaluation, and all that has to survive a crash between two steps."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lt2_ext.models import LT2, LT2Config, LT2Output

from . import checkpoint, text
from .files import UserError
from .instruments import grad_norms, probe, watch_loops
from .rows import Batch, Rows
from .settings import Run
from .shards import Split

BYTES_PER_PARAMETER = 16  # fp32 weight, gradient, two moments of AdamW


class Trainer:
    """The model, its optimizer and the position in the data. ``step`` counts finished steps."""

    def __init__(
        self, run: Run, config: LT2Config, splits: dict[str, Split], tokenizer: text.Tokenizer, data_sum: int
    ) -> None:
        self.run, self.tokenizer, self.data_sum, self.step = run, tokenizer, data_sum, 0
        self.device = torch.device(run.train.device)
        t, length = run.train, run.data.sequence_length
        self.rows_per_step = t.batch_size * t.grad_accumulation
        self.tokens_per_step = self.rows_per_step * length
        self.rows = Rows(splits["train"], length, run.train.seed)
        self.held_out = Rows(splits["held_out"], length, None) if len(splits["held_out"]) >= length else None
        check_memory(config, self.device)
        torch.manual_seed(run.train.seed)
        self.use(LT2(config))

    def use(self, model: LT2) -> None:
        model = model.to(self.device)
        model.gradient_checkpointing = self.run.train.gradient_checkpointing
        o = self.run.optimizer
        matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        decayed = [p for p in model.parameters() if id(p) in matrices]
        others = [p for p in model.parameters() if id(p) not in matrices]
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.model = model
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)

    def learning_rate(self) -> float:
        """Of the step to come: linear warm-up, then half a cosine down to ``final_lr`` of the peak."""
        o, steps, warmup = self.run.optimizer, self.run.train.steps, self.run.optimizer.warmup_steps or 0
        if self.step < warmup:
            return o.lr * (self.step + 1) / warmup
        progress = (self.step + 1 - warmup) / max(1, steps - warmup)
        return o.lr * (o.final_lr + (1 - o.final_lr) * (1 + math.cos(math.pi * progress)) / 2)

    def train_step(self, watch: bool) -> dict[str, Any]:
        """One update of the weights; what happened, with the instruments if ``watch``.

        Raises:
            UserError: The loss or the gradient is not finite; the weights are unchanged.
        """
        t, lr = self.run.train, self.learning_rate()
        position = self.step * self.rows_per_step
        batches = [
            self.rows.batch(position + i * t.batch_size, t.batch_size, self.run.data.isolate_documents)
            for i in range(t.grad_accumulation)
        ]
        targets = sum(b.targets for b in batches)
        total, index_total = torch.zeros(2, device=self.device)
        self.model.dense_warmup = self.step < t.dense_warmup_steps
        instruments: dict[str, Any] = {}
        for i, batch in enumerate(batches):
            if watch and i == 0:
                with watch_loops(self.model) as sizes:
                    out = self.run_model(batch)
                instruments["residual_rms"] = [float(s) for s in sizes]
            else:
                out = self.run_model(batch)
            share = batch.targets / targets
            (out.loss * share).backward()
            total += out.loss.detach() * share
            if out.index_loss is not None:
                index_total += out.index_loss.detach() * share
        if watch:
            instruments["grad_norms"] = grad_norms(self.model)
            instruments |= probe(self.model, batches[0].tokens[:1].to(self.device))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.optimizer.clip or math.inf)
        step = self.step + 1
        values = {"loss": float(total - self.model.config.index_loss_weight * index_total), "grad_norm": float(norm)}
        if "dsa" in self.model.config.layer_types:
            values["index_loss"] = float(index_total)
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} in step {step}; begin again in another folder (out=...) with a lower "
                    "optimizer.lr or more optimizer.warmup_steps"
                )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = step
        return {"step": step, "tokens": step * self.tokens_per_step, **values, "lr": lr, **instruments}

    def run_model(self, batch: Batch) -> LT2Output:
        tokens = batch.tokens.to(self.device)
        bounds = None if batch.cu_seqlens is None else batch.cu_seqlens.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.train.dtype == "bf16"):
            return self.model(tokens, labels=tokens, cu_seqlens=bounds)

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss over the held-out rows, or None where there are none."""
        if self.held_out is None or not self.run.train.eval_rows:
            return None
        count, size = min(self.held_out.count, self.run.train.eval_rows), self.run.train.batch_size
        total, targets = 0.0, 0
        for start in range(0, count, size):
            batch = self.held_out.batch(start, min(size, count - start), self.run.data.isolate_documents)
            total += float(self.run_model(batch).loss) * batch.targets
            targets += batch.targets
        return total / targets

    def save(self, folder: Path) -> Path:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "step": self.step,
            "position": self.step * self.rows_per_step,
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
            "data": self.data_sum,
        }
        return checkpoint.save(folder, self.model, self.tokenizer, state, self.run.train.keep_checkpoints)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: It is broken, or belongs to another model, other data or other settings.
        """
        checkpoint.verify(folder)
        state = checkpoint.read_trainer(folder)
        if state.get("data") != self.data_sum:
            raise UserError(f"{folder} was trained on other data than {self.run.data.path}")
        model = checkpoint.load_model(folder)
        if model.config != self.model.config:
            raise UserError(f"{folder} holds another model than the settings say")
        step = state.get("step")
        position = state.get("position")
        if type(step) is not int or not 0 <= step <= self.run.train.steps or position != step * self.rows_per_step:
            raise UserError(f"{folder / checkpoint.TRAINER}: step and position must fit train.steps and batch_size")
        self.use(model)
        checkpoint.load_optimizer(self.optimizer, state.get("optimizer", {}), folder)
        try:
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except (KeyError, TypeError, RuntimeError) as e:
            raise UserError(f"{folder / checkpoint.TRAINER}: rng must be that of {self.device.type} ({e})") from e
        self.step = step


def count_parameters(config: LT2Config) -> int:
    """Without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in LT2(config).parameters())


def check_memory(config: LT2Config, device: torch.device) -> None:
    """Refuse a model that cannot fit, before anything is allocated."""
    needed = count_parameters(config) * BYTES_PER_PARAMETER
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"training this model needs at least {needed / 1e9:,.1f} GB for weights, gradients and AdamW, and {device} "
            f"has {there / 1e9:,.1f} GB; lower the sizes of model"
        )
