"""State tracking: the word problem of the group S3, solved at every position of a sequence.

Tokens are a swap and a rotation of three things, and the label of token t is the order in which tokens 0..t leave them.
Swaps and rotations do not commute: nothing short of following the state along the whole sequence gives the answer, and
one mistake makes every later label a guess (1 in 6).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lt2_ext.models import LT2, LT2Config

SHORTEST, LONGEST = 4, 16  # word lengths at the start and at the end of the curriculum
RAMP = 0.6  # share of the time after which the longest words are reached
BATCH, LEARNING_RATE = 32, 5e-3
TEST_WORDS = 1024


GENERATORS = ((1, 0, 2), (1, 2, 0))  # the swap of the first two, and the rotation


def symmetric_group(n: int) -> tuple[list[tuple[int, ...]], Tensor]:
    """The permutations of ``range(n)``, identity first, and their product table ``[n!, n!]``: ``table[a, b]`` is the
    index of "first b, then a"."""
    elements = list(itertools.permutations(range(n)))
    index = {p: i for i, p in enumerate(elements)}
    return elements, torch.tensor([[index[tuple(a[i] for i in b)] for b in elements] for a in elements])


def sample_words(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random words over ``GENERATORS`` ``[count, length]`` and the products of all their prefixes, same shape."""
    elements, table = symmetric_group(3)
    words = torch.randint(len(GENERATORS), (count, length), generator=generator)
    letters = torch.tensor([elements.index(g) for g in GENERATORS])[words]
    products = [letters[:, 0]]
    for t in range(1, length):
        products.append(table[products[-1], letters[:, t]])
    return words, torch.stack(products, 1)


@dataclass
class Run:
    """One model in training: ``accuracy[t]`` is its share of right products of t + 1 elements, on new words."""

    loops: int
    model: LT2
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    seconds: float = 0.0
    steps: int = 0
    accuracy: list[float] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Without the gates between loops (one vector per loop), which are all that the number of loops changes."""
        return sum(p.numel() for name, p in self.model.named_parameters() if name != "rho")


def train(loop_counts: Sequence[int], seconds: float, tick: Callable[[float], object]) -> list[Run]:
    """Train one block, looped ``loop_counts`` times, on the same words for ``seconds`` each; ``tick`` is told the
    seconds that each step took. The models take turns, so that a change of the machine's load meets all of them."""
    runs = [new_run(loops) for loops in loop_counts]
    while (run := min(runs, key=lambda r: r.seconds)).seconds < seconds:
        start = time.perf_counter()
        step(run, run.seconds / seconds)
        took = time.perf_counter() - start
        run.seconds += took
        tick(took)
    for run in runs:
        run.accuracy = evaluate(run.model)
    return runs


def new_run(loops: int) -> Run:
    config = LT2Config(
        vocab_size=math.factorial(3),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=256,
        layer_pattern="gdn",
        loop_count=loops,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)  # the same weights for every number of loops
    model = LT2(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    return Run(loops, model, optimizer, torch.Generator().manual_seed(1))


def step(run: Run, progress: float) -> None:
    length = SHORTEST + round((LONGEST - SHORTEST) * min(1, progress / RAMP))
    for group in run.optimizer.param_groups:
        group["lr"] = LEARNING_RATE * min(1, (run.steps + 1) / 20) * (1 + math.cos(math.pi * progress)) / 2
    words, products = sample_words(BATCH, length, run.generator)
    loss = F.cross_entropy(run.model(words).flatten(0, 1), products.flatten())
    run.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.steps += 1


@torch.no_grad()
def evaluate(model: LT2) -> list[float]:
    words, products = sample_words(TEST_WORDS, LONGEST, torch.Generator().manual_seed(2))
    return (model(words).argmax(-1) == products).float().mean(0).tolist()
