"""What a looped model remembers between calls, and where the tokens of one call stand."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lt2_ext import ops

if TYPE_CHECKING:
    from .config import LT2Config
    from .mixers import Mixer

X = TypeVar("X")


class LoopState:
    """The memory of ``batch_size`` sequences of up to ``max_length`` tokens, preallocated. Inference only.

    Nothing but the hidden state passes from one loop to the next, so each (loop, layer) has a memory of its own:
    ``gdn`` a matrix fp32 ``[batch, value_heads, K, V]`` and the window of its convolution, ``full`` keys and values
    ``[batch, max_length, kv_heads, head_dim]``, ``window`` the newest of these only, ``dsa`` also those of its index.
    ``model(input_ids, state=state)`` reads it and advances it in place; any split of a sequence into such calls gives
    the logits of one call.

    Attributes:
        layers: ``layers[loop][layer]``, the tensors of one mixer by name; axis 0 is the sequence.
        lengths: Tokens seen by each sequence, int64 ``[batch_size]`` on the device of the model.
        host_lengths: The same and padding, where reading it costs no synchronisation: the room that is used.
    """

    def __init__(self, config: LT2Config, mixers: Sequence[Mixer], batch_size: int, max_length: int) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if type(value) is not int or value < 1:
                raise ValueError(f"LoopState: {name} must be a positive integer, got {value!r}")
        self.config, self.batch_size, self.max_length = config, batch_size, max_length
        self.layers: list[list[dict[str, Tensor]]] = [
            [mixer.new_state(batch_size, max_length, layer.window) for mixer, layer in zip(mixers, loop, strict=True)]
            for loop in config.schedule()
        ]
        if config.state_reuse == "indices":  # only the first loop selects
            for layer in (layer for loop in self.layers[1:] for layer in loop):
                layer.pop("index_k", None)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=next(mixers[0].parameters()).device)
        self.host_lengths = [0] * batch_size

    def advance(self, tokens: int, padding: Tensor | int = 0) -> None:
        """Count ``tokens`` more places in every sequence, ``padding`` (an int or ``[batch_size]``) of them empty."""
        self.lengths += tokens - padding
        self.host_lengths = [n + tokens for n in self.host_lengths]

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Forget the sequences ``slots`` (default: all), so that new ones can start there.

        Memory is zeroed, not only marked as free: the next sequence can never see a value of the last one, and a NaN
        in an unused key would survive its zero attention weight.
        """
        slots = list(range(self.batch_size)) if slots is None else list(slots)
        for slot in slots:
            if type(slot) is not int or not 0 <= slot < self.batch_size:
                raise ValueError(f"LoopState.reset: slots must be integers in 0..{self.batch_size - 1}, got {slot!r}")
        index = torch.tensor(slots, dtype=torch.int64, device=self.lengths.device)
        for loop in self.layers:
            for layer in loop:
                for tensor in layer.values():
                    ops.loop_state_zero_(tensor, index)
        self.lengths[index] = 0
        for slot in slots:
            self.host_lengths[slot] = 0

    def reorder(self, order: Tensor) -> None:
        """Go on in slot b with what slot ``order[b]`` (int ``[batch_size]``) holds, as beam search does."""
        source, slots = order.to(torch.int64), torch.arange(self.batch_size, device=order.device)
        if source.shape != slots.shape:
            raise ValueError(f"LoopState.reorder: order must have shape [{len(slots)}], got {list(order.shape)}")
        for loop in self.layers:
            for layer in loop:
                for tensor in layer.values():
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
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.layer_nbytes)


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
        dense, trained: Whether selecting mixers see all keys, and whether their indexers are trained.
        plain: Every row is one sequence without padding.
        rows, lengths, max_length: With a state only: its slots ``[B, 1]``, lengths after this call ``[B]``, and room.
        visible: The largest number of tokens that any of these can see.
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
    ) -> None:
        self.config, self.cu_seqlens = config, cu_seqlens
        self.batch_size, count = shape
        self.plain, self.visible, self.from_start = cu_seqlens is None and attention_mask is None, count, True
        self.index = torch.arange(count, device=device)[None]
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
        if state is not None:
            self.index = state.lengths[:, None] + self.index
            self.lengths, self.max_length = self.index[:, -1] + 1, state.max_length
            self.visible = max(state.host_lengths) + count
            self.from_start = self.visible == count
            self.rows = torch.arange(self.batch_size, device=device)[:, None]
        self.positions = self.index - self.first
        self.offset = None if state is None else self.index[:, 0]
        self.bounds = cu_seqlens
        if state is None and self.pads is not None:
            rows = count * torch.arange(self.batch_size + 1, device=device)
            self.bounds = torch.stack((rows[:-1], rows[:-1] + self.padding), 1).flatten()
            self.bounds = torch.cat((self.bounds, rows[-1:]))
        self.dense = self.trained = False

    def once(self, key: Hashable, compute: Callable[[], X]) -> X:
        """The result of ``compute``, which layers and loops that ask with the same key share."""
        if torch.compiler.is_compiling():  # shares by itself, and lets no checkpointed block write here
            return compute()
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]  # type: ignore[return-value]

    def clear_pads(self, x: Tensor) -> Tensor:
        """x [B, T, D] with zeros in place of padding, which neither enter a state nor let gradients through."""
        return x if self.pads is None else x.masked_fill(self.pads[..., None], 0)

    def rope(self, dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles of heads of ``dim``, fp32 [B or 1, T, 1, dim / 2]."""

        def angles() -> tuple[Tensor, Tensor]:
            half = torch.arange(0, dim, 2, device=self.positions.device, dtype=torch.float32)
            x = self.positions[..., None, None] * self.config.rope_theta ** (-half / dim)
            return x.cos(), x.sin()

        return self.once(("rope", dim), angles)

    def pack(self, x: Tensor) -> Tensor:
        """x [B, T, ..] in the form that ``bounds`` cut: one row, if there are any."""
        return x if self.bounds is None else x.flatten(0, 1)[None]
