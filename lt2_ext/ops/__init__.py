"""The operators, one module per family. May import: ``lt2_ext._C`` (through ``torch.ops.lt2``) and torch."""

from .block_ops import attention_block_step_, gated_rmsnorm, gdn_block_step_, linear_step, mlp_step, rope_cache_, swiglu
from .causal_conv1d import causal_conv1d, causal_conv1d_step_
from .dsa import dsa_attention, indexer_loss, lightning_indexer, window_attention
from .gdn import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, gated_delta_step_, gdn_decode_fused_
from .kda import chunk_gla, chunk_kda, fused_recurrent_gla, fused_recurrent_kda, kda_step_
from .linear_attention import (
    chunk_delta_rule,
    chunk_simple_gla,
    delta_rule_step_,
    fused_recurrent_delta_rule,
    fused_recurrent_simple_gla,
    simple_gla_step_,
)
from .loop_state import (
    add_rmsnorm,
    loop_decode_attention,
    loop_residual,
    loop_residual_rmsnorm,
    loop_state_copy_,
    loop_state_zero_,
)

__all__ = [
    "add_rmsnorm",
    "attention_block_step_",
    "causal_conv1d",
    "causal_conv1d_step_",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_kda",
    "chunk_simple_gla",
    "delta_rule_step_",
    "dsa_attention",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_simple_gla",
    "gated_delta_step_",
    "gated_rmsnorm",
    "gdn_block_step_",
    "gdn_decode_fused_",
    "indexer_loss",
    "kda_step_",
    "lightning_indexer",
    "linear_step",
    "loop_decode_attention",
    "loop_residual",
    "loop_residual_rmsnorm",
    "loop_state_copy_",
    "loop_state_zero_",
    "mlp_step",
    "rope_cache_",
    "simple_gla_step_",
    "swiglu",
    "window_attention",
]
