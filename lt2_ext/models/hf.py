"""LT2 as a transformers model: Auto classes, ``from_pretrained``, ``generate``, Trainer. May import: transformers, too.

Importing this module registers the classes::

    import lt2_ext.models.hf
    model = AutoModelForCausalLM.from_pretrained(directory)  # what LT2.save or save_pretrained wrote

Files are those of :meth:`LT2.save` and :meth:`LT2.load`, in both directions.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .config import MODEL_TYPE, TOKEN_IDS, LT2Config
from .loop_state import LoopState
from .lt2 import LT2

# What transformers calls the cache in arguments and results: "past_key_values" up to some 5.x, then "cache".
CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
_PREFIX = "model."


class LT2HFConfig(PreTrainedConfig):
    """The fields of :class:`LT2Config`, with its checks and defaults, and those of every transformers model.

    Raises:
        ValueError: As LT2Config; a key that neither knows.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __init__(self, **values: Any) -> None:
        own = {f.name for f in fields(LT2Config)}
        common = {"name_or_path", "attn_implementation", "use_cache"} | PreTrainedConfig().to_dict().keys()
        common = (common | {f.name for f in fields(PreTrainedConfig)}) - {"model_type"}
        theirs = {k: v for k, v in values.items() if k not in own and (k in common or k[0] == "_")}
        shape = LT2Config.from_dict({k: v for k, v in values.items() if k not in theirs})
        super().__init__(**theirs)
        for name, value in (asdict(shape) | {name: values.get(name) for name in TOKEN_IDS}).items():
            setattr(self, name, value)

    def shape(self) -> LT2Config:
        return LT2Config(**{f.name: getattr(self, f.name) for f in fields(LT2Config)})

    def to_diff_dict(self) -> dict[str, Any]:
        return super().to_diff_dict() | self.shape().to_dict()


class LoopCache(Cache):
    """A :class:`LoopState` where transformers expects a cache; it is allocated by the first forward."""

    is_compileable = False
    is_croppable = False  # a recurrent state cannot go back, so assisted decoding is refused
    is_linear = (False,)  # type: ignore[assignment]

    def __init__(self, max_length: int) -> None:
        super().__init__(layers=[])
        self.max_length = max_length
        self.state: LoopState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return 0 if self.state is None else max(self.state.host_lengths)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state.reorder(beam_idx)

    def reset(self) -> None:
        if self.state is not None:
            self.state.reset()


class LT2ForCausalLM(PreTrainedModel, GenerationMixin):
    """:class:`LT2`, which is ``self.model``, behind the interface of transformers."""

    config_class = LT2HFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is the mean over its own batch
    _supports_sdpa = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: LT2HFConfig) -> None:
        super().__init__(config)
        self.model = LT2(config.shape())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: LT2 initialises itself, and from_pretrained takes complete files only."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.lm_head = value

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As every transformers model, but from safetensors only, and weights that are missing, too many or of another
        shape are an error."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **({"use_safetensors": True} | options))
        model, info = loaded
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                raise ValueError(f"LT2ForCausalLM.from_pretrained: {kind} must be none, got {sorted(info[kind])[:5]}")
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None, **options: Any
    ) -> None:
        """As every transformers model; LT2.load reads it, too, as long as it is one file (``max_shard_size``)."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        bare = {name.removeprefix(_PREFIX): t for name, t in state_dict.items()}
        super().save_pretrained(save_directory, state_dict=bare, **options)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LoopCache | None = None,
        past_key_values: LoopCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss when labels are given; then logits are None unless ``logits_to_keep`` asks for them.

        Args:
            input_ids: ``[B, T]``, with a cache the new tokens only.
            attention_mask: ``[B, T]``, with a cache ``[B, past + T]``: 0 for padding.
            position_ids: Read for packed documents only: one row without mask and cache, in which each 0 starts one.
            cache, past_key_values: A :class:`LoopCache` (either name), advanced in place. One token after others counts
                as generated.
            labels, logits_to_keep: As :meth:`LT2.forward`.
            cu_seqlens, cu_seq_lens_q: Bounds of packed documents (either name).
            use_cache: Without effect: a cache is used when one is given.
        """
        count, device = input_ids.shape[1], input_ids.device
        cache = past_key_values if cache is None else cache
        cu_seqlens = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
        if attention_mask is not None:
            past = 0 if cache is None else cache.get_seq_length()
            if attention_mask.shape[-1] not in (count, past + count):
                rule, got = f"[B, {count}], or [B, {past + count}] with the past", list(attention_mask.shape)
                raise ValueError(f"LT2ForCausalLM: attention_mask must have shape {rule}, got {got}")
            attention_mask = attention_mask[:, -count:]
            if attention_mask.device.type == "cpu" and bool(attention_mask.all()):
                attention_mask = None
        alone = cache is None and attention_mask is None and cu_seqlens is None
        if position_ids is not None and alone and input_ids.shape[0] == 1:
            starts = (position_ids[0] == 0).nonzero()[:, 0]
            if len(starts) > 1:
                cu_seqlens = torch.cat((starts, torch.tensor([count], device=device)))
        result = self.model(
            input_ids,
            labels=labels,
            cu_seqlens=cu_seqlens,
            attention_mask=attention_mask,
            state=None if cache is None else self._state(cache, input_ids.shape[0]),
            logits_to_keep=logits_to_keep,
            generated=count == 1 and cache is not None and cache.get_seq_length() > 0,
        )
        loss, logits = (None, result) if labels is None else result[:2]
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})  # type: ignore[arg-type]
        return output.to_tuple() if return_dict is False else output

    def _state(self, cache: LoopCache, batch_size: int) -> LoopState:
        if not isinstance(cache, LoopCache):
            got = type(cache).__name__
            raise ValueError(f"LT2ForCausalLM: {CACHE} must be a LoopCache (lt2_ext.models.hf), got {got}")
        if cache.state is None:
            cache.state = self.model.new_state(batch_size, cache.max_length)
        return cache.state

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """A LoopCache for all that ``generate`` will feed, unless it was given one or none is wanted."""
        if generation_config.cache_implementation is not None:
            got = generation_config.cache_implementation
            raise ValueError(f"LT2ForCausalLM.generate: cache_implementation must be None, got {got!r}")
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = LoopCache(max_cache_length)


AutoConfig.register(MODEL_TYPE, LT2HFConfig, exist_ok=True)
AutoModelForCausalLM.register(LT2HFConfig, LT2ForCausalLM, exist_ok=True)
