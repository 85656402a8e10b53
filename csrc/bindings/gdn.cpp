#include "gdn/gdn.h"

#include <tuple>

#include "bindings/gdn_operands.h"
#include "bindings/steps.h"

namespace lt2 {
namespace {

#define OP "lt2::gdn"

void check_gate(OptionalTensor const& t, char const* name, std::initializer_list<int64_t> sizes,
                Tensor const& like) {
  if (!t) return;
  STD_TORCH_CHECK(has_shape(*t, sizes), OP ": ", name, " must have shape [B, T, HV] = ", shape_string(sizes),
                  ", got ", shape_string(*t));
  check_activation_dtype(OP, *t, name);
  STD_TORCH_CHECK(t->device() == like.device(), OP ": ", name, " and q must be on one device");
}

std::tuple<Tensor, Tensor> gdn_fwd(Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& g,
                                   OptionalTensor const& beta, OptionalTensor const& A_log,
                                   OptionalTensor const& dt_bias, OptionalTensor const& initial_state,
                                   OptionalTensor const& cu_seqlens, double scale, bool use_qk_l2norm,
                                   bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first,
                                   bool delta, bool output_final_state, bool recurrent) {
  Operands const x(OP, false, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale,
                   use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, state_v_first, delta);
  Tensor const o = x.token_output(x.v);
  Tensor const final_state = output_final_state ? x.states() : x.absent();
  gdn::ForwardParams const p{x.params, recurrent, strided(o), floats(final_state)};
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    bool const hopper = !portable_only(OP) && gdn::sm90::supports(p) == kOk;
    if (!hopper) check_status(OP, gdn::portable::supports(p));
    int64_t const size = (hopper ? gdn::sm90::forward_workspace : gdn::portable::forward_workspace)(p);
    Tensor const workspace = empty(q, {size}, ScalarType::Float);
    check_status(OP, (hopper ? gdn::sm90::forward : gdn::portable::forward)(p, floats(workspace),
                                                                            current_cuda_stream(q)));
  } else {
    ThreadPool const pool = torch_pool();
    Tensor const workspace = empty(q, {gdn::cpu::forward_workspace(p, pool)}, ScalarType::Float);
    gdn::cpu::forward(p, floats(workspace), pool);
  }
  return {o, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gdn_bwd(
    Tensor const& dout, OptionalTensor const& dfinal_state, Tensor const& q, Tensor const& k, Tensor const& v,
    OptionalTensor const& g, OptionalTensor const& beta, OptionalTensor const& A_log,
    OptionalTensor const& dt_bias, OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens,
    double scale, bool use_qk_l2norm, bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first,
    bool delta, bool recurrent) {
  Operands const x(OP, false, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale,
                   use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, state_v_first, delta);
  int64_t const B = x.params.batch, T = x.params.tokens, N = x.params.sequences;
  int64_t const HV = x.params.value_heads;
  x.check_cotangents(dout, dfinal_state);

  Tensor const dout_rows = with_unit_last_stride(dout);
  OptionalTensor const dfinal = contiguous(dfinal_state);
  Tensor const dq = x.token_output(x.q), dk = x.token_output(x.k), dv = x.token_output(x.v);
  Tensor const dg = g ? x.token_output({B, T, HV}, ScalarType::Float) : x.absent();
  Tensor const dbeta = beta ? x.token_output({B, T, HV}, ScalarType::Float) : x.absent();
  Tensor const dA_log = A_log ? empty(q, {N, HV}, ScalarType::Float) : x.absent();
  Tensor const ddt_bias = A_log ? empty(q, {N, HV}, ScalarType::Float) : x.absent();
  Tensor const dinitial_state = initial_state ? x.states() : x.absent();
  gdn::BackwardParams const p{x.params,
                              recurrent,
                              strided(dout_rows),
                              floats(dfinal),
                              strided(dq),
                              strided(dk),
                              strided(dv),
                              g ? strided(dg) : Strided{},
                              beta ? strided(dbeta) : Strided{},
                              floats(dA_log),
                              floats(ddt_bias),
                              floats(dinitial_state)};
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    bool const hopper = !portable_only(OP) && gdn::sm90::supports_backward(p) == kOk;
    if (!hopper) check_status(OP, gdn::portable::supports(p));
    int64_t const size = hopper ? gdn::sm90::backward_workspace(p) : gdn::portable::backward_workspace(p);
    Tensor const workspace = empty(q, {size}, ScalarType::Float);
    check_status(OP, (hopper ? gdn::sm90::backward : gdn::portable::backward)(p, floats(workspace),
                                                                              current_cuda_stream(q)));
  } else {
    ThreadPool const pool = torch_pool();
    Tensor const workspace = empty(q, {gdn::cpu::backward_workspace(p, pool)}, ScalarType::Float);
    gdn::cpu::backward(p, floats(workspace), pool);
  }
  return {dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dinitial_state};
}

// The checked arguments that both steps share; owns what `params` points to. q, k, v and o are left to the
// caller.
struct StepOperands {
  OptionalTensor A_log, dt_bias, slots;
  gdn::StepParams params{};

