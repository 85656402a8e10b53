"""What a token mixer is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..config import LT2Config
    from ..loop_state import Tokens


State = dict[str, Tensor]  # of one mixer, for all sequences


class Keys(NamedTuple):
    """What queries see: k, v ``[B, S, kv_heads, head_dim]`` at places ``[B or 1, S]``. places None: they are the caches
    ``[slots, S, ..]`` of the state, which the decode operator reads."""

    k: Tensor
    v: Tensor
    places: Tensor | None


class Selection(NamedTuple):
    """What an indexer selects by, and what it selects: q ``[B, T, HI, DI]``, k ``[B, T, DI]``, weights ``[B, T, HI]``;
    indices int32 ``[B, T, topk]`` or None: all keys."""

    q: Tensor
    k: Tensor
    weights: Tensor
    indices: Tensor | None


class Writes(NamedTuple):
    """What a recurrence writes: k, v, raw gates a and b ``[B, T, heads, ..]``; its state before, or None: zero."""

    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    start: Tensor | None


class Shared(NamedTuple):
    """What a layer hands to itself in the next loop; the loss of its indexer in this one, where that is trained; and
    with ``tokens.segment`` its new state, as the old one is not changed."""

    keys: Keys | None = None
    writes: Writes | None = None
    selection: Selection | None = None
    state: State | None = None
    loss: Tensor | None = None


class StepWeights(NamedTuple):
    """Of the mixer's projections, the last ``floats`` of them wanted in float32, with their norm; of what comes after
    the mixer, as :func:`lt2_ext.ops.mlp_step` takes them."""

    first: list[Tensor]
    floats: int
    norm: Tensor
    rest: list[Tensor]
    eps: float


class Mixer(nn.Module):
    """Moves information between the tokens of a sequence, from the past only.

    ``window`` is how many tokens a token sees, itself included; None is all of its past, and the only value for mixers
    other than attention. It belongs to the (loop, layer), not to the weights.

    ``reused`` names what of its state only the first loop has, because later loops read it there; ``float_layers`` the
    last of :meth:`step_layers`, whose results :meth:`step` takes in float32.
    """

    reused: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()

    def __init__(self, config: LT2Config) -> None:
        super().__init__()

    def reset_parameters(self) -> None:
        """Set initial values of whatever is not a plain projection."""
        raise NotImplementedError

    def new_state(self, batch_size: int, max_length: int, window: int | None) -> State:
        """Zeroed tensors ``[batch_size, ...]``, in the dtype and on the device of the weights. With batch_size 0 they
        say what one sequence needs: :class:`LoopState` then makes them in one allocation."""
        raise NotImplementedError

    def step_layers(self, tokens: Tokens, state: State, shared: Shared | None) -> list[nn.Module] | None:
        """The projections of x, if :meth:`step` takes what they give for these tokens."""
        return None

    def step_floats(self) -> list[nn.Parameter]:
        """What :meth:`step` reads in float32, whatever the dtype of the weights."""
        return []

    def step(
        self, projected: list[Tensor], tokens: Tokens, window: int | None, state: State, shared: Shared | None
    ) -> tuple[Tensor, Shared | None]:
        """:meth:`forward` for a few tokens of each sequence, from the projections of x to the input of ``o_proj``."""
        raise NotImplementedError

    def block_step(self, h: Tensor, weights: StepWeights, tokens: Tokens, state: State) -> Tensor | None:
        """The step of the whole block in one operator, where there is one for these tokens."""
        return None

    def forward(
        self, x: Tensor, tokens: Tokens, window: int | None, state: State | None, shared: Shared | None = None
    ) -> tuple[Tensor, Shared | None]:
        """x and the result ``[B, T, hidden_size]``; tokens: where they stand; state: what :meth:`new_state` made, to be
        read and advanced in place by T tokens in the slots ``tokens.slots``, or None for whole sequences. Second result
        and shared: what passes to the next loop and what came from the last one, for mixers that reuse any of it."""
        raise NotImplementedError
