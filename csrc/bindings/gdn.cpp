#include "gdn/gdn.h"

#include <cstdlib>
#include <tuple>

#include "bindings/tensor.h"

namespace lt2 {
namespace {

using gdn::Strided;

#define OP "lt2::gdn"

constexpr int64_t kMaxKeyDim = 256;
constexpr int64_t kMaxValueDim = 512;
constexpr int64_t kMaxStepTokens = 8;

void check_status(Status status) { STD_TORCH_CHECK(status == kOk, OP ": ", status); }

void check_activation_dtype(Tensor const& x, char const* name) {
  bool const half_ok = x.scalar_type() == ScalarType::Half && x.is_cuda();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16 || half_ok,
                  OP ": ", name, " must be float32 or bfloat16 (or float16 on CUDA), got ",
                  dtype_name(x.scalar_type()));
}

void check_heads(Tensor const& q, Tensor const& k, Tensor const& v) {
  LT2_CHECK_DIM(OP, q, 4);
  LT2_CHECK_DIM(OP, v, 4);
  int64_t const B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3), HV = v.size(2), V = v.size(3);
  LT2_CHECK_SHAPE(OP, k, "[B, T, H, K]", B, T, H, K);
  LT2_CHECK_SHAPE(OP, v, "[B, T, HV, V]", B, T, HV, V);
  STD_TORCH_CHECK(H > 0 && HV > 0 && HV % H == 0, OP ": v must have a multiple of q's heads, got ", HV,
                  " and ", H);
  STD_TORCH_CHECK(K > 0 && K <= kMaxKeyDim, OP ": q must have K in 1..", kMaxKeyDim, ", got ", K);
  STD_TORCH_CHECK(V > 0 && V <= kMaxValueDim, OP ": v must have V in 1..", kMaxValueDim, ", got ", V);
  check_activation_dtype(q, "q");
  LT2_CHECK_DTYPE(OP, k, q.scalar_type());
  LT2_CHECK_DTYPE(OP, v, q.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, k, q);
  LT2_CHECK_SAME_DEVICE(OP, v, q);
}

void check_float32(OptionalTensor const& t, char const* name, char const* rule,
                   std::initializer_list<int64_t> sizes, Tensor const& q) {
  if (!t) return;
  STD_TORCH_CHECK(has_shape(*t, sizes), OP ": ", name, " must have shape ", rule, " = ", shape_string(sizes),
                  ", got ", shape_string(*t));
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, OP ": ", name, " must be float32, got ",
                  dtype_name(t->scalar_type()));
  STD_TORCH_CHECK(t->device() == q.device(), OP ": ", name, " and q must be on one device");
}

// Whether the sequences leave no token out.
template <class Int>
bool check_offsets(Int const* offsets, int64_t sequences, int64_t tokens) {
  STD_TORCH_CHECK(offsets[0] >= 0, OP ": cu_seqlens must start at 0 or later, got ", offsets[0]);
  for (int64_t n = 0; n < sequences; ++n) {
    STD_TORCH_CHECK(offsets[n] <= offsets[n + 1], OP ": cu_seqlens must not decrease, got ", offsets[n],
                    " before ", offsets[n + 1]);
  }
  STD_TORCH_CHECK(offsets[sequences] <= tokens, OP ": cu_seqlens must end at T = ", tokens,
                  " or earlier, got ", offsets[sequences]);
  return offsets[0] == 0 && offsets[sequences] == tokens;
}

// LT2_CUDA_KERNELS=portable leaves the kernels for one architecture aside, to test and to measure the
// portable ones on it.
bool portable_only() {
  static bool const portable = [] {
    char const* const kernels = std::getenv("LT2_CUDA_KERNELS");
    if (kernels == nullptr) return false;
    STD_TORCH_CHECK(std::string(kernels) == "portable", OP ": LT2_CUDA_KERNELS must be portable, got ",
                    kernels);
    return true;
  }();
  return portable;
}

