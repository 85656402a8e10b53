"""Decoding of many sequences at a time, which come, branch and go while others go on."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sampling import check_options, pick

if TYPE_CHECKING:
    from .lt2 import LT2

EAGER = 3  # steps of a bucket before it is captured: they allocate, and choose kernels


@dataclass(eq=False)
class Generation:
    """One sequence of an :class:`Engine`.

    Attributes:
        tokens: What it has produced.
        done: No more will come: it ended, or was cancelled.
        prompt: What is still to be read; slot: of the state; the rest: how tokens are chosen, and when it ends.
    """

    prompt: list[int]
    slot: int
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    eos_token_id: int | None
    random: Random
    tokens: list[int] = field(default_factory=list)
    done: bool = False


class Engine:
    """``slots`` sequences of up to ``max_length`` tokens in one :class:`LoopState`, decoded together::

        engine = Engine(model, slots=8, max_length=4096)
        a = engine.add(prompt, max_new_tokens=100)
        while not a.done:
            for generation, token in engine.step().items(): ...

    A sequence is what it would be alone, whatever the others do. On CUDA a step of all loops and layers and the choice
    of the tokens are one graph for each size in ``buckets``; smaller batches are filled up with free slots.

    Args:
        chunk: Tokens of prompts that a step reads at most.
        buckets: Batch sizes of decoding, 1 among them. Default: powers of two and ``slots`` on CUDA, else all sizes.

    Attributes:
        running: The sequences that are not done.
    """

    def __init__(
        self, model: LT2, slots: int, max_length: int, chunk: int = 512, buckets: Sequence[int] | None = None
    ) -> None:
        self.model, self.state, self.chunk = model, model.new_state(slots, max_length), chunk
        self.device = self.state.lengths.device
        self.cuda = self.device.type == "cuda"
        if buckets is None:
            buckets = [b for b in range(1, slots + 1) if not self.cuda or b & (b - 1) == 0 or b == slots]
        for name, ok, rule, value in (
            ("chunk", chunk >= 1, "be >= 1", chunk),
            ("buckets", 1 in buckets and max(buckets) <= slots, f"hold 1 and no more than {slots}", buckets),
        ):
            if not ok:
                raise ValueError(f"Engine: {name} must {rule}, got {value}")
        self.buckets = sorted(buckets)
        self.running: list[Generation] = []
        # Of each row of a step: its last token, its slot, and 1, or 0 where a free slot fills the batch up.
        self.rows = torch.zeros(3, slots, dtype=torch.int64, device=self.device)
        self.options = torch.zeros(4, slots, device=self.device)  # as pick reads them
        self.calls: Counter[tuple[int, bool]] = Counter()
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None

    def add(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int | None = None,
    ) -> Generation:
        """Start a sequence; options as in :meth:`LT2.generate`. The same seed gives the same draws.

        Raises:
            ValueError: Options or tokens outside the rules, or more tokens than ``max_length``.
            RuntimeError: All slots are held. Nothing has changed: cancel a sequence, or step until one ends.
        """
        check_options(max_new_tokens, temperature, top_k, top_p, "Engine.add")
        tokens: list[int] = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        room, known = self.state.max_length + 1, self.model.config.vocab_size  # the last token is never read
        wrong = [token for token in tokens if type(token) is not int or not 0 <= token < known]
        for name, ok, rule, value in (
            ("max_new_tokens", max_new_tokens >= 1, "be >= 1", max_new_tokens),
            ("prompt", len(tokens) >= 1, "have a token", tokens),
            ("prompt", not wrong, f"hold integers in 0..{known - 1}", wrong[:5]),
            ("prompt", len(tokens) + max_new_tokens <= room, f"fit {room} with max_new_tokens", len(tokens)),
        ):
            if not ok:
                raise ValueError(f"Engine.add: {name} must {rule}, got {value}")
        slot = self.state.assign()
        choice = (max_new_tokens, temperature, top_k, top_p, eos_token_id, Random(seed))
        self.running.append(Generation(tokens, slot, *choice))
        return self.running[-1]

    def fork(self, generation: Generation, seed: int | None = None) -> Generation:
        """A second sequence with the past of this one; with a seed it goes on with other draws.

        Raises:
            ValueError: It is done.
            RuntimeError: All slots are held; nothing has changed.
        """
        if generation.done:
            raise ValueError("Engine.fork: the sequence must be running, it is done")
        slot, random = self.state.fork(generation.slot), Random(seed)
        if seed is None:
            random.setstate(generation.random.getstate())
        prompt, tokens = list(generation.prompt), list(generation.tokens)
        self.running.append(replace(generation, prompt=prompt, slot=slot, random=random, tokens=tokens))
        return self.running[-1]

    def cancel(self, generation: Generation) -> None:
        """End a sequence, and free its slot; nothing happens to one that is done."""
        if not generation.done:
            generation.done = True
            self.running.remove(generation)
            self.state.release(generation.slot)

    @torch.no_grad()
    def step(self) -> dict[Generation, int]:
        """Read up to ``chunk`` tokens of the prompts that wait, and choose a token for every sequence that is ready."""
        ready = [g for g in self.running if not g.prompt]
        chosen = self._read([g for g in self.running if g.prompt])
        while ready:
            size = self._bucket(len(ready))
            chosen |= self._decode(ready[:size], size)
            ready = ready[size:]
        for generation, token in chosen.items():
            generation.tokens.append(token)
            if token == generation.eos_token_id or len(generation.tokens) == generation.max_new_tokens:
                self.cancel(generation)
        return chosen

    def _read(self, waiting: list[Generation]) -> dict[Generation, int]:
        """The next piece of the first prompt, and of others whose next is as long."""
        if not waiting:
            return {}
        count = min(len(waiting[0].prompt), self.chunk)
        alike = [g for g in waiting if min(len(g.prompt), self.chunk) == count][: self.chunk // count]
        ids = torch.tensor([g.prompt[:count] for g in alike], device=self.device)
        logits = self.model(ids, state=self.state, slots=[g.slot for g in alike], logits_to_keep=1)[:, -1]
        for generation in alike:
            del generation.prompt[:count]
        rows = [i for i, g in enumerate(alike) if not g.prompt]
        if not rows:
            return {}
        read = [alike[i] for i in rows]
        tokens = pick(logits[rows].float(), self._fill_options(read) if _drawn(read) else None)
        return dict(zip(read, tokens.tolist(), strict=True))

    def _bucket(self, rows: int) -> int:
        """The smallest that takes all rows, if enough slots are free; else the largest that they fill."""
        room = rows + len(self.state.free)
        wide = [b for b in self.buckets if rows <= b <= room]
        return wide[0] if wide else max(b for b in self.buckets if b <= rows)

    def _decode(self, rows: list[Generation], size: int) -> dict[Generation, int]:
        free = self.state.free[: size - len(rows)]
        slots, used = [g.slot for g in rows] + free, self.state.host_lengths
        after = [used[g.slot] + 1 for g in rows] + [0] * len(free)
        ids, real = [g.tokens[-1] for g in rows] + [0] * len(free), [1] * len(rows) + [0] * len(free)
        self.rows[:, :size] = torch.tensor([ids, slots, real])
        if drawn := _drawn(rows):
            self._fill_options(rows)
        if self.cuda and (length := self.model.config.reuse.segment):  # of a list of slots the model sees to it
            self.state.hand_over([g.slot for g in rows if used[g.slot] % length == 0])
        tokens = self._replay(size, drawn) if self.cuda else self._forward(size, drawn, slots)
        for slot, length in zip(slots, after, strict=True):
            used[slot] = length
        return dict(zip(rows, tokens.tolist(), strict=False))

    def _fill_options(self, rows: list[Generation]) -> Tensor:
        most = self.model.config.vocab_size
        values = [(g.random.random(), g.temperature, g.top_k or most, g.top_p or 1.0) for g in rows]
        return self.options[:, : len(rows)].copy_(torch.tensor(values).T)

    def _forward(self, size: int, drawn: bool, slots: list[int] | None = None) -> Tensor:
        """The next token of each row; on CUDA the host reads no slot."""
        ids, index, real = self.rows[:, :size]
        held = index if slots is None else slots
        logits = self.model(ids[:, None], state=self.state, slots=held, generated=True)[:, -1]
        self.state.lengths.index_add_(0, index, real - 1)  # free slots stay empty
        return pick(logits.float(), self.options[:, :size] if drawn else None)

    def _replay(self, size: int, drawn: bool) -> Tensor:
        key = size, drawn
        self.calls[key] += 1
        if self.calls[key] <= EAGER:
            return self._forward(size, drawn)
        if key not in self.graphs:
            gc.collect()  # graphs of an engine that is garbage, freed during this capture, would end it
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                tokens = self._forward(size, drawn)
            self.graphs[key] = graph, tokens
        self.graphs[key][0].replay()
        return self.graphs[key][1]


def _drawn(rows: list[Generation]) -> bool:
    return any(g.temperature > 0 for g in rows)
