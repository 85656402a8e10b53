"""The gated delta rule: chunked, token by token, and one decode step in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _common
from ._common import as_float, autocast, check, check_dtypes, check_slots, checks_enabled, inference_only, run, wanted

_fwd = torch.ops.lt2.gdn_fwd.default
_bwd = torch.ops.lt2.gdn_bwd.default
_step = torch.ops.lt2.gdn_step_.default
_fused = torch.ops.lt2.gdn_decode_fused_.default


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
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
    """Gated delta rule (Gated DeltaNet, arXiv 2412.06464), parallel over chunks of tokens.

    For every value head, with a state ``S`` of shape ``[K, V]`` and one token after the other::

        S <- exp(g) S
        S <- S + beta k (v - k^T S)^T
        o  = scale q^T S

    Value head ``h`` uses query/key head ``h // (HV // H)``. Differentiable once in every tensor but ``cu_seqlens``.
    Under autocast q, k and v are cast to the autocast dtype. Results do not depend on the number of threads.

    Args:
        q: ``[B, T, H, K]`` float32 or bfloat16 (on CUDA also float16), ``1 <= K <= 256``. Any strides.
        k: ``[B, T, H, K]``, dtype of q.
        v: ``[B, T, HV, V]``, dtype of q, HV a multiple of H, ``1 <= V <= 512``.
        g: ``[B, T, HV]``, any float dtype, the natural log of the decay, ``<= 0``; ``-inf`` resets the state.
            None: no decay. With ``use_gate_in_kernel`` the raw gate ``a``.
        beta: ``[B, T, HV]``, any float dtype, the writing strength. None: ones.
        scale: of the output. None: ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, any float dtype, used as float32; N is B, or the number of sequences.
            None: zeros.
        output_final_state: return the state after the last token of each sequence too.
        use_qk_l2norm_in_kernel: replace q and k by ``x * rsqrt(sum(x^2) + 1e-6)``.
        use_gate_in_kernel: the decay is ``-exp(A_log) * softplus(g + dt_bias)`` (softplus linear above 20).
        A_log: ``[HV]``, any float dtype; with ``use_gate_in_kernel`` only, and required there.
        dt_bias: ``[HV]``, any float dtype; with ``use_gate_in_kernel`` only. None: zeros.
        use_beta_sigmoid_in_kernel: beta is raw, its sigmoid is used.
        allow_neg_eigval: use twice the sigmoid; needs ``use_beta_sigmoid_in_kernel``.
        state_v_first: states are ``[N, HV, V, K]``.
        cu_seqlens: ``[N + 1]`` int32 or int64, on the device of q: sequence n is tokens
            ``cu_seqlens[n] : cu_seqlens[n + 1]`` of the only batch row (``B == 1``). A sequence may be empty: its state
            passes through. Tokens of no sequence give zeros.
        cu_seqlens_cpu: the same values on the CPU: data-dependent checks then need no synchronisation.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` float32 or None.

    Raises:
        ValueError: dtypes or options that do not go together; under ``lt2_ext.set_checks(True)`` also ``g > 0`` or
            invalid ``cu_seqlens`` (always checked on the CPU, as a RuntimeError).
        RuntimeError: a shape, dtype or device that the operator rejects; double backward.
    """
    return delta_rule(
        "chunk_gated_delta_rule", False, q, k, v, g, beta, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        state_v_first, cu_seqlens, cu_seqlens_cpu,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated delta rule, token by token: for short sequences, and as a second opinion on the chunked form.

    Arguments, results, errors and gradients are those of :func:`chunk_gated_delta_rule`.
    """
    return delta_rule(
        "fused_recurrent_gated_delta_rule", True, q, k, v, g, beta, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        state_v_first, cu_seqlens, cu_seqlens_cpu,
    )  # fmt: skip


def gated_delta_step_(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> Tensor:
    """Decode ``t`` tokens per row of the gated delta rule, updating a pool of states in place.

    The recurrence of :func:`chunk_gated_delta_rule` with decay ``-exp(A_log) * softplus(a + dt_bias)`` and
    ``beta = sigmoid(b)``. Inference only: there is no derivative, so inputs that require one are an error in grad mode.

    Args:
        state: ``[slots, HV, K, V]`` (``[slots, HV, V, K]`` with ``state_v_first``) float32, or bfloat16, which is
            rounded once per call; updated in place. Any strides, but a contiguous last axis.
        q, k: ``[B, t, H, K]`` float32 or bfloat16 (on CUDA also float16), ``1 <= t <= 8``, ``1 <= K <= 256``.
        v: ``[B, t, HV, V]``, dtype of q, HV a multiple of H, ``1 <= V <= 512``.
        a, b: ``[B, t, HV]`` raw gate and raw beta, float32 or bfloat16 (on CUDA also float16), of one dtype.
        A_log, dt_bias: ``[HV]``, any float dtype.
        slots: ``[B]`` int64, the state of each row, no valid one twice. A row whose slot is -1 (or not in the pool)
            writes nothing and gives ``o = 0``. None: row b uses slot b.
        scale: of the output. None: ``K ** -0.5``.
        use_qk_l2norm_in_kernel: replace q and k by ``x * rsqrt(sum(x^2) + 1e-6)``.
        allow_neg_eigval: beta is ``2 * sigmoid(b)``.
        state_v_first: layout of ``state``.

    Returns:
        ``o`` ``[B, t, HV, V]`` in the dtype of v.

    Raises:
        ValueError: dtypes that do not go together; under ``lt2_ext.set_checks(True)`` also a slot used twice.
        RuntimeError: a shape, dtype, stride or device that the operator rejects; inputs that require a gradient.
    """
    op = "gated_delta_step_"
    inference_only(op, state, q, k, v, a, b, A_log, dt_bias)
    q, k, v = autocast(q, q, k, v)
    check_dtypes(op, q=q, k=k, v=v)
    if a.dtype != b.dtype:
        check(False, op, "b", f"have the dtype of a ({a.dtype})", b.dtype)
    check_slots(op, slots, state)
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    return _step(
        state, q, k, v, a, b, A_log.float(), dt_bias.float(), slots, scale, use_qk_l2norm_in_kernel, True,
        allow_neg_eigval, state_v_first, True,
    )  # fmt: skip


def gdn_decode_fused_(
    state: Tensor,
    conv_state: Tensor,
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    conv_bias: Tensor | None = None,
    slots: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    use_qk_l2norm_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
) -> Tensor:
    """Decode ``t`` tokens per row through the middle of a Gated DeltaNet layer, in one launch on CUDA::

        q, k, v = silu(conv(qkv))                       # causal_conv1d_step_ on conv_state
        o = gated_delta_step_(state, q, k, v, a, b, ..)
        o = rmsnorm(o, norm_weight, eps) * silu(z)      # over each head

    Nothing between the three is rounded. Inference only: there is no derivative, so inputs that require one are an
    error in grad mode. Not affected by autocast.

    Args:
        state: ``[slots, HV, K, V]`` float32 (``[slots, HV, V, K]`` with ``state_v_first``), updated in place; a
            contiguous last axis. On CUDA that axis and the strides must be multiples of 4, the memory aligned to 16
            bytes.
        conv_state: ``[slots, D, W]`` in the dtype of qkv, any strides, updated in place: the last W inputs.
        qkv: ``[B, t, D]`` float32 or bfloat16 (on CUDA also float16), ``1 <= t <= 8``; its ``D = 2 H K + HV V``
            channels are those of q, then k, then v, head after head.
        z: ``[B, t, HV, V]`` or ``[B, t, HV V]``, dtype of qkv.
        a, b: ``[B, t, HV]`` raw gate and raw beta, float32 or bfloat16 (on CUDA also float16), of one dtype.
        conv_weight, conv_bias: ``[D, W]`` (``1 <= W <= 16``) and ``[D]`` of any float dtype.
        A_log, dt_bias: ``[HV]``, any float dtype.
        norm_weight: ``[V]``, any float dtype.
        slots: ``[B]`` int64, the state of each row, no valid one twice. A row whose slot is -1 (or not in the pool)
            writes nothing and gives ``o = 0``. None: row b uses slot b.
        scale: of the output of the rule. None: ``K ** -0.5``.
        eps: of the RMSNorm.
        use_qk_l2norm_in_kernel, allow_neg_eigval, state_v_first: as in :func:`gated_delta_step_`.

    Returns:
        ``o`` in the shape and dtype of z.

    Raises:
        ValueError: dtypes that do not go together; under ``lt2_ext.set_checks(True)`` also a slot used twice.
        RuntimeError: a shape, dtype, stride or device that the operator rejects; inputs that require a gradient.
    """
    op = "gdn_decode_fused_"
    tensors = (state, conv_state, qkv, z, a, b, conv_weight, A_log, dt_bias, norm_weight)
    inference_only(op, *tensors, conv_bias)
    check(a.dtype == b.dtype, op, "b", f"have the dtype of a ({a.dtype})", b.dtype)
    check_slots(op, slots, state)
    scale = (state.shape[-1 if state_v_first else -2] or 1) ** -0.5 if scale is None else scale
    return _fused(
        state, conv_state, qkv, z, a, b, conv_weight.float(), as_float(conv_bias), A_log.float(), dt_bias.float(),
        norm_weight.float(), slots, scale, eps, use_qk_l2norm_in_kernel, allow_neg_eigval, state_v_first,
    )  # fmt: skip


def delta_rule(
    op: str, recurrent: bool, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    scale: float | None, initial_state: Tensor | None, output_final_state: bool, use_qk_l2norm: bool, use_gate: bool,
    A_log: Tensor | None, dt_bias: Tensor | None, use_beta_sigmoid: bool, allow_neg_eigval: bool, state_v_first: bool,
    cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, delta: bool = True,
    forward: Callable[..., tuple[Tensor, Tensor]] = _fwd,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    tensors, scale = check_inputs(
        op, q, k, v, g, beta, scale, use_gate, A_log, dt_bias, use_beta_sigmoid, allow_neg_eigval, cu_seqlens,
        cu_seqlens_cpu,
    )  # fmt: skip
    o, final_state = run(
        forward, *tensors, as_float(initial_state), cu_seqlens, scale, use_qk_l2norm, use_beta_sigmoid,
        allow_neg_eigval, state_v_first, delta, output_final_state, recurrent,
    )  # fmt: skip
    return o, final_state if output_final_state else None


def check_inputs(
    op: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, scale: float | None,
    use_gate: bool, A_log: Tensor | None, dt_bias: Tensor | None, use_beta_sigmoid: bool, allow_neg_eigval: bool,
    cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], float]:  # fmt: skip
    """``(q, k, v, g, beta, A_log, dt_bias)`` in the dtypes of the kernels, and the scale."""
    q, k, v = autocast(q, q, k, v)
    check_dtypes(op, q=q, k=k, v=v)
    alone = allow_neg_eigval and not use_beta_sigmoid
    check(not alone, op, "allow_neg_eigval", "come with use_beta_sigmoid_in_kernel", "allow_neg_eigval alone")
    check(not use_beta_sigmoid or beta is not None, op, "use_beta_sigmoid_in_kernel", "come with beta", None)
    if use_gate:
        check(g is not None, op, "use_gate_in_kernel", "come with g (the raw a)", None)
        check(A_log is not None, op, "use_gate_in_kernel", "come with A_log", None)
        if A_log is not None and g is not None and dt_bias is None:
            dt_bias = A_log.new_zeros(g.shape[2:].numel())
    else:
        check(A_log is None and dt_bias is None, op, "A_log and dt_bias", "come with use_gate_in_kernel", False)
    if cu_seqlens_cpu is not None:
        check(cu_seqlens is not None, op, "cu_seqlens_cpu", "come with cu_seqlens", None)
        shape = [] if cu_seqlens is None else list(cu_seqlens.shape)
        check(cu_seqlens_cpu.device.type == "cpu", op, "cu_seqlens_cpu", "be on the CPU", cu_seqlens_cpu.device)
        got = list(cu_seqlens_cpu.shape)
        check(got == shape, op, "cu_seqlens_cpu", f"have shape {shape}", got)
    if checks_enabled() and not torch.compiler.is_compiling():
        _check_values(op, None if use_gate else g, q.shape[1], cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    return (q, k, v, *map(as_float, (g, beta, A_log, dt_bias))), scale


def _check_values(op: str, g: Tensor | None, tokens: int, cu_seqlens: Tensor | None) -> None:
    if g is not None and g.numel() > 0:
        check(bool((g <= 0).all()), op, "g", "be <= 0 (the log of a decay)", f"a maximum of {g.max().item()}")
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        valid = offsets == sorted(offsets) and offsets[0] >= 0 and offsets[-1] <= tokens
        check(valid, op, "cu_seqlens", f"not decrease and stay within 0..T = {tokens}", offsets)


def fake_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, A_log: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    use_qk_l2norm: bool, use_beta_sigmoid: bool, allow_neg_eigval: bool, state_v_first: bool, delta: bool,
    output_final_state: bool, recurrent: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    torch._check(q.dim() == 4 and v.dim() == 4 and k.shape == q.shape and v.shape[:2] == q.shape[:2])
    o = v.new_empty(v.shape)
    if not output_final_state:
        return o, v.new_empty(0, dtype=torch.float32)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    K, HV, V = q.shape[3], v.shape[2], v.shape[3]
    shape = (sequences, HV, V, K) if state_v_first else (sequences, HV, K, V)
    return o, v.new_empty(shape, dtype=torch.float32)


def fake_backward(
    dout: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None,
    beta: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, use_qk_l2norm: bool, use_beta_sigmoid: bool,
    allow_neg_eigval: bool, state_v_first: bool, delta: bool, recurrent: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def optional(t: Tensor | None, *partial: int) -> Tensor:
        return q.new_empty((0,) if t is None else (*partial, *t.shape), dtype=torch.float32)

    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), optional(g), optional(beta),
        optional(A_log, sequences), optional(dt_bias, sequences), optional(initial_state),
    )  # fmt: skip


_common.fake("gdn_fwd")(fake_forward)
_common.fake("gdn_bwd")(fake_backward)
_common.fake("gdn_step_")(lambda state, q, k, v, *_: v.new_empty(v.shape))
_common.fake("gdn_decode_fused_")(lambda state, conv_state, qkv, z, *_: z.new_empty(z.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *rest, ctx.output_final_state, recurrent = inputs
    ctx.save_for_backward(*rest[:9])
    ctx.options = (*rest[9:], recurrent)
    ctx.set_materialize_grads(False)


def _backward(
    backward: Callable[..., tuple[Tensor, ...]], ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dout = torch.zeros_like(tensors[2]) if dout is None else dout
    dfinal_state = dfinal_state if ctx.output_final_state else None  # else it is the placeholder's
    *grads, dA_log, ddt_bias, dinitial_state = run(backward, dout, dfinal_state, *tensors, *ctx.options)
    if tensors[5] is not None:  # A_log; its gradient and that of dt_bias come as a partial sum for each sequence
        dA_log, ddt_bias = dA_log.sum(0), ddt_bias.sum(0)
    return wanted(ctx, *grads, dA_log, ddt_bias, dinitial_state)


def differentiate(op: str, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Autograd of ``lt2::<op>``: nine tensors, options, ``output_final_state``, ``recurrent``."""
    _common.differentiable(op, _setup_context, functools.partial(_backward, backward))


differentiate("gdn_fwd", _bwd)
