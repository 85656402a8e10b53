// Checks and operands of the recurrences, gated delta rule and its kind: one decay per head or per key
// channel.
#pragma once

#include <cstdlib>

#include "bindings/tensor.h"
#include "gdn/gdn.h"

namespace lt2 {

using gdn::Strided;

constexpr int64_t kMaxKeyDim = 256;
constexpr int64_t kMaxValueDim = 512;
constexpr int64_t kMaxStepTokens = 8;

inline void check_status(char const* op, Status status) { STD_TORCH_CHECK(status == kOk, op, ": ", status); }

inline void check_activation_dtype(char const* op, Tensor const& x, char const* name) {
  bool const half_ok = x.scalar_type() == ScalarType::Half && x.is_cuda();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16 || half_ok,
                  op, ": ", name, " must be float32 or bfloat16 (or float16 on CUDA), got ",
                  dtype_name(x.scalar_type()));
}

inline void check_heads(char const* op, Tensor const& q, Tensor const& k, Tensor const& v) {
  LT2_CHECK_DIM(op, q, 4);
  LT2_CHECK_DIM(op, v, 4);
  int64_t const B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3), HV = v.size(2), V = v.size(3);
  LT2_CHECK_SHAPE(op, k, "[B, T, H, K]", B, T, H, K);
  LT2_CHECK_SHAPE(op, v, "[B, T, HV, V]", B, T, HV, V);
  STD_TORCH_CHECK(H > 0 && HV > 0 && HV % H == 0, op, ": v must have a multiple of q's heads, got ", HV,
                  " and ", H);
  STD_TORCH_CHECK(K > 0 && K <= kMaxKeyDim, op, ": q must have K in 1..", kMaxKeyDim, ", got ", K);
  STD_TORCH_CHECK(V > 0 && V <= kMaxValueDim, op, ": v must have V in 1..", kMaxValueDim, ", got ", V);
  check_activation_dtype(op, q, "q");
  LT2_CHECK_DTYPE(op, k, q.scalar_type());
  LT2_CHECK_DTYPE(op, v, q.scalar_type());
  LT2_CHECK_SAME_DEVICE(op, k, q);
  LT2_CHECK_SAME_DEVICE(op, v, q);
}

inline void check_float32(char const* op, OptionalTensor const& t, char const* name, char const* rule,
                          std::initializer_list<int64_t> sizes, Tensor const& q) {
  if (!t) return;
  STD_TORCH_CHECK(has_shape(*t, sizes), op, ": ", name, " must have shape ", rule, " = ", shape_string(sizes),
                  ", got ", shape_string(*t));
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
                  dtype_name(t->scalar_type()));
  STD_TORCH_CHECK(t->device() == q.device(), op, ": ", name, " and q must be on one device");
}

// Whether the sequences leave no token out.
template <class Int>
bool check_offsets(char const* op, Int const* offsets, int64_t sequences, int64_t tokens) {
  STD_TORCH_CHECK(offsets[0] >= 0, op, ": cu_seqlens must start at 0 or later, got ", offsets[0]);
  for (int64_t n = 0; n < sequences; ++n) {
    STD_TORCH_CHECK(offsets[n] <= offsets[n + 1], op, ": cu_seqlens must not decrease, got ", offsets[n],
                    " before ", offsets[n + 1]);
  }
  STD_TORCH_CHECK(offsets[sequences] <= tokens, op, ": cu_seqlens must end at T = ", tokens,
                  " or earlier, got ", offsets[sequences]);
  return offsets[0] == 0 && offsets[sequences] == tokens;
}

// LT2_CUDA_KERNELS=portable leaves the kernels for one architecture aside, to test and to measure the
// portable ones on it.
inline bool portable_only(char const* op) {
  static bool const portable = [op] {
    char const* const kernels = std::getenv("LT2_CUDA_KERNELS");
    if (kernels == nullptr) return false;
    STD_TORCH_CHECK(std::string(kernels) == "portable", op, ": LT2_CUDA_KERNELS must be portable, got ",
                    kernels);
    return true;
  }();
  return portable;
}

