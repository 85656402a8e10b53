"""``state_reuse="gdn:segment:C"``: every loop starts a segment of C tokens from the matrix that the last loop left at
the end of the segment before. A segment is parallel inside; segments follow each other."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .loop_state import LoopState, Slots, Tokens

if TYPE_CHECKING:
    from .lt2 import LT2
    from .mixers import State


def run_segments(model: LT2, h: Tensor, tokens: Tokens, state: LoopState | None, slots: Slots) -> Tensor:
    """Embeddings ``[B, T, hidden_size]`` -> normalised output of the last loop; a state is advanced."""
    return _whole(model, h, tokens) if state is None else _stream(model, h, tokens, state, slots)


def _stream(model: LT2, h: Tensor, tokens: Tokens, state: LoopState, slots: Slots) -> Tensor:
    """In pieces that end where a segment of any row does. Slots in a tensor: whoever passes them hands over before."""
    length, count, places = model.config.reuse.segment, h.shape[1], [0]
    if not isinstance(slots, Tensor):
        places = tokens.index[:, 0].tolist()
    held = range(state.batch_size) if slots is None else slots
    cuts, pieces = {0, count}.union(*(range(-place % length, count, length) for place in places)), []
    for start, stop in pairwise(sorted(cuts)):
        if not isinstance(slots, Tensor):
            starts = [slot for slot, p in zip(held, places, strict=True) if p + start > 0 and not (p + start) % length]
            state.hand_over(starts)
        mask = None if tokens.pads is None else ~tokens.pads[:, start:stop]
        part = h[:, start:stop]
        piece = Tokens(model.config, part.shape[:2], h.device, None, mask, state, slots)
        pieces.append(model.run_loops(part, piece, state.layers)[0])
        state.advance(stop - start, piece.padding, slots)
    return torch.cat(pieces, dim=1)


def _whole(model: LT2, h: Tensor, tokens: Tokens) -> Tensor:
    """Documents from their first token, one a row, through states that are not changed in place."""
    B, T, _ = h.shape
    rows, place, real = h, None, None
    if tokens.cu_seqlens is not None or tokens.pads is not None:
        if tokens.cu_seqlens is not None:
            starts, lengths = tokens.cu_seqlens[:-1].long(), tokens.cu_seqlens.long().diff()
        else:
            padding = torch.as_tensor(tokens.padding)
            starts, lengths = torch.arange(B, device=h.device) * T + padding, T - padding
        step = torch.arange(int(lengths.max()), device=h.device)
        place, real = (starts[:, None] + step).clamp(max=B * T - 1), step < lengths[:, None]
        rows = h.flatten(0, 1)[place]
    layers: list[list[State]] = [[{} for _ in loop] for loop in model.schedule]
    pieces = []
    for start in range(0, rows.shape[1], model.config.reuse.segment):
        part = rows[:, start : start + model.config.reuse.segment]
        for loop in layers if start else []:
            for mine, last in zip(loop, layers[-1], strict=True):
                if "matrix" in last:
                    mine["matrix"] = last["matrix"]
        piece = Tokens(model.config, part.shape[:2], h.device, start=start)
        pieces.append(model.run_loops(part, piece, layers)[0])
    out = torch.cat(pieces, dim=1)
    if place is None or real is None:
        return out
    return out.new_zeros(B * T, out.shape[2]).index_put((place[real],), out[real]).view(B, T, -1)
