#include "kda/kda.h"

#include <tuple>

#include "bindings/gdn_operands.h"

namespace lt2 {
namespace {

#define OP "lt2::kda"

// g is what these operators are about.
gdn::Inputs const& inputs(Operands const& x) {
  STD_TORCH_CHECK(x.g.has_value(), OP ": g must be given, got None");
  return x.params;
}

std::tuple<Tensor, Tensor> kda_fwd(Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& g,
                                   OptionalTensor const& beta, OptionalTensor const& A_log,
                                   OptionalTensor const& dt_bias, OptionalTensor const& initial_state,
                                   OptionalTensor const& cu_seqlens, double scale, bool use_qk_l2norm,
                                   bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first,
                                   bool delta, bool output_final_state, bool recurrent) {
  Operands const x(OP, true, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale,
                   use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, state_v_first, delta);
  Tensor const o = x.token_output(x.v);
  Tensor const final_state = output_final_state ? x.states() : x.absent();
  kda::ForwardParams const p{inputs(x), recurrent, strided(o), floats(final_state)};
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    check_status(OP, kda::portable::supports(p));
    Tensor const workspace = empty(q, {kda::portable::forward_workspace(p)}, ScalarType::Float);
    check_status(OP, kda::portable::forward(p, floats(workspace), current_cuda_stream(q)));
  } else {
    ThreadPool const pool = torch_pool();
    Tensor const workspace = empty(q, {kda::cpu::forward_workspace(p, pool)}, ScalarType::Float);
    kda::cpu::forward(p, floats(workspace), pool);
  }
  return {o, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kda_bwd(
    Tensor const& dout, OptionalTensor const& dfinal_state, Tensor const& q, Tensor const& k, Tensor const& v,
    OptionalTensor const& g, OptionalTensor const& beta, OptionalTensor const& A_log,
    OptionalTensor const& dt_bias, OptionalTensor const& initial_state, OptionalTensor const& cu_seqlens,
    double scale, bool use_qk_l2norm, bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first,
    bool delta, bool recurrent) {
  Operands const x(OP, true, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale,
                   use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, state_v_first, delta);
  int64_t const B = x.params.batch, T = x.params.tokens, N = x.params.sequences;
  int64_t const HV = x.params.value_heads, K = x.params.key_dim;
  x.check_cotangents(dout, dfinal_state);
  Tensor const dout_rows = with_unit_last_stride(dout);
  OptionalTensor const dfinal = contiguous(dfinal_state);
  Tensor const dq = x.token_output(x.q), dk = x.token_output(x.k), dv = x.token_output(x.v);
  Tensor const dg = x.token_output({B, T, HV, K}, ScalarType::Float);
  Tensor const dbeta = beta ? x.token_output({B, T, HV}, ScalarType::Float) : x.absent();
  Tensor const dA_log = A_log ? empty(q, {N, HV}, ScalarType::Float) : x.absent();
  Tensor const ddt_bias = A_log ? empty(q, {N, HV * K}, ScalarType::Float) : x.absent();
  Tensor const dinitial_state = initial_state ? x.states() : x.absent();
  kda::BackwardParams const p{inputs(x),      recurrent,        strided(dout_rows),
                              floats(dfinal), strided(dq),      strided(dk),
                              strided(dv),    strided(dg),      beta ? strided(dbeta) : Strided{},
                              floats(dA_log), floats(ddt_bias), floats(dinitial_state)};
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    check_status(OP, kda::portable::supports(p));
    Tensor const workspace = empty(q, {kda::portable::backward_workspace(p)}, ScalarType::Float);
    check_status(OP, kda::portable::backward(p, floats(workspace), current_cuda_stream(q)));
  } else {
    ThreadPool const pool = torch_pool();
    Tensor const workspace = empty(q, {kda::cpu::backward_workspace(p, pool)}, ScalarType::Float);
    kda::cpu::backward(p, floats(workspace), pool);
  }
  return {dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dinitial_state};
}

Tensor kda_step_(Tensor const& state, Tensor const& q, Tensor const& k, Tensor const& v,
                 OptionalTensor const& g, OptionalTensor const& beta, OptionalTensor const& A_log,
                 OptionalTensor const& dt_bias, OptionalTensor const& slots, double scale, bool use_qk_l2norm,
                 bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first, bool delta) {
  Operands const x(OP, true, q, k, v, g, beta, A_log, dt_bias, std::nullopt, std::nullopt, scale,
                   use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, state_v_first, delta);
  int64_t const B = x.params.batch, T = x.params.tokens;
  STD_TORCH_CHECK(T >= 1 && T <= kMaxStepTokens, OP ": q must have T in 1..", kMaxStepTokens, ", got ", T);
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Float || state.scalar_type() == ScalarType::BFloat16,
                  OP ": state must be float32 or bfloat16, got ", dtype_name(state.scalar_type()));
  check_pool(OP, state, slots, B, x.params.value_heads, x.params.key_dim, x.params.value_dim, state_v_first,
             q);
  OptionalTensor const rows = contiguous(slots);
  Tensor const o = empty(q, {B, T, x.params.value_heads, x.params.value_dim}, v.scalar_type());
  kda::StepParams const p{inputs(x),
                          strided(o),
                          state.size(0),
                          kernel_dtype(state),
                          state.mutable_data_ptr(),
                          state.stride(0),
                          state.stride(1),
                          state.stride(2),
                          rows ? static_cast<int64_t const*>(rows->const_data_ptr()) : nullptr};
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    check_status(OP, kda::portable::supports(p));
    check_status(OP, kda::portable::step(p, current_cuda_stream(q)));
  } else {
    kda::cpu::step(p, torch_pool());
  }
  return o;
}

#undef OP

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) {
  m.impl("kda_fwd", TORCH_BOX(&kda_fwd));
  m.impl("kda_bwd", TORCH_BOX(&kda_bwd));
  m.impl("kda_step_", TORCH_BOX(&kda_step_));
}
STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) {
  m.impl("kda_fwd", TORCH_BOX(&kda_fwd));
  m.impl("kda_bwd", TORCH_BOX(&kda_bwd));
  m.impl("kda_step_", TORCH_BOX(&kda_step_));
}

}  // namespace lt2