inline Strided strided(Tensor const& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

inline Strided strided(OptionalTensor const& t) { return t ? strided(*t) : Strided{}; }

inline OptionalTensor contiguous(OptionalTensor const& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

inline float* floats(Tensor const& t) {
  return t.numel() == 0 ? nullptr : static_cast<float*>(t.mutable_data_ptr());
}

inline float const* floats(OptionalTensor const& t) {
  return t ? static_cast<float const*>(t->const_data_ptr()) : nullptr;
}

// A pool of states for B rows, and the slots of the rows.
inline void check_pool(char const* op, Tensor const& state, OptionalTensor const& slots, int64_t B,
                       int64_t HV, int64_t K, int64_t V, bool state_v_first, Tensor const& like) {
  LT2_CHECK_DIM(op, state, 4);
  if (state_v_first) {
    LT2_CHECK_SHAPE(op, state, "[slots, HV, V, K]", state.size(0), HV, V, K);
  } else {
    LT2_CHECK_SHAPE(op, state, "[slots, HV, K, V]", state.size(0), HV, K, V);
  }
  LT2_CHECK_SAME_DEVICE(op, state, like);
  STD_TORCH_CHECK(state.size(3) == 1 || state.stride(3) == 1, op,
                  ": state must have a contiguous last axis, got stride ", state.stride(3));
  if (slots) {
    STD_TORCH_CHECK(has_shape(*slots, {B}), op, ": slots must have shape [B] = ", shape_string({B}), ", got ",
                    shape_string(*slots));
    STD_TORCH_CHECK(slots->scalar_type() == ScalarType::Long, op, ": slots must be int64, got ",
                    dtype_name(slots->scalar_type()));
    STD_TORCH_CHECK(slots->device() == like.device(), op, ": slots and q must be on one device");
  } else {
    STD_TORCH_CHECK(state.size(0) >= B, op, ": state must have at least B = ", B, " slots, got ",
                    state.size(0));
  }
}

// The checked arguments that forward and backward share; owns what `params` points to.
struct Operands {
  char const* op;
  Tensor q, k, v;
  OptionalTensor g, beta, A_log, dt_bias, initial_state, cu_seqlens;
  gdn::Inputs params;
  bool all_tokens_covered = true;  // by sequences, as far as the host knows

  // With decay_per_channel, g is [B, T, HV, K] and dt_bias [HV K].
  Operands(char const* op_, bool decay_per_channel, Tensor const& q_, Tensor const& k_, Tensor const& v_,
           OptionalTensor const& g_, OptionalTensor const& beta_, OptionalTensor const& A_log_,
           OptionalTensor const& dt_bias_, OptionalTensor const& initial_state_,
           OptionalTensor const& cu_seqlens_, double scale, bool use_qk_l2norm, bool use_beta_sigmoid,
           bool allow_neg_eigval, bool state_v_first, bool delta = true)
      : op(op_), beta(beta_) {
    check_heads(op, q_, k_, v_);
    q = with_unit_last_stride(q_);
    k = with_unit_last_stride(k_);
    v = with_unit_last_stride(v_);
    int64_t const B = q.size(0), T = q.size(1), HV = v.size(2);
    int64_t const K = q.size(3);
    if (decay_per_channel) {
      check_float32(op, g_, "g", "[B, T, HV, K]", {B, T, HV, K}, q);
    } else {
      check_float32(op, g_, "g", "[B, T, HV]", {B, T, HV}, q);
    }
    g = g_ && decay_per_channel ? OptionalTensor(with_unit_last_stride(*g_)) : g_;
    check_float32(op, beta, "beta", "[B, T, HV]", {B, T, HV}, q);
    check_float32(op, A_log_, "A_log", "[HV]", {HV}, q);
    if (decay_per_channel) {
      check_float32(op, dt_bias_, "dt_bias", "[HV K]", {HV * K}, q);
    } else {
      check_float32(op, dt_bias_, "dt_bias", "[HV]", {HV}, q);
    }
    STD_TORCH_CHECK(!A_log_ || (g && dt_bias_), op, ": A_log must come with g and dt_bias");
    A_log = contiguous(A_log_);
    dt_bias = contiguous(dt_bias_);

    int64_t const N = cu_seqlens_ ? check_cu_seqlens(*cu_seqlens_) : B;
    check_float32(op, initial_state_, "initial_state", state_v_first ? "[N, HV, V, K]" : "[N, HV, K, V]",
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
    params.delta = delta;
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
    STD_TORCH_CHECK(q.size(0) == 1, op, ": q must have B = 1 when cu_seqlens is given, got B = ", q.size(0));
    STD_TORCH_CHECK(cu_seqlens_.dim() == 1 && cu_seqlens_.size(0) >= 1, op,
                    ": cu_seqlens must have shape [N + 1], got ", shape_string(cu_seqlens_));
    ScalarType const type = cu_seqlens_.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op,
                    ": cu_seqlens must be int32 or int64, got ", dtype_name(type));
    STD_TORCH_CHECK(cu_seqlens_.device() == q.device(), op, ": cu_seqlens and q must be on one device");
    cu_seqlens = torch::stable::contiguous(cu_seqlens_);
    int64_t const N = cu_seqlens_.size(0) - 1, T = q.size(1);
    void const* const data = cu_seqlens->const_data_ptr();
    if (q.is_cuda()) {
      all_tokens_covered = false;
    } else if (type == ScalarType::Long) {
      all_tokens_covered = check_offsets(op, static_cast<int64_t const*>(data), N, T);
    } else {
      all_tokens_covered = check_offsets(op, static_cast<int32_t const*>(data), N, T);
    }
    return N;
  }

  void check_cotangents(Tensor const& dout, OptionalTensor const& dfinal_state) const {
    int64_t const HV = params.value_heads, K = params.key_dim, V = params.value_dim;
    LT2_CHECK_SHAPE(op, dout, "[B, T, HV, V]", params.batch, params.tokens, HV, V);
    LT2_CHECK_DTYPE(op, dout, v.scalar_type());
    LT2_CHECK_SAME_DEVICE(op, dout, q);
    check_float32(op, dfinal_state, "dfinal_state", params.state_v_first ? "[N, HV, V, K]" : "[N, HV, K, V]",
                  {params.sequences, HV, params.state_v_first ? V : K, params.state_v_first ? K : V}, q);
  }

  // Contiguous output per token: zero where no sequence writes.
  Tensor token_output(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    if (!all_tokens_covered) return torch::stable::new_zeros(q, {sizes.begin(), sizes.size()}, dtype);
    Tensor const t = empty(q, sizes, dtype);
    FreshPages(t).clear();  // threads write rows of different heads, side by side
    return t;
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

}  // namespace lt2