  StepOperands(Tensor const& state, Tensor const& like, int64_t T, int64_t H, int64_t HV, int64_t K,
               int64_t V, OptionalTensor const& a, OptionalTensor const& b, OptionalTensor const& A_log_,
               OptionalTensor const& dt_bias_, OptionalTensor const& slots_, double scale, bool use_qk_l2norm,
               bool allow_neg_eigval, bool state_v_first) {
    int64_t const B = like.size(0);
    STD_TORCH_CHECK(T >= 1 && T <= kMaxStepTokens, OP ": q must have T in 1..", kMaxStepTokens, ", got ", T);
    check_gate(a, "a", {B, T, HV}, like);
    check_gate(b, "b", {B, T, HV}, like);
    STD_TORCH_CHECK(!a || !b || a->scalar_type() == b->scalar_type(), OP ": b must be ",
                    dtype_name(a->scalar_type()), " as a, got ", dtype_name(b->scalar_type()));
    STD_TORCH_CHECK(!A_log_ || (a && dt_bias_), OP ": A_log must come with a and dt_bias");
    check_float32(OP, A_log_, "A_log", "[HV]", {HV}, like);
    check_float32(OP, dt_bias_, "dt_bias", "[HV]", {HV}, like);
    check_pool(OP, state, slots_, B, HV, K, V, state_v_first, like);
    A_log = contiguous(A_log_);
    dt_bias = contiguous(dt_bias_);
    slots = contiguous(slots_);
    params.dtype = kernel_dtype(like);
    params.gate_dtype = a ? kernel_dtype(*a) : b ? kernel_dtype(*b) : Dtype::kFloat32;
    params.batch = B;
    params.slots = state.size(0);
    params.tokens = static_cast<int>(T);
    params.heads = static_cast<int>(H);
    params.value_heads = static_cast<int>(HV);
    params.key_dim = static_cast<int>(K);
    params.value_dim = static_cast<int>(V);
    params.scale = static_cast<float>(scale);
    params.qk_l2norm = use_qk_l2norm;
    params.delta = params.beta_sigmoid = true;
    params.neg_eigval = allow_neg_eigval;
    params.state_v_first = state_v_first;
    params.a = strided(a);
    params.b = strided(b);
    params.A_log = floats(A_log);
    params.dt_bias = floats(dt_bias);
    params.state_dtype = kernel_dtype(state);
    params.state = state.mutable_data_ptr();
    params.state_slot = state.stride(0);
    params.state_head = state.stride(1);
    params.state_row = state.stride(2);
    params.slot_ids = slots ? static_cast<int64_t const*>(slots->const_data_ptr()) : nullptr;
  }
};

Tensor gdn_step_(Tensor const& state, Tensor const& q, Tensor const& k, Tensor const& v,
                 OptionalTensor const& a, OptionalTensor const& b, OptionalTensor const& A_log,
                 OptionalTensor const& dt_bias, OptionalTensor const& slots, double scale, bool use_qk_l2norm,
                 bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first, bool delta) {
  check_heads(OP, q, k, v);
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Float || state.scalar_type() == ScalarType::BFloat16,
                  OP ": state must be float32 or bfloat16, got ", dtype_name(state.scalar_type()));
  int64_t const B = q.size(0), T = q.size(1), HV = v.size(2), V = v.size(3);
  StepOperands x(state, q, T, q.size(2), HV, q.size(3), V, a, b, A_log, dt_bias, slots, scale, use_qk_l2norm,
                 allow_neg_eigval, state_v_first);
  Tensor const q_rows = with_unit_last_stride(q), k_rows = with_unit_last_stride(k),
               v_rows = with_unit_last_stride(v);
  Tensor const o = empty(q, {B, T, HV, V}, v.scalar_type());
  gdn::StepParams& p = x.params;
  p.beta_sigmoid = use_beta_sigmoid;
  p.delta = delta;
  p.q = strided(q_rows);
  p.k = strided(k_rows);
  p.v = strided(v_rows);
  p.o = strided(o);
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    bool const hopper = !portable_only(OP) && gdn::sm90::step_supports(p) == kOk;
    check_status(OP, (hopper ? gdn::sm90::step : gdn::portable::step)(p, current_cuda_stream(q)));
  } else {
    gdn::cpu::step(p, torch_pool());
  }
  return o;
}

}  // namespace

