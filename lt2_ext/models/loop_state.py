"""What a looped model remembers between calls, and where the tokens of one call stand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from lt2_ext import ops

from .reuse import KINDS

if TYPE_CHECKING:
    from .config import LT2Config
    from .mixers import Mixer, State

X = TypeVar("X")
# Which slots the rows of a call continue: all in order; those of a list; those of a tensor int64 [B], which the host
# does not read, so that a captured graph can be replayed for others.
Slots: TypeAlias = "Sequence[int] | Tensor | None"
MAX_STEP, MAX_STEP_ROWS = 8, 16  # most tokens of a sequence, and of all, that are decoded with operators of their own
ALIGNMENT = 256  # bytes: of vector loads and bulk copies


class Snapshot(NamedTuple):
    """What some slots of a LoopState held: memory uint8 ``[n, bytes of a slot]``, or of its first ``kept_nbytes``;
    lengths ``[n]``, host_lengths."""

    memory: Tensor
    lengths: Tensor
    host_lengths: list[int]


class LoopState:
    """The memory of ``batch_size`` sequences of up to ``max_length`` tokens, one allocation. Inference only.

    Nothing but the hidden state passes from one loop to the next, so each (loop, layer) has a memory of its own:
    ``gdn`` a matrix fp32 ``[batch, value_heads, K, V]`` and the window of its convolution, ``full`` keys and values
    ``[batch, max_length, kv_heads, head_dim]``, ``window`` the newest of these only, ``dsa`` also those of its index;
    what ``state_reuse`` lets later loops read from the first one, these do not have. ``model(input_ids, state=state)``
    reads it and advances it in place; any split of a sequence into such calls gives the logits of one call.

    Each sequence has a slot, one row of the allocation. Slots hold sequences of different lengths; a call may name the
    slots that its rows continue (``slots=``).

    Attributes:
        arena: All of it, uint8 ``[batch_size, bytes of a slot]``.
        layers: ``layers[loop][layer]``, the tensors of one mixer by name, in the arena; axis 0 is the slot.
        lengths: Tokens seen by each sequence, int64 ``[batch_size]`` on the device of the model.
        host_lengths: The same and padding, where reading it costs no synchronisation: the room that is used.
        free: Slots that :meth:`assign` has not given out.
        kept_nbytes: Bytes of a slot that a snapshot has between segments of ``gdn:segment``; else those of the slot.
    """

    def __init__(self, config: LT2Config, mixers: Sequence[Mixer], batch_size: int, max_length: int) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if type(value) is not int or value < 1:
                raise ValueError(f"LoopState: {name} must be a positive integer, got {value!r}")
        self.config, self.batch_size, self.max_length = config, batch_size, max_length
        self.layers: list[list[State]] = [
            [
                {n: t for n, t in m.new_state(0, max_length, layer.window).items() if loop == 0 or n not in m.reused}
                for m, layer in zip(mixers, layers, strict=True)
            ]
            for loop, layers in enumerate(config.schedule())
        ]

        def spare(part: tuple[int, State, str]) -> bool:  # between segments all have the matrices of the last loop
            return config.reuse.segment > 0 and part[2] == "matrix" and part[0] < config.loop_count - 1

        parts = [(loop, layer, name) for loop, layers in enumerate(self.layers) for layer in layers for name in layer]
        parts.sort(key=spare)
        sizes = [_padded(layer[name]) for _, layer, name in parts]
        self.kept_nbytes = sum(size for size, part in zip(sizes, parts, strict=True) if not spare(part))
        device = next(mixers[0].parameters()).device
        self.arena = torch.zeros(batch_size, sum(sizes), dtype=torch.uint8, device=device)
        for (_, layer, name), column in zip(parts, self.arena.split(sizes, dim=1), strict=True):
            layer[name] = _view(column, layer[name])
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.host_lengths = [0] * batch_size
        self.free = list(range(batch_size))

    def advance(self, tokens: int, padding: Tensor | int = 0, slots: Slots = None) -> None:
        """Count ``tokens`` more places in the sequences ``slots``, ``padding`` (an int or one for each) of them empty.

        Slots in a tensor are not read: ``host_lengths`` is left to the caller."""
        if slots is None:
            self.lengths += tokens - padding
        else:
            index = torch.as_tensor(slots, device=self.lengths.device)
            self.lengths[index] += tokens - padding
        if not isinstance(slots, Tensor):
            for slot in range(self.batch_size) if slots is None else slots:
                self.host_lengths[slot] += tokens

    def assign(self) -> int:
        """A slot that was free, zeroed.

        Raises:
            RuntimeError: All slots are held; nothing has changed.
        """
        slot = self._take()
        self.reset([slot])
        return slot

    def release(self, slot: int) -> None:
        """Make a slot free that :meth:`assign` or :meth:`fork` gave; it is zeroed when it is assigned again."""
        self._check("release", [slot])
        if slot in self.free:
            raise ValueError(f"LoopState.release: slot {slot} is free already")
        self.free.append(slot)
        self.lengths[slot] = self.host_lengths[slot] = 0

    def fork(self, src: int) -> int:
        """A slot that was free and now holds what ``src`` does: the two go on independently.

        Raises:
            RuntimeError: All slots are held; nothing has changed.
        """
        self._check("fork", [src])
        slot = self._take()
        self.restore(Snapshot(self.arena[src, None], self.lengths[src, None], [self.host_lengths[src]]), [slot])
        return slot

    def snapshot(self, slots: Sequence[int]) -> Snapshot:
        """A copy of these slots, for :meth:`restore`. Of sequences that are all at the end of a segment of
        ``gdn:segment`` it has one matrix for all loops."""
        self._check("snapshot", slots)
        index = torch.tensor(slots, dtype=torch.int64, device=self.lengths.device)
        lengths, segment = self.lengths[index], self.config.reuse.segment
        ended = segment > 0 and bool(((lengths > 0) & (lengths % segment == 0)).all())
        memory = self.arena[:, : self.kept_nbytes] if ended else self.arena
        return Snapshot(memory[index], lengths, [self.host_lengths[slot] for slot in slots])

    def restore(self, snapshot: Snapshot, slots: Sequence[int]) -> None:
        """Go on in ``slots`` with what a snapshot of as many slots holds, in a state of the same model and length."""
        self._check("restore", slots)
        want, got = [len(slots), self.arena.shape[1]], list(snapshot.memory.shape)
        if got not in (want, [len(slots), self.kept_nbytes]):
            raise ValueError(f"LoopState.restore: the snapshot must have shape {want}, got {got}")
        for i, slot in enumerate(slots):
            self.arena[slot, : got[1]].copy_(snapshot.memory[i])
            self.lengths[slot].copy_(snapshot.lengths[i])
            self.host_lengths[slot] = snapshot.host_lengths[i]
        if got != want:
            self.hand_over(slots)

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Forget the sequences ``slots`` (default: all), so that new ones can start there.

        Memory is zeroed, not only marked as free: the next sequence can never see a value of the last one, and a NaN
        in an unused key would survive its zero attention weight.
        """
        slots = range(self.batch_size) if slots is None else slots
        self._check("reset", slots)
        index = torch.tensor(slots, dtype=torch.int64, device=self.lengths.device)
        ops.loop_state_zero_(self.arena, index)
        self.lengths[index] = 0
        for slot in slots:
            self.host_lengths[slot] = 0

    def hand_over(self, slots: Sequence[int]) -> None:
        """Every loop goes on with the matrices of the last one, as at the start of a segment of ``gdn:segment``."""
        if not slots:
            return
        index = torch.tensor(slots, dtype=torch.int64, device=self.lengths.device)
        for loop in self.layers[:-1]:
            for mine, last in zip(loop, self.layers[-1], strict=True):
                if "matrix" in mine:
                    mine["matrix"][index] = last["matrix"][index]

    def merge_keys(self, tokens: Tokens) -> None:
        """``kv:last``, ``kv:mean``: from now on every loop reads of these tokens the keys and values that the last loop
        wrote, or their mean over the loops; without such a mode nothing."""
        if self.config.reuse.kv not in ("last", "mean"):
            return

        def place(cache: Tensor) -> tuple[Tensor, Tensor]:
            size = cache.shape[1]
            return tokens.rows, tokens.once(("places", size), lambda: tokens.index % size)

        for loops, mixer in zip(zip(*self.layers, strict=True), self.config.layer_types, strict=True):
            for name in ("k", "v") if mixer in KINDS["kv"][0] else ():
                caches = [layer[name] for layer in loops]
                if self.config.reuse.kv == "last":
                    *caches, last = caches
                    new = last[place(last)]
                else:
                    rows = torch.stack([cache[place(cache)] for cache in caches])
                    new = rows.mean(0, dtype=torch.float32).to(rows.dtype)
                for cache in caches:
                    cache[place(cache)] = new

    def reorder(self, order: Tensor) -> None:
        """Go on in slot b with what slot ``order[b]`` (int ``[batch_size]``) holds, as beam search does."""
        source, slots = order.to(torch.int64), torch.arange(self.batch_size, device=order.device)
        if source.shape != slots.shape:
            raise ValueError(f"LoopState.reorder: order must have shape [{len(slots)}], got {list(order.shape)}")
        for tensor in self._tensors():  # one by one: what is copied at a time exists twice
            ops.loop_state_copy_(tensor, source, slots)
        self.lengths.copy_(self.lengths[source])
        if len(set(self.host_lengths)) > 1:  # else nothing changes, and the order need not come to the host
            self.host_lengths = [self.host_lengths[i] for i in source.tolist()]

    @property
    def layer_nbytes(self) -> list[tuple[str, int]]:
        """For each physical layer its mixer in the first loop, and the bytes of its memory over all loops."""
        sizes = [[sum(t.nbytes for t in layer.values()) for layer in loop] for loop in self.layers]
        return list(zip(self.config.layer_types, map(sum, zip(*sizes, strict=True)), strict=True))

    @property
    def kind_nbytes(self) -> dict[str, int]:
        """Bytes by the name of the tensors: ``matrix``, ``conv``, ``k``, ``v``, ``index_k``."""
        kinds: Counter[str] = Counter()
        for layer in (layer for loop in self.layers for layer in loop):
            kinds.update({name: t.nbytes for name, t in layer.items()})
        return dict(kinds)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; ``arena.nbytes`` also counts what aligns them."""
        return sum(t.nbytes for t in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        return (t for loop in self.layers for layer in loop for t in layer.values())

    def _take(self) -> int:
        if not self.free:
            raise RuntimeError(f"LoopState: all {self.batch_size} slots are held; release one first")
        return self.free.pop(0)

    def _check(self, method: str, slots: Sequence[int]) -> None:
        for slot in slots:
            if type(slot) is not int or not 0 <= slot < self.batch_size:
                rule = f"slots must be integers in 0..{self.batch_size - 1}"
                raise ValueError(f"LoopState.{method}: {rule}, got {slot!r}")


def _padded(t: Tensor) -> int:
    """Bytes of one slot of t ``[0, ..]`` in the arena."""
    size = t.element_size() * math.prod(t.shape[1:])
    return size + -size % ALIGNMENT


def _view(column: Tensor, t: Tensor) -> Tensor:
    """A column of the arena as ``[slots, ..]``, of the shape and dtype of t ``[0, ..]``.

    It counts as a storage of its own (except on the device meta), or compiled code could not write to two of them.
    """
    size = t.element_size() * math.prod(t.shape[1:])
    view = column[:, :size].view(t.dtype).view(len(column), *t.shape[1:])
    return view if view.is_meta else torch.from_dlpack(view)


class Tokens:
    """Where the ``T`` tokens of one call stand: computed once, read by every layer in every loop.

    Attributes:
        index: Place of each token in its sequence or packed row, int64 ``[B or 1, T]``; < 0 for padding on the left.
        first: First place of its document, ``[B or 1, T]``.
        positions: index - first, for the rotary embedding.
        cu_seqlens: Document boundaries ``[N + 1]`` of a packed row, or None.
        pads: Which tokens are padding, bool ``[B, T]``, or None; ``padding``: how many on the left of each row.
        bounds: Those of the documents after :meth:`pack`: cu_seqlens, or with padding and without a state those of the
            tokens of each row and of its padding; ``offset``: with a state the place of the first token of each row.
        step: These are a few tokens after others, without padding: of a decode step.
        dense, trained: Whether selecting mixers see all keys, and whether their indexers are trained.
        plain: Every row is one sequence without padding.
        slots: With a state, the slot of each row, int64 ``[B]``, or None: row b has slot b.
        rows, lengths, max_length: With a state only: the slots ``[B, 1]``, lengths after this call ``[B]``, and room.
        visible: The largest number of tokens that any of these can see.
        segment: These are the tokens from ``start`` of every row, and states are not changed in place: a mixer is given
            the state before them ({}: empty), and returns that after them.
        from_start: No sequence has a past, so these tokens see only each other.
    """

    def __init__(
        self,
        config: LT2Config,
        shape: torch.Size,
        device: torch.device,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: LoopState | None = None,
        slots: Slots = None,
        start: int | None = None,
    ) -> None:
        self.config, self.cu_seqlens = config, cu_seqlens
        self.batch_size, count = shape
        self.plain, self.visible, self.from_start = cu_seqlens is None and attention_mask is None, count, True
        self.segment = start is not None
        self.index = torch.arange(start or 0, (start or 0) + count, device=device)[None]
        self.first = torch.zeros_like(self.index)
        self.pads = None if attention_mask is None else attention_mask == 0
        self.padding: Tensor | int = 0
        if self.pads is not None:
            self.padding = self.pads.cumprod(dim=1).sum(dim=1)
            self.index = self.index - self.padding[:, None]
        self._results: dict[Hashable, object] = {}
        if cu_seqlens is not None:
            document = torch.searchsorted(cu_seqlens.to(torch.int64), self.index, right=True) - 1
            self.first = cu_seqlens.to(torch.int64)[document]
        self.slots: Tensor | None = None
        if state is not None:
            lengths, self.max_length, used = state.lengths, state.max_length, state.max_length - count
            if slots is not None and (isinstance(slots, Tensor) or list(slots) != list(range(state.batch_size))):
                self.slots = torch.as_tensor(slots, device=device)
                lengths = lengths[self.slots]
            if not isinstance(slots, Tensor):
                used = max(state.host_lengths[slot] for slot in (range(self.batch_size) if slots is None else slots))
                self.from_start = used == 0
            else:
                self.from_start = False
            self.index = lengths[:, None] + self.index
            self.lengths, self.visible = self.index[:, -1] + 1, used + count
            self.rows = (torch.arange(self.batch_size, device=device) if self.slots is None else self.slots)[:, None]
        self.positions = self.index if cu_seqlens is None else self.index - self.first
        self.offset = None if state is None else self.index[:, 0]
        self.bounds = cu_seqlens
        if state is None and self.pads is not None:
            rows = count * torch.arange(self.batch_size + 1, device=device)
            self.bounds = torch.stack((rows[:-1], rows[:-1] + self.padding), 1).flatten()
            self.bounds = torch.cat((self.bounds, rows[-1:]))
        if self.segment and start:
            self.visible, self.from_start = start + count, False
        self.dense = self.trained = False
        few = count <= MAX_STEP and self.batch_size * count <= MAX_STEP_ROWS
        self.step = few and state is not None and self.plain and not self.from_start and not self.segment

    def once(self, key: Hashable, compute: Callable[[], X]) -> X:
        """The result of ``compute``, which layers and loops that ask with the same key share."""
        if torch.compiler.is_compiling():  # shares by itself, and lets no checkpointed block write here
            return compute()
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]  # type: ignore[return-value]

    def as_float(self, t: Tensor) -> Tensor:
        """t in fp32, cast once for all loops."""
        return self.once(("fp32", id(t)), t.float)

    def cast(self, tensors: Sequence[Tensor]) -> None:
        """What :meth:`as_float` will be asked for: many casts at a time."""
        narrow = [t for t in tensors if t.dtype != torch.float32]
        if narrow and not torch.compiler.is_compiling():
            wide = [torch.empty_like(t, dtype=torch.float32) for t in narrow]
            torch._foreach_copy_(wide, narrow)
            self._results |= {("fp32", id(t)): copy for t, copy in zip(narrow, wide, strict=True)}

    def of(self, t: Tensor) -> Tensor:
        """The rows of these sequences in t ``[slots, ..]``, a tensor of the state."""
        return t if self.slots is None else t[self.slots]

    def put(self, t: Tensor, rows: Tensor) -> None:
        """The inverse of :meth:`of`, in place."""
        if self.slots is None:
            t.copy_(rows)
        else:
            t[self.slots] = rows

    def clear_pads(self, x: Tensor) -> Tensor:
        """x [B, T, D] with zeros in place of padding, which neither enter a state nor let gradients through."""
        return x if self.pads is None else x.masked_fill(self.pads[..., None], 0)

    def rope(self, dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles of heads of ``dim``, fp32 ``[B or 1, T, dim / 2]``."""

        def angles() -> tuple[Tensor, Tensor]:
            powers = torch.arange(0, -dim, -2, device=self.positions.device, dtype=torch.float32) / dim
            x = self.positions[..., None] * self.config.rope_theta**powers
            return x.cos(), x.sin()

        return self.once(("rope", dim), angles)

    def pack(self, x: Tensor) -> Tensor:
        """x [B, T, ..] in the form that ``bounds`` cut: one row, if there are any."""
        return x if self.bounds is None else x.flatten(0, 1)[None]
