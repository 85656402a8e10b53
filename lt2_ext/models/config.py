"""Configuration of an LT2 model, and the grammar of ``layer_pattern``."""

from __future__ import annotations

import difflib
import re
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple

from .mixers import MIXERS
from .reuse import KINDS, Reuse
from .reuse import parse as parse_reuse

MODEL_TYPE = "lt2"

_COMPUTED: Any = None  # default of a size that follows from other fields

# Largest value of each size. They keep a hostile config.json from building a model that no file could fill.
_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "intermediate_size": 2**20,
    "loop_count": 8,
    "window_size": 2**20,
    "linear_num_key_heads": 1024,
    "linear_num_value_heads": 1024,
    "linear_key_head_dim": 256,
    "linear_value_head_dim": 512,
    "linear_conv_kernel_dim": 8,
    "index_n_heads": 256,
    "index_head_dim": 512,
    "index_topk": 2**20,
    "nsa_block_size": 2**12,
    "nsa_block_count": 2**12,
    "nsa_window_size": 2**20,
}


# What transformers writes beside these fields: nothing that the model is built from.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TRANSFORMERS = ("architectures", "dtype", "transformers_version", "use_cache", *TOKEN_IDS)

_FORMS = {
    "interleaved": "interleaved:N:M:FIRST:SECOND",
    "bookend": "bookend:N:FIRST:SECOND",
    "front": "front:N:FIRST:SECOND",
    "back": "back:N:FIRST:SECOND",
}


class Layer(NamedTuple):
    """One layer of one loop: the name of its mixer; how many tokens ``window`` sees, None for every other mixer."""

    mixer: str
    window: int | None


