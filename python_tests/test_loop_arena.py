"""LoopState as one allocation of slots: sequences of different lengths decoded together, slots given out, forked,
saved and put back, and nothing of one sequence ever visible to another."""

import random

import pytest
import torch
from test_loop_cache import KINDS, VOCAB, error, ids, make, stream

from lt2_ext.models import LT2

ROOM = 40


@pytest.fixture(autouse=True)
def _small(threads, monkeypatch):
    threads(1)
    monkeypatch.setattr("lt2_ext.models.mixers.attention.MIN_BLOCK", 4)


def alone(model: LT2, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Logits of ``new`` [1, T] after ``past`` [1, P], from one forward without a state."""
    return model(torch.cat((past, new), 1))[:, past.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_in_one_aligned_allocation(kind):
    model = make(kind, 2)
    state = model.new_state(3, ROOM)
    start, end = state.arena.data_ptr(), state.arena.data_ptr() + state.arena.nbytes
    tensors = [t for loop in state.layers for layer in loop for t in layer.values()]
    for number, t in enumerate(tensors, 1):
        assert t.shape[0] == 3
        assert start <= t.data_ptr() < end
        assert (t.data_ptr() - start) % 256 == 0
        assert t.stride(0) * t.element_size() == state.arena.stride(0)
        assert t[0].is_contiguous()
        t.fill_(number)
    for number, t in enumerate(tensors, 1):  # none overlaps another
        assert bool((t == number).all())
    assert sum(state.kind_nbytes.values()) == state.nbytes <= state.arena.nbytes < state.nbytes + 3 * 256 * len(tensors)


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_slots_of_different_lengths_decode_together(kind, loops):
    """Prompts one by one into scattered slots, then steps and longer pieces of several at a time, in any order."""
    model, state, rng = make(kind, loops), make(kind, loops).new_state(5, ROOM), random.Random(0)
    texts = {slot: ids(1, length, seed=slot) for slot, length in ((3, 11), (0, 2), (4, 17))}
    for slot, text in texts.items():
        got = torch.cat([model(piece, state=state, slots=[slot]) for piece in text.split(7, 1)], 1)
        assert error(got, model(text)) < 1e-4
    for count in (1, 1, 3, 1, 9, 1):
        slots = rng.sample(sorted(texts), rng.randint(2, 3))
        piece = torch.randint(VOCAB, (len(slots), count))
        named = torch.tensor(slots) if count == 1 else slots
        if count == 1 and (length := model.config.reuse.segment):  # which a tensor leaves to the caller
            state.hand_over([slot for slot in slots if state.host_lengths[slot] % length == 0])
        got = model(piece, state=state, slots=named)
        if count == 1:
            for slot in slots:  # the host reads no tensor
                state.host_lengths[slot] += 1
        for row, slot in enumerate(slots):
            assert error(got[row, None], alone(model, texts[slot], piece[row, None])) < 1e-4, (slot, count)
            texts[slot] = torch.cat((texts[slot], piece[row, None]), 1)
    lengths = [texts[slot].shape[1] if slot in texts else 0 for slot in range(5)]
    assert state.lengths.tolist() == state.host_lengths == lengths
    assert not state.arena[1].any()
    assert not state.arena[2].any()


@pytest.mark.parametrize("kind", ["interleaved", "window", "dsa_reuse"])
@torch.no_grad()
def test_fork_snapshot_and_restore(kind):
    model = make(kind, 2)
    state, x, y = model.new_state(3, ROOM), ids(1, 9), ids(2, 6, seed=2)
    first = state.assign()
    model(x, state=state, slots=[first])
    saved = state.snapshot([first])
    second = state.fork(first)
    assert (first, second, state.free) == (0, 1, [2])
    both = model(y, state=state, slots=[second, first])
    for row in range(2):
        assert error(both[row, None], alone(model, x, y[row, None])) < 1e-4
    for slot in (second, 2):  # back to the end of x: in place, and elsewhere
        state.restore(saved, [slot])
        assert state.lengths[slot] == state.host_lengths[slot] == 9
        assert torch.equal(state.arena[slot], saved.memory[0])
    again = model(y, state=state, slots=[2, second])
    assert error(again, both) < 1e-5
    with pytest.raises(ValueError, match=r"restore: the snapshot must have shape \[2, .*\], got \[1, "):
        state.restore(saved, [0, 1])
    longer = model.new_state(1, ROOM + 64)
    if longer.arena.shape[1] != state.arena.shape[1]:
        with pytest.raises(ValueError, match=r"restore: the snapshot must have shape"):
            longer.restore(saved, [0])


@pytest.mark.parametrize("kind, segment", [("segment", 5), ("segment_of_one", 1), ("segment_first", 9)])
@torch.no_grad()
def test_between_segments_a_snapshot_has_one_matrix(kind, segment):
    model, x, y = make(kind, 3), ids(1, 2 * segment), ids(1, 11, seed=2)
    state = model.new_state(2, ROOM)
    start = state.snapshot([0])
    model(x, state=state, slots=[0])
    saved = state.snapshot([0])
    matrices = state.kind_nbytes["matrix"] // 2  # a multiple of 256 bytes each
    assert start.memory.shape[1] - saved.memory.shape[1] == 2 * matrices // 3
    want = model(y, state=state, slots=[0])
    state.arena.view(torch.float32).fill_(torch.nan)
    state.restore(saved, [1])
    assert error(model(y, state=state, slots=[1]), want) < 1e-5
    assert error(want, alone(model, x, y)) < 1e-4
    whole = state.snapshot([1])
    if segment > 1:  # in the middle of a segment every loop has its own
        assert (x.shape[1] + y.shape[1]) % segment
        assert whole.memory.shape == start.memory.shape


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["segment", "interleaved"])
@torch.no_grad()
def test_memory_of_a_gpu_is_that_of_the_arena(kind):
    """From the state to the end of a text of many segments: nothing of a state is kept elsewhere."""
    model, x = make(kind, 3).cuda(), ids(4, 40).cuda()
    model(x[:, :5], state=model.new_state(4, ROOM))  # what libraries take at first
    before = torch.cuda.memory_allocated()
    state = model.new_state(4, 1 << 16)
    assert 0 <= torch.cuda.memory_allocated() - before - state.arena.nbytes < 4096
    for piece in x.split(3, dim=1):
        model(piece, state=state)
    assert torch.cuda.memory_allocated() - before - state.arena.nbytes < 4096


@torch.no_grad()
def test_a_full_state_refuses_and_loses_nothing():
    model = make("interleaved", 2)
    state = model.new_state(2, ROOM)
    assert [state.assign(), state.assign()] == [0, 1]
    model(ids(2, 8), state=state)
    before = state.arena.clone()
    for action in (state.assign, lambda: state.fork(0)):
        with pytest.raises(RuntimeError, match="LoopState: all 2 slots are held; release one first"):
            action()
    assert torch.equal(state.arena, before)
    assert state.host_lengths == state.lengths.tolist() == [8, 8]
    state.release(0)
    with pytest.raises(ValueError, match="release: slot 0 is free already"):
        state.release(0)
    assert state.assign() == 0
    assert state.host_lengths == state.lengths.tolist() == [0, 8]
    assert not state.arena[0].any()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_of_the_last_sequence_is_visible(kind):
    """A NaN in the slot that a sequence leaves, and in every other: all are gone, or seen by no token."""
    model, x = make(kind, 2), ids(1, 21)
    state = model.new_state(3, ROOM)
    for t in (t for loop in state.layers for layer in loop for t in layer.values()):
        t.fill_(torch.nan)
    slot = state.assign()
    got = torch.cat([model(piece, state=state, slots=[slot]) for piece in x.split([12, 1, 8], 1)], 1)
    assert torch.equal(got, stream(model, x, [12, 1, 8]))


def test_misuse():
    model, x = make("gdn", 1), ids(2, 4)
    state = model.new_state(4, 8)
    for slots, message in (
        ([0], "input_ids must have the 1 rows that slots names"),
        ([1, 1], r"slots must be different ints in 0\.\.3, got \[1, 1\]"),
        ([1, 4], r"slots must be different ints in 0\.\.3, got \[1, 4\]"),
        ([-1, 0], r"slots must be different ints in 0\.\.3, got \[-1, 0\]"),
        (torch.tensor([0]), r"slots must be int64 \[2\]"),
        (torch.tensor([0, 1], dtype=torch.int32), r"slots must be int64 \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, state=state, slots=slots)
    with pytest.raises(ValueError, match="slots must be None without a state"):
        model(x, slots=[0, 1])
    model(x, state=state, slots=[0, 2])
    with pytest.raises(ValueError, match="input_ids must fit max_length = 8 of the state, which holds 4 tokens, got 5"):
        model(ids(2, 5), state=state, slots=[2, 3])
    model(ids(2, 8), state=state, slots=[1, 3])
    assert state.host_lengths == [4, 8, 4, 8]
    for method in (state.release, state.fork, lambda slot: state.snapshot([slot])):
        with pytest.raises(ValueError, match=r"slots must be integers in 0\.\.3, got 4"):
            method(4)