Tensor gdn_fused_step(Tensor const& state, Tensor const& conv_state, Tensor const& qkv, Tensor const& z,
                      Tensor const& a, Tensor const& b, Tensor const& conv_weight,
                      OptionalTensor const& conv_bias, Tensor const& A_log, Tensor const& dt_bias,
                      Tensor const& norm_weight, OptionalTensor const& slots, double scale, double eps,
                      bool use_qk_l2norm, bool allow_neg_eigval, bool state_v_first, bool settled) {
  LT2_CHECK_DIM(OP, qkv, 3);
  check_activation_dtype(OP, qkv, "qkv");
  LT2_CHECK_DIM(OP, state, 4);
  LT2_CHECK_DTYPE(OP, state, ScalarType::Float);
  int64_t const B = qkv.size(0), T = qkv.size(1), D = qkv.size(2), HV = state.size(1);
  int64_t const K = state.size(state_v_first ? 3 : 2), V = state.size(state_v_first ? 2 : 3);
  STD_TORCH_CHECK(K > 0 && K <= kMaxKeyDim, OP ": state must have K in 1..", kMaxKeyDim, ", got ", K);
  STD_TORCH_CHECK(V > 0 && V <= kMaxValueDim, OP ": state must have V in 1..", kMaxValueDim, ", got ", V);
  int64_t const keys = D - HV * V, H = keys / (2 * K);
  STD_TORCH_CHECK(keys > 0 && keys % (2 * K) == 0 && HV % H == 0,
                  OP ": qkv must have 2 H K + HV V channels with HV = ", HV, " a multiple of H, K = ", K,
                  " and V = ", V, ", got ", D);
  StepOperands x(state, qkv, T, H, HV, K, V, a, b, A_log, dt_bias, slots, scale, use_qk_l2norm,
                 allow_neg_eigval, state_v_first);
  bool const flat = z.dim() == 3;
  if (flat) {
    LT2_CHECK_SHAPE(OP, z, "[B, T, HV V]", B, T, HV * V);
  } else {
    LT2_CHECK_SHAPE(OP, z, "[B, T, HV, V]", B, T, HV, V);
  }
  LT2_CHECK_DTYPE(OP, z, qkv.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, z, qkv);
  LT2_CHECK_DIM(OP, conv_weight, 2);
  int64_t const W = conv_weight.size(1);
  STD_TORCH_CHECK(W >= 1 && W <= causal_conv1d::kMaxWidth, OP ": conv_weight must have W in 1..",
                  causal_conv1d::kMaxWidth, ", got ", W);
  check_float32(OP, conv_weight, "conv_weight", "[D, W]", {D, W}, qkv);
  check_float32(OP, conv_bias, "conv_bias", "[D]", {D}, qkv);
  check_float32(OP, norm_weight, "norm_weight", "[V]", {V}, qkv);
  LT2_CHECK_SHAPE(OP, conv_state, "[slots, D, W]", state.size(0), D, W);
  LT2_CHECK_DTYPE(OP, conv_state, qkv.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, conv_state, qkv);

  Tensor const rows = with_unit_last_stride(qkv), gates = with_unit_last_stride(z);
  Tensor const taps = torch::stable::contiguous(conv_weight), norm = torch::stable::contiguous(norm_weight);
  OptionalTensor const bias = contiguous(conv_bias);
  Tensor const o = empty_as(z);
  gdn::FusedStepParams p{};
  p.step = x.params;
  p.step.o = {o.mutable_data_ptr(), T * HV * V, HV * V, V};
  p.z = flat ? Strided{const_cast<void*>(gates.const_data_ptr()), gates.stride(0), gates.stride(1), V}
             : strided(gates);
  p.norm_weight = static_cast<float const*>(norm.const_data_ptr());
  p.eps = static_cast<float>(eps);
  p.settled = settled && (!slots || slots->is_contiguous());  // else they are a copy that was just made
  p.conv.dtype = p.step.dtype;
  p.conv.batch = B;
  p.conv.tokens = T;
  p.conv.channels = D;
  p.conv.slots = p.step.slots;
  p.conv.width = static_cast<int>(W);
  p.conv.silu = true;
  p.conv.x = {const_cast<void*>(rows.const_data_ptr()), rows.stride(0), rows.stride(1)};
  p.conv.weight = static_cast<float const*>(taps.const_data_ptr());
  p.conv.bias = floats(bias);
  p.conv.state = {conv_state.mutable_data_ptr(), conv_state.stride(0), conv_state.stride(1),
                  conv_state.stride(2)};
  p.conv.slot_ids = p.step.slot_ids;
  if (qkv.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(qkv.get_device_index());
    check_status(OP, gdn::portable::fused_step_supports(p));
    check_status(OP, gdn::portable::fused_step(p, current_cuda_stream(qkv)));
  } else {
    Tensor const workspace = empty(qkv, {gdn::cpu::fused_step_workspace(p)}, ScalarType::Float);
    gdn::cpu::fused_step(p, floats(workspace), torch_pool());
  }
  return o;
}