@dataclass(kw_only=True)
class LT2Config:
    """Shape of a looped model. Optional sizes that are left at None are filled in on construction.

    Args:
        vocab_size, hidden_size: Embedding table ``[vocab_size, hidden_size]``.
        num_hidden_layers: Physical layers N. The model applies each of them ``loop_count`` times.
        num_attention_heads: Query heads of attention (``full``, ``window``); the head dim is hidden_size over it.
        num_key_value_heads: Key/value heads of attention. Default: num_attention_heads.
        intermediate_size: Hidden width of the SwiGLU. Default: int(8/3 hidden_size) rounded up to 256.
        layer_pattern: Mixer of each layer, or of each layer in each loop: see :func:`layer_schedule`.
        loop_count: How often the stack of layers runs, 1 to 8.
        window_size: Tokens that a token of a ``window`` layer sees, itself included.
        use_loop_residual: Add ``rho[loop] * h_in`` after each loop (``rho`` is learned, zero at the start).
        norm_placement: ``"pre"``: a block computes ``h + f(norm(h))``; ``"sandwich"``: ``h + norm(f(norm(h)))``.
        inter_loop_norm: The final RMSNorm is applied after every loop, and the next loop starts from its result.
        attn_output_gate: Attention layers multiply their output by ``sigmoid(W x)`` before the output projection.
        tie_word_embeddings: The output head is the embedding table.
        rope_theta, rms_norm_eps: Base of the rotary frequencies; epsilon of every RMSNorm.
        linear_num_key_heads, linear_num_value_heads: Heads of ``gdn`` layers; value heads are a multiple of key heads.
            Default: num_attention_heads, and as many value heads as key heads.
        linear_key_head_dim, linear_value_head_dim: Default: 0.75 hidden_size / linear_num_key_heads rounded up to a
            multiple of 8, and twice the key dim.
        linear_conv_kernel_dim: Taps of the short convolution in front of ``gdn``.
        index_n_heads, index_head_dim, index_topk: Heads of the indexer of ``dsa`` layers, their dim (a multiple of 8),
            and how many keys a token attends to.
        index_pool: The indexer first chooses blocks of so many keys, a multiple of 32, by their mean; 0: it scores all.
        index_loss_weight: Of the indexer's loss beside the language model's; 0: the indexer is not trained.
        nsa_block_size, nsa_block_count, nsa_window_size: Tokens of a block of ``nsa`` layers, blocks that a token
            selects, and how many of the newest tokens it sees.
        state_reuse: What loops 2 and later of a layer read instead of a state of their own, a list of ``kind:mode``
            with commas. ``"none"``: nothing. ``"kv:first"``: the keys and values of the first loop. ``"kv:last"``,
            ``"kv:mean"``: of tokens that were generated before those of the last loop, or the mean over all; training
            and prompts are as without. ``"index:share"``: the keys that the first loop of a ``dsa`` layer selects; its
            indexer learns from all loops.
            ``"gdn:read"``: also the state of the loop before. ``"gdn:segment:C"``: at every C-th token the state that
            the last loop left there (docs/loop_state.md).

    Raises:
        ValueError: Naming the field, the rule and the value.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = _COMPUTED
    intermediate_size: int = _COMPUTED
    layer_pattern: str = "full"
    loop_count: int = 4
    window_size: int = 2048
    use_loop_residual: bool = True
    norm_placement: str = "pre"
    inter_loop_norm: bool = False
    attn_output_gate: bool = False
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    linear_num_key_heads: int = _COMPUTED
    linear_num_value_heads: int = _COMPUTED
    linear_key_head_dim: int = _COMPUTED
    linear_value_head_dim: int = _COMPUTED
    linear_conv_kernel_dim: int = 4
    index_n_heads: int = 4
    index_head_dim: int = 64
    index_topk: int = 512
    index_pool: int = 0
    index_loss_weight: float = 1.0
    nsa_block_size: int = 64
    nsa_block_count: int = 16
    nsa_window_size: int = 512
    state_reuse: str = "none"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "linear_num_key_heads", "linear_key_head_dim"):
            if getattr(self, name) is not None:  # the sizes that defaults are computed from
                self._check_size(name)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = _round_up(8 * self.hidden_size // 3, 256)
        if self.linear_num_key_heads is None:
            self.linear_num_key_heads = self.num_attention_heads
        if self.linear_num_value_heads is None:
            self.linear_num_value_heads = self.linear_num_key_heads
        if self.linear_key_head_dim is None:
            self.linear_key_head_dim = _round_up(-(-3 * self.hidden_size // (4 * self.linear_num_key_heads)), 8)
        if self.linear_value_head_dim is None:
            self.linear_value_head_dim = 2 * self.linear_key_head_dim
        for name in _SIZES:
            self._check_size(name)
        for name in ("use_loop_residual", "inter_loop_norm", "attn_output_gate", "tie_word_embeddings"):
            self._check(name, isinstance(getattr(self, name), bool), "be true or false")
        for name in ("rope_theta", "rms_norm_eps", "index_loss_weight"):
            value, zero = getattr(self, name), name == "index_loss_weight"
            number = type(value) in (int, float) and 0 <= value < float("inf")
            self._check(name, number and (value > 0 or zero), "be a positive number" + " or 0" * zero)
        self._check("norm_placement", self.norm_placement in ("pre", "sandwich"), "be 'pre' or 'sandwich'")
        heads = self.num_attention_heads
        self._check("num_attention_heads", self.hidden_size % heads == 0, f"divide hidden_size = {self.hidden_size}")
        self._check("hidden_size", self.head_dim % 2 == 0, f"be an even multiple of num_attention_heads = {heads}")
        grouped = heads % self.num_key_value_heads == 0
        self._check("num_key_value_heads", grouped, f"divide num_attention_heads = {heads}")
        key_heads = self.linear_num_key_heads
        grouped = self.linear_num_value_heads % key_heads == 0
        self._check("linear_num_value_heads", grouped, f"be a multiple of linear_num_key_heads = {key_heads}")
        self._check("layer_pattern", isinstance(self.layer_pattern, str), "be a string")
        self._check_reuse()
        if {"dsa", "nsa"} & set(self.layer_types):
            rule = f"be a multiple of 8 num_attention_heads = {8 * heads} with dsa and nsa layers"
            self._check("hidden_size", self.head_dim % 8 == 0, rule)
        if "dsa" in self.layer_types:
            self._check("index_head_dim", self.index_head_dim % 8 == 0, "be a multiple of 8")
            pool = self.index_pool
            self._check("index_pool", type(pool) is int and pool >= 0 and pool % 32 == 0, "be 0 or a multiple of 32")

    @property
    def head_dim(self) -> int:
        """Head dim of attention (``full``, ``window``)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """Mixer name of each physical layer, in the first loop."""
        return [layer.mixer for layer in self.schedule()[0]]

    def schedule(self) -> list[list[Layer]]:
        """``schedule()[loop][layer]``: what the layer is in that loop."""
        return layer_schedule(self.layer_pattern, self.num_hidden_layers, self.loop_count, self.window_size)

    @property
    def reuse(self) -> Reuse:
        """``state_reuse``, parsed."""
        return parse_reuse(self.state_reuse)

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LT2Config:
        """Inverse of :meth:`to_dict`. A key that is not a field is an error: it would silently do nothing. Only what
        transformers notes in the same file, like dtype and token ids, is passed over."""
        if not isinstance(values, dict):
            raise ValueError(f"LT2Config: a config must be an object of names and values, got {type(values).__name__}")
        values = {key: value for key, value in values.items() if key not in _TRANSFORMERS}
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(f"LT2Config: model_type must be {MODEL_TYPE!r}, got {model_type!r}")
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
                raise ValueError(f"LT2Config: unknown key {key!r}; {hint}")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"LT2Config: missing {', '.join(missing)}")
        return cls(**values)

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        self._check(name, type(value) is int and 1 <= value <= _SIZES[name], f"be an integer in 1..{_SIZES[name]}")

    def _check_reuse(self) -> None:
        self._check("state_reuse", isinstance(self.state_reuse, str), "be a string")
        for kind, (mixers, _) in KINDS.items():
            mode = getattr(self.reuse, kind)
            there = mode is None or any(name in mixers for name in self.layer_types)
            self._check("state_reuse", there, f"have a layer for {kind}:{mode}: {' or '.join(mixers)}")
        if self.reuse.kv == "first":
            same = all(len({layer.window for layer in loops}) == 1 for loops in zip(*self.schedule(), strict=True))
            self._check("state_reuse", same, "not be kv:first when the window of a layer differs between loops")
        if self.reuse.segment:
            plain = set(self.layer_types) <= {"gdn", "full", "window"}
            self._check("state_reuse", plain, "not be gdn:segment with layers other than gdn, full and window")

    def _check(self, name: str, condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(f"LT2Config: {name} must {rule}, got {getattr(self, name)!r}")


def layer_schedule(pattern: str, num_layers: int, loop_count: int, window_size: int) -> list[list[Layer]]:
    """What each of ``num_layers`` layers is in each of ``loop_count`` loops.

    ``"gdn"`` every layer; ``"interleaved:4:1:gdn:full"`` four gdn then one full, repeated and cut at the depth;
    ``"bookend:1:full:gdn"`` one full at either end, gdn between; ``"front:2:full:gdn"`` two full, then gdn;
    ``"back:2:full:gdn"`` gdn, then two full; ``"gdn,gdn,full"`` one name per layer. ``window`` sees ``window_size``
    tokens, ``window:512`` sees 512.

    ``"full->window:512->window:256->window:128"`` is one pattern per loop. Loops share the weights of a layer: it may
    change between ``full`` and windows of any size, but not between attention and ``gdn``.

    Raises:
        ValueError: Unknown mixer or form, counts that do not fit the depth, loops that cannot share weights.
    """
    loops = [_layers(part, num_layers, window_size) for part in pattern.split("->")]
    if len(loops) == 1:
        return loops * loop_count
    if len(loops) != loop_count:
        raise ValueError(f"layer_pattern: {pattern!r} lists {len(loops)} loops, loop_count is {loop_count}")
    for i, layers in enumerate(zip(*loops, strict=True)):
        if len({MIXERS[layer.mixer] for layer in layers}) > 1:
            names = " and ".join(dict.fromkeys(layer.mixer for layer in layers))
            raise ValueError(f"layer_pattern: layer {i} of {pattern!r} is {names}, which share no weights")
    return loops


def _layers(pattern: str, num_layers: int, window_size: int) -> list[Layer]:
    """One loop of a schedule."""
    form, *args = re.findall(r"(?:^|:)(window:\d+|[^:]*)", pattern)
    if form not in _FORMS:
        if args and "," not in pattern and form not in MIXERS:
            raise ValueError(f"layer_pattern: unknown form {form!r} in {pattern!r}; known: {', '.join(_FORMS)}")
        layers = [_layer(name, pattern, window_size) for name in pattern.split(",")]
        layers = layers * num_layers if len(layers) == 1 else layers
        if len(layers) != num_layers:
            got = f"{pattern!r} lists {len(layers)} layers"
            raise ValueError(f"layer_pattern: {got}, num_hidden_layers is {num_layers}")
        return layers

    usage, counts = _FORMS[form], args[:-2]
    if len(args) != usage.count(":") or not all(re.fullmatch("[1-9][0-9]{0,3}", n) for n in counts):
        raise ValueError(f"layer_pattern: {pattern!r} must have the form {usage} with counts in 1..9999")
    first, second = (_layer(name, pattern, window_size) for name in args[-2:])
    n = int(counts[0])
    if form == "interleaved":
        cycle = [first] * n + [second] * int(counts[1])
        return [cycle[i % len(cycle)] for i in range(num_layers)]
    rest = num_layers - (2 * n if form == "bookend" else n)
    if rest < 0:
        raise ValueError(f"layer_pattern: {pattern!r} needs at least {num_layers - rest} layers, got {num_layers}")
    head = n if form in ("front", "bookend") else 0
    tail = n if form in ("back", "bookend") else 0
    return [first] * head + [second] * rest + [first] * tail


def _layer(name: str, pattern: str, window_size: int) -> Layer:
    mixer, _, size = name.partition(":")
    if mixer not in MIXERS or (":" in name and mixer != "window"):
        known = ", ".join([*MIXERS, "window:SIZE"])
        raise ValueError(f"layer_pattern: unknown mixer {name!r} in {pattern!r}; known: {known}")
    if ":" in name and not (re.fullmatch("[1-9][0-9]{0,6}", size) and int(size) <= _SIZES["window_size"]):
        raise ValueError(
            f"layer_pattern: window:SIZE in {pattern!r} must have a SIZE in 1..{_SIZES['window_size']}, got {size!r}"
        )
    return Layer(mixer, int(size or window_size) if mixer == "window" else None)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
