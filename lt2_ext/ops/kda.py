"""Linear recurrences with a decay per key channel: KDA (with the delta rule), GLA and HGRN2 (without)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_slots, fake, inference_only
from .gdn import check_inputs, delta_rule, differentiate, fake_backward, fake_forward

_fwd = torch.ops.lt2.kda_fwd.default
_bwd = torch.ops.lt2.kda_bwd.default
_step = torch.ops.lt2.kda_step_.default


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention (arXiv 2510.26692), parallel over chunks of tokens: the gated delta rule with a decay per
    key channel.

    For every value head, with a state ``S`` of shape ``[K, V]`` and one token after the other::

        S <- Diag(exp(g)) S
        S <- S + beta k (v - k^T S)^T
        o  = scale q^T S

    Everything not named here is as in :func:`lt2_ext.ops.gdn.chunk_gated_delta_rule`.

    Args:
        q, k: ``[B, T, H, K]`` float32 or bfloat16 (on CUDA also float16), ``1 <= K <= 256``. Any strides.
        v: ``[B, T, HV, V]``, dtype of q, HV a multiple of H, ``1 <= V <= 512``.
        g: ``[B, T, HV, K]``, any float dtype, the natural log of the decay, ``<= 0``; ``-inf`` resets a channel. With
            ``use_gate_in_kernel`` the raw gate.
        beta: ``[B, T, HV]``, any float dtype, the writing strength.
        scale, initial_state, output_final_state, use_qk_l2norm_in_kernel: see there.
        use_gate_in_kernel: the decay is ``-exp(A_log) * softplus(g + dt_bias)`` (softplus linear above 20).
        A_log: ``[HV]``, any float dtype; with ``use_gate_in_kernel`` only, and required there.
        dt_bias: ``[HV * K]``, any float dtype; with ``use_gate_in_kernel`` only. None: zeros.
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens, cu_seqlens_cpu: see there.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` float32 or None.

    Raises:
        ValueError, RuntimeError: see there.
    """
    return delta_rule(
        "chunk_kda", False, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens,
        cu_seqlens_cpu, True, _fwd,
    )  # fmt: skip


def fused_recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """:func:`chunk_kda` token by token: for short sequences, and as a second opinion on the chunked form."""
    return delta_rule(
        "fused_recurrent_kda", True, q, k, v, g, beta, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        state_v_first, cu_seqlens, cu_seqlens_cpu, True, _fwd,
    )  # fmt: skip


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention (arXiv 2312.06635), parallel over chunks of tokens; with ``k = 1 - exp(g)`` HGRN2
    (arXiv 2404.07904).

    For every value head, with a state ``S`` of shape ``[K, V]`` and one token after the other::

        S <- Diag(exp(g)) S + k v^T
        o  = scale q^T S

    Arguments, results and errors are those of :func:`chunk_kda`.
    """
    return delta_rule(
        "chunk_gla", False, q, k, v, g, None, scale, initial_state, output_final_state, False, False, None, None,
        False, False, state_v_first, cu_seqlens, cu_seqlens_cpu, False, _fwd,
    )  # fmt: skip


def fused_recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """:func:`chunk_gla` token by token, ``gk`` being its ``g``."""
    return delta_rule(
        "fused_recurrent_gla", True, q, k, v, gk, None, scale, initial_state, output_final_state, False, False,
        None, None, False, False, state_v_first, cu_seqlens, cu_seqlens_cpu, False, _fwd,
    )  # fmt: skip


def kda_step_(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    delta: bool = True,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> Tensor:
    """Decode ``t`` tokens per row, updating a pool of states in place: :func:`chunk_kda`, or without ``delta``
    :func:`chunk_gla`.

    Inference only: there is no derivative, so inputs that require one are an error in grad mode.

    Args:
        state: ``[slots, HV, K, V]`` (``[slots, HV, V, K]`` with ``state_v_first``) float32, or bfloat16, which is
            rounded once per call; updated in place. Any strides, but a contiguous last axis.
        q, k: ``[B, t, H, K]``, v: ``[B, t, HV, V]``, g: ``[B, t, HV, K]``, beta: ``[B, t, HV]`` or None (ones),
            ``1 <= t <= 8``; dtypes and sizes as in :func:`chunk_kda`.
        scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel,
            allow_neg_eigval, state_v_first: as in :func:`chunk_kda`.
        slots: ``[B]`` int64, the state of each row, no valid one twice. A row whose slot is -1 (or not in the pool)
            writes nothing and gives ``o = 0``. None: row b uses slot b.
        delta: erase before writing.

    Returns:
        ``o`` ``[B, t, HV, V]`` in the dtype of v.

    Raises:
        ValueError: dtypes or options that do not go together; under ``lt2_ext.set_checks(True)`` also ``g > 0`` or a
            slot used twice.
        RuntimeError: a shape, dtype, stride or device that the operator rejects; inputs that require a gradient.
    """
    op = "kda_step_"
    inference_only(op, state, q, k, v, g, beta, A_log, dt_bias)
    tensors, scale = check_inputs(
        op, q, k, v, g, beta, scale, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        None, None,
    )  # fmt: skip
    check_slots(op, slots, state)
    return _step(
        state, *tensors, slots, scale, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        state_v_first, delta,
    )  # fmt: skip


fake("kda_fwd")(fake_forward)
fake("kda_bwd")(fake_backward)
fake("kda_step_")(lambda state, q, k, v, *_: v.new_empty(v.shape))
differentiate("kda_fwd", _bwd)