namespace {

Tensor gdn_decode_fused_(Tensor const& state, Tensor const& conv_state, Tensor const& qkv, Tensor const& z,
                         Tensor const& a, Tensor const& b, Tensor const& conv_weight,
                         OptionalTensor const& conv_bias, Tensor const& A_log, Tensor const& dt_bias,
                         Tensor const& norm_weight, OptionalTensor const& slots, double scale, double eps,
                         bool use_qk_l2norm, bool allow_neg_eigval, bool state_v_first) {
  return gdn_fused_step(state, conv_state, qkv, z, a, b, conv_weight, conv_bias, A_log, dt_bias, norm_weight,
                        slots, scale, eps, use_qk_l2norm, allow_neg_eigval, state_v_first, false);
}

}  // namespace

#undef OP

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) {
  m.impl("gdn_fwd", TORCH_BOX(&gdn_fwd));
  m.impl("gdn_bwd", TORCH_BOX(&gdn_bwd));
  m.impl("gdn_step_", TORCH_BOX(&gdn_step_));
  m.impl("gdn_decode_fused_", TORCH_BOX(&gdn_decode_fused_));
}
STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) {
  m.impl("gdn_fwd", TORCH_BOX(&gdn_fwd));
  m.impl("gdn_bwd", TORCH_BOX(&gdn_bwd));
  m.impl("gdn_step_", TORCH_BOX(&gdn_step_));
  m.impl("gdn_decode_fused_", TORCH_BOX(&gdn_decode_fused_));
}

}  // namespace lt2
