"""What a call of the model may look like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .config import LT2Config
    from .loop_state import LoopState, Slots

INTEGERS = (torch.int32, torch.int64)


def check(condition: bool, argument: str, rule: str, got: object) -> None:
    if not condition:
        raise ValueError(f"LT2: {argument} must {rule}, got {got}")


def check_inputs(
    config: LT2Config,
    input_ids: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    state: LoopState | None,
    logits_to_keep: int | None,
    slots: Slots = None,
    generated: bool = False,
) -> None:
    """Raise ValueError unless ``LT2.forward`` takes these together.

    Rules about values are checked on the CPU only: on a GPU reading them would synchronise.
    """
    shape = list(input_ids.shape)
    check(input_ids.dtype in INTEGERS, "input_ids", "be int32 or int64", input_ids.dtype)
    check(len(shape) == 2 and min(shape) >= 1, "input_ids", "have shape [B, T] with B, T >= 1", shape)
    check((logits_to_keep or 0) >= 0, "logits_to_keep", "be >= 0 or None", logits_to_keep)
    if labels is not None:
        check(state is None, "state", "be None when labels are given", "a LoopState")
        check(list(labels.shape) == shape, "labels", f"have the shape {shape} of input_ids", list(labels.shape))
    if cu_seqlens is not None:
        check(state is None, "state", "be None when cu_seqlens is given", "a LoopState")
        check(attention_mask is None, "attention_mask", "be None when cu_seqlens is given", "a mask")
        check(shape[0] == 1, "input_ids", "have one row when cu_seqlens is given", shape)
        check(cu_seqlens.dtype in INTEGERS, "cu_seqlens", "be int32 or int64", cu_seqlens.dtype)
        bounds = list(cu_seqlens.shape)
        check(len(bounds) == 1 and bounds[0] >= 2, "cu_seqlens", "have shape [N + 1] with N >= 1", bounds)
        if _readable(cu_seqlens):
            b = cu_seqlens.tolist()
            check(b[0] == 0 and b[-1] == shape[1] and b == sorted(b), "cu_seqlens", f"rise from 0 to {shape[1]}", b)
    if attention_mask is not None:
        _check_mask(attention_mask, shape, state, slots)
    check(slots is None or state is not None, "slots", "be None without a state", slots)
    single = state is not None and shape[1] == 1
    check(single or not generated, "generated", "be False but for one token a row, with a state", generated)
    if state is not None:
        autocast = torch.is_autocast_enabled(input_ids.device.type)
        check(not autocast, "state", "be used without autocast (move the model to a dtype instead)", "autocast")
        check(state.config == config, "state", "come from new_state of this model", "one for another config")
        if isinstance(slots, Tensor):
            valid = slots.dtype == torch.int64 and list(slots.shape) == shape[:1]
            check(valid, "slots", f"be int64 [{shape[0]}]", slots)
            return
        held = range(state.batch_size) if slots is None else slots
        rows = "rows of the state" if slots is None else "rows that slots names"
        check(shape[0] == len(held), "input_ids", f"have the {len(held)} {rows}", shape)
        valid = all(type(slot) is int and 0 <= slot < state.batch_size for slot in held)
        check(valid and len(set(held)) == len(held), "slots", f"be different ints in 0..{state.batch_size - 1}", slots)
        used = max(state.host_lengths[slot] for slot in held)
        if used + shape[1] > state.max_length:  # the message would make compiled code depend on the numbers in it
            room = f"fit max_length = {state.max_length} of the state, which holds {used} tokens"
            check(False, "input_ids", room, f"{shape[1]} more")


def _check_mask(mask: Tensor, shape: list[int], state: LoopState | None, slots: Slots) -> None:
    check(list(mask.shape) == shape, "attention_mask", f"have the shape {shape} of input_ids", list(mask.shape))
    integer = not (mask.dtype.is_floating_point or mask.dtype.is_complex)
    check(integer, "attention_mask", "be bool or an integer dtype", mask.dtype)
    if not _readable(mask):
        return
    real = (mask != 0).int()
    starts = F.pad(real, (1, 0)).diff(dim=1).clamp(min=0).sum(dim=1)
    check(bool((starts <= 1).all()), "attention_mask", "have its ones side by side in every row", mask.tolist())
    if state is not None:
        lengths = state.lengths if slots is None else state.lengths[torch.as_tensor(slots)]
        late = (real.diff(dim=1) < 0).any(dim=1) | ((lengths > 0) & (real[:, 0] == 0))
        rule = "with a state have zeros only before the first token of a sequence"
        check(not bool(late.any()), "attention_mask", rule, mask.tolist())


def _readable(t: Tensor) -> bool:
    return t.device.type == "cpu" and not torch.compiler.is_compiling()
