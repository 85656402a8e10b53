"""Engine: every sequence is what it would be alone, through thousands of arrivals, branches and departures."""

import gc
import random

import pytest
import torch
from test_loop_cache import VOCAB, ids, make

from lt2_ext.models import Engine
from lt2_ext.models.sampling import pick

ROOM = 48


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def read(model, text: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of one forward; where tokens count as generated, the prompt at once and the others one by one."""
    if model.config.reuse.kv not in ("last", "mean"):
        return model(text)
    state = model.new_state(*text.shape)
    parts = [model(text[:, :prompt], state=state)]
    parts += [model(text[:, [t]], state=state, generated=True) for t in range(prompt, text.shape[1])]
    return torch.cat(parts, 1)


class Alone:
    """The oracle of one sequence: its prompt, and all that it should have said."""

    def __init__(self, prompt: list[int], seed: int, options: dict, said: list[int] | None = None) -> None:
        self.prompt, self.options, self.said = prompt, options, list(said or [])
        self.random = random.Random(seed)

    def check(self, model, tokens: list[int]) -> None:
        """That the model, which reads all of it at once, would choose the same tokens."""
        assert tokens[: len(self.said)] == self.said
        text = torch.tensor([self.prompt + tokens], device=next(model.parameters()).device)
        logits = read(model, text, len(self.prompt))[0, len(self.prompt) + len(self.said) - 1 : -1].float()
        options = self.options | {"top_k": self.options["top_k"] or VOCAB, "top_p": self.options["top_p"] or 1.0}
        rows = [(self.random.random(), options["temperature"], options["top_k"], options["top_p"]) for _ in logits]
        want = pick(logits, torch.tensor(rows, device=text.device).T).tolist() if rows else []
        assert tokens[len(self.said) :] == want


@pytest.mark.parametrize(
    "kind, buckets, operations",
    [pytest.param("interleaved", None, 10_000, marks=pytest.mark.slow),
     ("interleaved", (1, 4, 6), 1000), ("window", (1, 3), 500), ("dsa", None, 300),
     ("all_first", (1, 2, 4), 300), ("read_and_first", None, 300),
     ("segment_first", (1, 4, 6), 300)],
)  # fmt: skip
@torch.no_grad()
def test_random_operations_give_every_sequence_what_it_says_alone(kind, buckets, operations, device):
    """Every slot that becomes free is filled with NaN: none may ever be read."""
    operations = operations if device == "cpu" else 120
    churn(make(kind, 2).to(device), buckets, operations)


@pytest.mark.parametrize(
    "kind, reuse", [("interleaved", "kv:last"), ("dsa", "kv:mean"), ("hybrid_schedule", "kv:last")]
)
@torch.no_grad()
def test_random_operations_with_keys_of_generated_tokens(kind, reuse, device):
    model = make(kind, 2).to(device)
    model.config.state_reuse = reuse
    churn(model, (1, 4), 200 if device == "cpu" else 60)


@pytest.mark.parametrize("kind", ["interleaved", "segment_first"])
@torch.no_grad()
def test_steps_for_graphs_give_the_same(kind, monkeypatch):
    """The way that is captured on CUDA, where the host reads no slot, run without a graph."""
    monkeypatch.setattr("lt2_ext.models.engine.EAGER", 10**9)
    churn(make(kind, 2), (1, 2, 4, 6), 300, as_if_captured=True)


@pytest.mark.cuda
@torch.no_grad()
def test_an_older_engine_that_is_garbage_does_not_end_a_capture(monkeypatch):
    """Its graphs free their memory when the cycle that it is part of is collected, which any allocation may begin."""
    model, held = make("interleaved", 2).cuda(), []
    for _ in range(2):
        engine = Engine(model, 1, ROOM)
        engine.itself = engine
        generation = engine.add([1, 2], ROOM - 2)
        held.append(generation.tokens)
        capture = torch.cuda.graph.__enter__
        monkeypatch.setattr(torch.cuda.graph, "__enter__", lambda g, capture=capture: (capture(g), gc.collect()))
        while engine.running:
            engine.step()
        monkeypatch.undo()
        assert engine.graphs
        del engine, generation
    assert held[0] == held[1]


def churn(model, buckets, operations: int, as_if_captured: bool = False) -> None:
    rng = random.Random(0)
    engine = Engine(model, 6, ROOM, chunk=5, buckets=buckets)
    engine.cuda |= as_if_captured
    oracles, refused, steps = {}, 0, 0
    release = engine.state.release

    def poison(slot: int) -> None:
        release(slot)
        for t in (t for loop in engine.state.layers for layer in loop for t in layer.values()):
            t[slot] = torch.nan

    engine.state.release = poison
    for number in range(operations):
        operation = rng.choices(["step", "add", "fork", "cancel"], [60, 25, 10, 5])[0]
        running = list(engine.running)
        if operation == "step":
            before = {g: len(g.tokens) for g in running}
            chosen = engine.step()
            assert all(len(g.tokens) - n == (g in chosen) and (g not in chosen or g.tokens[-1] == chosen[g])
                       for g, n in before.items())  # fmt: skip
            steps += bool(chosen)
        elif operation == "cancel" and running:
            engine.cancel(rng.choice(running))
        elif operation == "add" or (operation == "fork" and running):
            if not engine.state.free:
                refused += 1
                with pytest.raises(RuntimeError, match="all 6 slots are held"):
                    engine.add([1], 1) if operation == "add" else engine.fork(rng.choice(running))
                assert engine.running == running
                assert len(running) == 6
                continue
            if operation == "add":
                prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 14))]
                options = {"temperature": rng.choice([0.0, 0.7, 1.5]), "top_k": rng.choice([None, 1, 9])}
                options |= {"top_p": rng.choice([None, 0.8]), "eos_token_id": rng.choice([None, 3])}
                new = engine.add(prompt, rng.randint(1, ROOM + 1 - len(prompt)), **options, seed=number)
                oracles[new] = Alone(prompt, number, options)
            else:
                old = rng.choice(running)
                new = engine.fork(old, seed=number)
                past = oracles[old]
                oracles[new] = Alone(past.prompt, number, past.options, old.tokens)
    while engine.running:
        engine.step()
    assert refused > operations / 100
    assert steps > operations / 4
    assert sorted(engine.state.free) == list(range(6))
    for generation, oracle in oracles.items():
        assert generation.done
        oracle.check(model, generation.tokens)


@torch.no_grad()
def test_fork_goes_on_alike_or_with_other_draws(device):
    engine = Engine(make("interleaved", 2).to(device), 4, ROOM, chunk=4)
    first = engine.add(ids(1, 9)[0], 20, temperature=1.0, seed=1)
    engine.step()
    reading = engine.fork(first)  # in the middle of its prompt
    for _ in range(6):
        engine.step()
    twin, other = engine.fork(first), engine.fork(first, seed=2)
    common = list(first.tokens)
    while engine.running:
        engine.step()
    assert first.tokens == twin.tokens == reading.tokens
    assert other.tokens[: len(common)] == common
    assert other.tokens != first.tokens


def test_a_prompt_is_read_in_chunks_while_others_go_on():
    model = make("gdn", 1)
    engine, sizes = Engine(model, 3, ROOM, chunk=4), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    short, long = engine.add([1, 2], 9), engine.add(range(10), 2)
    twin = engine.add([3, 4], 1)
    engine.step()  # both short prompts together
    assert sizes == [(2, 2)]
    assert (len(short.tokens), twin.done) == (1, True)
    for _ in range(3):
        engine.step()
    assert sizes[1:] == [(1, 4), (1, 1), (1, 4), (1, 1), (1, 2), (1, 1)]
    assert (len(short.tokens), len(long.tokens)) == (4, 1)


def test_batches_are_filled_up_with_free_slots_only():
    model = make("gdn", 1)
    engine, sizes = Engine(model, 4, ROOM, chunk=1, buckets=(1, 2, 4)), []
    generations = [engine.add([i], 40) for i in range(3)]
    for _ in range(3):
        engine.step()
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    engine.step()
    assert sizes == [4]
    engine.add(range(30), 1)  # holds the last slot, and is not ready: 3 = 2 + 1
    sizes.clear()
    engine.step()
    assert sizes == [1, 2, 1]
    engine.cancel(generations[0])
    engine.cancel(generations[0])
    sizes.clear()
    engine.step()
    assert sizes == [1, 2]
    assert engine.state.host_lengths == engine.state.lengths.tolist()


def test_misuse():
    engine = Engine(make("gdn", 1), 1, 8)
    for arguments, message in (
        (([], 1), r"prompt must have a token, got \[\]"),
        (([1, 64], 1), r"prompt must hold integers in 0\.\.63, got \[64\]"),
        (([1, 2.0], 1), r"prompt must hold integers in 0\.\.63, got \[2.0\]"),
        (([1], 0), "max_new_tokens must be >= 1, got 0"),
        (([1] * 5, 5), "prompt must fit 9 with max_new_tokens, got 5"),
        (([1], 1, -1.0), "temperature must be >= 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=f"Engine.add: {message}"):
            engine.add(*arguments)
    assert engine.state.free == [0]
    whole = engine.add([1] * 5, 4)
    with pytest.raises(RuntimeError, match="all 1 slots are held"):
        engine.add([1], 1)
    with pytest.raises(RuntimeError, match="all 1 slots are held"):
        engine.fork(whole)
    while engine.running:
        engine.step()
    assert len(whole.tokens) == 4
    with pytest.raises(ValueError, match="the sequence must be running, it is done"):
        engine.fork(whole)
    assert engine.step() == {}
    with pytest.raises(ValueError, match="Engine: buckets must hold 1 and no more than 2, got"):
        Engine(make("gdn", 1), 2, 8, buckets=(2,))
    with pytest.raises(ValueError, match="Engine: chunk must be >= 1, got 0"):
        Engine(make("gdn", 1), 2, 8, chunk=0)
