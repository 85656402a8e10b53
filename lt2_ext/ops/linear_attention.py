"""Two relatives of the gated delta rule, by its kernels: a scalar decay that erases nothing, and no decay."""

from __future__ import annotations

from torch import Tensor

from ._common import autocast, check, check_dtypes, check_slots, inference_only
from .gdn import _step, delta_rule


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a scalar decay, parallel over chunks of tokens: linear attention itself without a decay,
    RetNet (``g_gamma``), Mamba-2 (``g`` and ``beta``).

    For every value head, with a state ``S`` of shape ``[K, V]`` and one token after the other::

        S <- exp(g) S + beta k v^T
        o  = scale q^T S

    Args:
        g: ``[B, T, HV]``, any float dtype, the natural log of the decay, ``<= 0``; ``-inf`` resets the state.
        g_gamma: ``[HV]``, the same for all tokens, in place of g. None and no g: no decay.
        beta: ``[B, T, HV]``, any float dtype, the writing strength. None: ones.
        q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens, cu_seqlens_cpu: As in
            :func:`lt2_ext.ops.chunk_gated_delta_rule`, and so are heads, results, errors, autocast and gradients.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` float32 or None.
    """
    return _simple_gla(
        "chunk_simple_gla", False, q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first,
        cu_seqlens, cu_seqlens_cpu, beta,
    )  # fmt: skip


def fused_recurrent_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    *, beta: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """:func:`chunk_simple_gla`, token by token: for short sequences, and as a second opinion on the chunked form."""
    return _simple_gla(
        "fused_recurrent_simple_gla", True, q, k, v, g, g_gamma, scale, initial_state, output_final_state,
        state_v_first, cu_seqlens, cu_seqlens_cpu, beta,
    )  # fmt: skip


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule (DeltaNet, arXiv 2406.06484): :func:`lt2_ext.ops.chunk_gated_delta_rule` without a decay."""
    return delta_rule(
        "chunk_delta_rule", False, q, k, v, None, beta, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, False, None, None, False, False, state_v_first, cu_seqlens, cu_seqlens_cpu,
    )  # fmt: skip


def fused_recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    state_v_first: bool = False, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """:func:`chunk_delta_rule`, token by token: for short sequences, and as a second opinion on the chunked form."""
    return delta_rule(
        "fused_recurrent_delta_rule", True, q, k, v, None, beta, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, False, None, None, False, False, state_v_first, cu_seqlens, cu_seqlens_cpu,
    )  # fmt: skip


def simple_gla_step_(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    state_v_first: bool = False,
) -> Tensor:
    """Decode ``t`` tokens per row of :func:`chunk_simple_gla`, updating a pool of states in place. Inference only.

    Args:
        g, beta: ``[B, t, HV]`` log decay and writing strength, float32 or bfloat16 (on CUDA also float16), of one
            dtype. None: no decay, ones.
        state, q, k, v, slots, scale, state_v_first: As in :func:`lt2_ext.ops.gated_delta_step_`.

    Returns:
        ``o`` ``[B, t, HV, V]`` in the dtype of v.
    """
    return _decode("simple_gla_step_", state, q, k, v, g, beta, slots, scale, False, state_v_first, False)


def delta_rule_step_(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    state_v_first: bool = False,
) -> Tensor:
    """Decode ``t`` tokens per row of :func:`chunk_delta_rule`: arguments as in :func:`simple_gla_step_`."""
    return _decode(
        "delta_rule_step_", state, q, k, v, None, beta, slots, scale, use_qk_l2norm_in_kernel, state_v_first, True
    )


def _simple_gla(
    op: str, recurrent: bool, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None,
    scale: float | None, initial_state: Tensor | None, output_final_state: bool, state_v_first: bool,
    cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, beta: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if g_gamma is not None:
        check(g is None, op, "g_gamma", "come without g", "both")
        check(list(g_gamma.shape) == [v.shape[2]], op, "g_gamma", f"have shape [{v.shape[2]}]", list(g_gamma.shape))
        g = g_gamma.float().expand(v.shape[:3])
    return delta_rule(
        op, recurrent, q, k, v, g, beta, scale, initial_state, output_final_state, False, False, None, None, False,
        False, state_v_first, cu_seqlens, cu_seqlens_cpu, delta=False,
    )  # fmt: skip


def _decode(
    op: str, state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    slots: Tensor | None, scale: float | None, use_qk_l2norm: bool, state_v_first: bool, delta: bool,
) -> Tensor:  # fmt: skip
    inference_only(op, state, q, k, v, g, beta)
    q, k, v = autocast(q, q, k, v)
    check_dtypes(op, q=q, k=k, v=v)
    if g is not None and beta is not None:
        check(g.dtype == beta.dtype, op, "beta", f"have the dtype of g ({g.dtype})", beta.dtype)
    check_slots(op, slots, state)
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    return _step(state, q, k, v, g, beta, None, None, slots, scale, use_qk_l2norm, False, False, state_v_first, delta)