Strided strided(Tensor const& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

Strided strided(OptionalTensor const& t) { return t ? strided(*t) : Strided{}; }

OptionalTensor contiguous(OptionalTensor const& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

float* floats(Tensor const& t) {
  return t.numel() == 0 ? nullptr : static_cast<float*>(t.mutable_data_ptr());
}

float const* floats(OptionalTensor const& t) {
  return t ? static_cast<float const*>(t->const_data_ptr()) : nullptr;
}

// The checked arguments that forward and backward share; owns what `params` points to.
struct Operands {
  Tensor q, k, v;
  OptionalTensor g, beta, A_log, dt_bias, initial_state, cu_seqlens;
  gdn::Inputs params;
  bool all_tokens_covered = true;  // by sequences, as far as the host knows

  Operands(Tensor const& q_, Tensor const& k_, Tensor const& v_, OptionalTensor const& g_,
           OptionalTensor const& beta_, OptionalTensor const& A_log_, OptionalTensor const& dt_bias_,
           OptionalTensor const& initial_state_, OptionalTensor const& cu_seqlens_, double scale,
           bool use_qk_l2norm, bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first)
      : g(g_), beta(beta_) {
    check_heads(q_, k_, v_);
    q = with_unit_last_stride(q_);
    k = with_unit_last_stride(k_);
    v = with_unit_last_stride(v_);
    int64_t const B = q.size(0), T = q.size(1), HV = v.size(2);
    check_float32(g, "g", "[B, T, HV]", {B, T, HV}, q);
    check_float32(beta, "beta", "[B, T, HV]", {B, T, HV}, q);
    check_float32(A_log_, "A_log", "[HV]", {HV}, q);
    check_float32(dt_bias_, "dt_bias", "[HV]", {HV}, q);
    STD_TORCH_CHECK(!A_log_ || (g && dt_bias_), OP ": A_log must come with g and dt_bias");
    A_log = contiguous(A_log_);
    dt_bias = contiguous(dt_bias_);

    int64_t const N = cu_seqlens_ ? check_cu_seqlens(*cu_seqlens_) : B;
    check_float32(initial_state_, "initial_state", state_v_first ? "[N, HV, V, K]" : "[N, HV, K, V]",
                  {N, HV, state_v_first ? v.size(3) : q.size(3), state_v_first ? q.size(3) : v.size(3)}, q);
    initial_state = contiguous(initial_state_);

    params.dtype = kernel_dtype(q);
    params.batch = B;
    params.tokens = T;
    params.sequences = N;
    params.heads = static_cast<int>(q.size(2));
    params.value_heads = static_cast<int>(HV);
    params.key_dim = static_cast<int>(q.size(3));
    params.value_dim = static_cast<int>(v.size(3));
    params.scale = static_cast<float>(scale);
    params.qk_l2norm = use_qk_l2norm;
    params.beta_sigmoid = use_beta_sigmoid;
    params.neg_eigval = allow_neg_eigval;
    params.state_v_first = state_v_first;
    params.q = strided(q);
    params.k = strided(k);
    params.v = strided(v);
    params.g = strided(g);
    params.beta = strided(beta);
    params.A_log = floats(A_log);
    params.dt_bias = floats(dt_bias);
    params.initial_state = floats(initial_state);
    params.cu_seqlens = cu_seqlens ? cu_seqlens->const_data_ptr() : nullptr;
    params.cu_seqlens_int64 = cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long;
  }

  // The number of sequences.
  int64_t check_cu_seqlens(Tensor const& cu_seqlens_) {
    STD_TORCH_CHECK(q.size(0) == 1, OP ": q must have B = 1 when cu_seqlens is given, got B = ", q.size(0));
    STD_TORCH_CHECK(cu_seqlens_.dim() == 1 && cu_seqlens_.size(0) >= 1,
                    OP ": cu_seqlens must have shape [N + 1], got ", shape_string(cu_seqlens_));
    ScalarType const type = cu_seqlens_.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long,
                    OP ": cu_seqlens must be int32 or int64, got ", dtype_name(type));
    STD_TORCH_CHECK(cu_seqlens_.device() == q.device(), OP ": cu_seqlens and q must be on one device");
    cu_seqlens = torch::stable::contiguous(cu_seqlens_);
    int64_t const N = cu_seqlens_.size(0) - 1, T = q.size(1);
    void const* const data = cu_seqlens->const_data_ptr();
    if (q.is_cuda()) {
      all_tokens_covered = false;
    } else if (type == ScalarType::Long) {
      all_tokens_covered = check_offsets(static_cast<int64_t const*>(data), N, T);
    } else {
      all_tokens_covered = check_offsets(static_cast<int32_t const*>(data), N, T);
    }
    return N;
  }

  // Contiguous output per token: zero where no sequence writes.
  Tensor token_output(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return all_tokens_covered ? empty(q, sizes, dtype)
                              : torch::stable::new_zeros(q, {sizes.begin(), sizes.size()}, dtype);
  }

  Tensor token_output(Tensor const& like) const {
    return token_output({like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type());
  }

  Tensor absent() const { return empty(q, {0}, ScalarType::Float); }

  Tensor states() const {
    int64_t const K = params.key_dim, V = params.value_dim;
    return empty(
        q, {params.sequences, params.value_heads, params.state_v_first ? V : K, params.state_v_first ? K : V},
        ScalarType::Float);
  }
};

std::tuple<Tensor, Tensor> gdn_fwd(Tensor const& q, Tensor const& k, Tensor const& v, OptionalTensor const& g,
                                   OptionalTensor const& beta, OptionalTensor const& A_log,
                                   OptionalTensor const& dt_bias, OptionalTensor const& initial_state,
                                   OptionalTensor const& cu_seqlens, double scale, bool use_qk_l2norm,
                                   bool use_beta_sigmoid, bool allow_neg_eigval, bool state_v_first,
                                   bool output_final_state, bool recurrent) {
  Operands const x(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, use_qk_l2norm,
                   use_beta_sigmoid, allow_neg_eigval, state_v_first);
  Tensor const o = x.token_output(x.v);
  Tensor const final_state = output_final_state ? x.states() : x.absent();
  gdn::ForwardParams const p{x.params, recurrent, strided(o), floats(final_state)};
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    bool const hopper = !portable_only() && gdn::sm90::supports(p) == kOk;
    if (!hopper) check_status(gdn::portable::supports(p));
    int64_t const size = (hopper ? gdn::sm90::forward_workspace : gdn::portable::forward_workspace)(p);
    Tensor const workspace = empty(q, {size}, ScalarType::Float);
    check_status(
        (hopper ? gdn::sm90::forward : gdn::portable::forward)(p, floats(workspace), current_cuda_stream(q)));
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
    bool recurrent) {
  Operands const x(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, use_qk_l2norm,
                   use_beta_sigmoid, allow_neg_eigval, state_v_first);
  int64_t const B = x.params.batch, T = x.params.tokens, N = x.params.sequences;
  int64_t const HV = x.params.value_heads, K = x.params.key_dim, V = x.params.value_dim;
  LT2_CHECK_SHAPE(OP, dout, "[B, T, HV, V]", B, T, HV, V);
  LT2_CHECK_DTYPE(OP, dout, v.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, dout, q);
  check_float32(dfinal_state, "dfinal_state", state_v_first ? "[N, HV, V, K]" : "[N, HV, K, V]",
                {N, HV, state_v_first ? V : K, state_v_first ? K : V}, q);

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
    bool const hopper = !portable_only() && gdn::sm90::supports_backward(p) == kOk;
    if (!hopper) check_status(gdn::portable::supports(p));
    int64_t const size = hopper ? gdn::sm90::backward_workspace(p) : gdn::portable::backward_workspace(p);
    Tensor const workspace = empty(q, {size}, ScalarType::Float);
    check_status((hopper ? gdn::sm90::backward : gdn::portable::backward)(p, floats(workspace),
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
  Tensor A_log, dt_bias;
  OptionalTensor slots;
  gdn::StepParams params{};

  StepOperands(Tensor const& state, Tensor const& like, int64_t T, int64_t H, int64_t HV, int64_t K,
               int64_t V, Tensor const& a, Tensor const& b, Tensor const& A_log_, Tensor const& dt_bias_,
               OptionalTensor const& slots_, double scale, bool use_qk_l2norm, bool allow_neg_eigval,
               bool state_v_first) {
    int64_t const B = like.size(0);
    STD_TORCH_CHECK(T >= 1 && T <= kMaxStepTokens, OP ": q must have T in 1..", kMaxStepTokens, ", got ", T);
    LT2_CHECK_SHAPE(OP, a, "[B, T, HV]", B, T, HV);
    LT2_CHECK_SHAPE(OP, b, "[B, T, HV]", B, T, HV);
    check_activation_dtype(a, "a");
    LT2_CHECK_DTYPE(OP, b, a.scalar_type());
    LT2_CHECK_SAME_DEVICE(OP, a, like);
    LT2_CHECK_SAME_DEVICE(OP, b, like);
    check_float32(A_log_, "A_log", "[HV]", {HV}, like);
    check_float32(dt_bias_, "dt_bias", "[HV]", {HV}, like);
    LT2_CHECK_DIM(OP, state, 4);
    if (state_v_first) {
      LT2_CHECK_SHAPE(OP, state, "[slots, HV, V, K]", state.size(0), HV, V, K);
    } else {
      LT2_CHECK_SHAPE(OP, state, "[slots, HV, K, V]", state.size(0), HV, K, V);
    }
    LT2_CHECK_SAME_DEVICE(OP, state, like);
    STD_TORCH_CHECK(state.size(3) == 1 || state.stride(3) == 1,
                    OP ": state must have a contiguous last axis, got stride ", state.stride(3));
    if (slots_) {
      STD_TORCH_CHECK(has_shape(*slots_, {B}), OP ": slots must have shape [B] = ", shape_string({B}),
                      ", got ", shape_string(*slots_));
      STD_TORCH_CHECK(slots_->scalar_type() == ScalarType::Long, OP ": slots must be int64, got ",
                      dtype_name(slots_->scalar_type()));
      STD_TORCH_CHECK(slots_->device() == like.device(), OP ": slots and q must be on one device");
    } else {
      STD_TORCH_CHECK(state.size(0) >= B, OP ": state must have at least B = ", B, " slots, got ",
                      state.size(0));
    }
    A_log = torch::stable::contiguous(A_log_);
    dt_bias = torch::stable::contiguous(dt_bias_);
    slots = contiguous(slots_);
    params.dtype = kernel_dtype(like);
    params.gate_dtype = kernel_dtype(a);
    params.batch = B;
    params.slots = state.size(0);
    params.tokens = static_cast<int>(T);
    params.heads = static_cast<int>(H);
    params.value_heads = static_cast<int>(HV);
    params.key_dim = static_cast<int>(K);
    params.value_dim = static_cast<int>(V);
    params.scale = static_cast<float>(scale);
    params.qk_l2norm = use_qk_l2norm;
    params.neg_eigval = allow_neg_eigval;
    params.state_v_first = state_v_first;
    params.a = strided(a);
    params.b = strided(b);
    params.A_log = static_cast<float const*>(A_log.const_data_ptr());
    params.dt_bias = static_cast<float const*>(dt_bias.const_data_ptr());
    params.state_dtype = kernel_dtype(state);
    params.state = state.mutable_data_ptr();
    params.state_slot = state.stride(0);
    params.state_head = state.stride(1);
    params.state_row = state.stride(2);
    params.slot_ids = slots ? static_cast<int64_t const*>(slots->const_data_ptr()) : nullptr;
  }
};

Tensor gdn_step_(Tensor const& state, Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& a,
                 Tensor const& b, Tensor const& A_log, Tensor const& dt_bias, OptionalTensor const& slots,
                 double scale, bool use_qk_l2norm, bool allow_neg_eigval, bool state_v_first) {
  check_heads(q, k, v);
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Float || state.scalar_type() == ScalarType::BFloat16,
                  OP ": state must be float32 or bfloat16, got ", dtype_name(state.scalar_type()));
  int64_t const B = q.size(0), T = q.size(1), HV = v.size(2), V = v.size(3);
  StepOperands x(state, q, T, q.size(2), HV, q.size(3), V, a, b, A_log, dt_bias, slots, scale, use_qk_l2norm,
                 allow_neg_eigval, state_v_first);
  Tensor const q_rows = with_unit_last_stride(q), k_rows = with_unit_last_stride(k),
               v_rows = with_unit_last_stride(v);
  Tensor const o = empty(q, {B, T, HV, V}, v.scalar_type());
  gdn::StepParams& p = x.params;
  p.q = strided(q_rows);
  p.k = strided(k_rows);
  p.v = strided(v_rows);
  p.o = strided(o);
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    bool const hopper = !portable_only() && gdn::sm90::step_supports(p) == kOk;
    check_status((hopper ? gdn::sm90::step : gdn::portable::step)(p, current_cuda_stream(q)));
  } else {
    gdn::cpu::step(p, torch_pool());
  }
  return o;
}

Tensor gdn_decode_fused_(Tensor const& state, Tensor const& conv_state, Tensor const& qkv, Tensor const& z,
                         Tensor const& a, Tensor const& b, Tensor const& conv_weight,
                         OptionalTensor const& conv_bias, Tensor const& A_log, Tensor const& dt_bias,
                         Tensor const& norm_weight, OptionalTensor const& slots, double scale, double eps,
                         bool use_qk_l2norm, bool allow_neg_eigval, bool state_v_first) {
  LT2_CHECK_DIM(OP, qkv, 3);
  check_activation_dtype(qkv, "qkv");
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
  LT2_CHECK_SHAPE(OP, z, "[B, T, HV, V]", B, T, HV, V);
  LT2_CHECK_DTYPE(OP, z, qkv.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, z, qkv);
  LT2_CHECK_DIM(OP, conv_weight, 2);
  int64_t const W = conv_weight.size(1);
  STD_TORCH_CHECK(W >= 1 && W <= causal_conv1d::kMaxWidth, OP ": conv_weight must have W in 1..",
                  causal_conv1d::kMaxWidth, ", got ", W);
  check_float32(conv_weight, "conv_weight", "[D, W]", {D, W}, qkv);
  check_float32(conv_bias, "conv_bias", "[D]", {D}, qkv);
  check_float32(norm_weight, "norm_weight", "[V]", {V}, qkv);
  LT2_CHECK_SHAPE(OP, conv_state, "[slots, D, W]", state.size(0), D, W);
  LT2_CHECK_DTYPE(OP, conv_state, qkv.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, conv_state, qkv);

  Tensor const rows = with_unit_last_stride(qkv), gates = with_unit_last_stride(z);
  Tensor const taps = torch::stable::contiguous(conv_weight), norm = torch::stable::contiguous(norm_weight);
  OptionalTensor const bias = contiguous(conv_bias);
  Tensor const o = empty(qkv, {B, T, HV, V}, qkv.scalar_type());
  gdn::FusedStepParams p{};
  p.step = x.params;
  p.step.o = strided(o);
  p.z = strided(gates);
  p.norm_weight = static_cast<float const*>(norm.const_data_ptr());
  p.eps = static_cast<float>(eps);
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
    check_status(gdn::portable::fused_step_supports(p));
    check_status(gdn::portable::fused_step(p, current_cuda_stream(qkv)));
  } else {
    Tensor const workspace = empty(qkv, {gdn::cpu::fused_step_workspace(p)}, ScalarType::Float);
    gdn::cpu::fused_step(p, floats(workspace), torch_pool());
  }
  return o;
}

#undef OP

}  // namespace

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
