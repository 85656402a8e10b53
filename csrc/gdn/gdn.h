// Contract of the gated delta rule, per value head with state S [K, V]:
//   S <- e^g S;  S <- S + beta k (v - k^T S)^T;  o = scale q^T S.
// Without `delta` nothing is erased, S <- S + beta k v^T: linear attention with a scalar decay.
// The only header shared by bindings and kernels: POD parameters, raw pointers, an opaque stream.
#pragma once

#include <cstdint>

#include "causal_conv1d/causal_conv1d.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/status.h"

namespace lt2::gdn {

// [B, T, heads, D] with a contiguous last axis (or [B, T, heads] scalars); strides in elements.
struct Strided {
  void* data;
  int64_t batch, token, head;
};

// Sequence n is batch row n, or tokens [cu_seqlens[n], cu_seqlens[n + 1]) of the only row.
struct Inputs {
  Dtype dtype;  // of q, k, v, the output and their gradients
  int64_t batch, tokens, sequences;
  int heads, value_heads, key_dim, value_dim;  // value head h uses query/key head h / (value_heads / heads)
  float scale;
  bool delta;
  bool qk_l2norm;     // q, k <- x rsqrt(sum x^2 + 1e-6)
  bool beta_sigmoid;  // beta is raw; doubled with neg_eigval
  bool neg_eigval;
  bool state_v_first;  // states are [.., V, K]
  Strided q, k, v;
  Strided g, beta;             // fp32; data null: no decay, ones
  float const* A_log;          // [HV]; not null: g is raw a, the decay is -exp(A_log) softplus(a + dt_bias)
  float const* dt_bias;        // [HV]
  float const* initial_state;  // [N, HV, K, V] or null
  void const* cu_seqlens;      // [N + 1] or null
  bool cu_seqlens_int64;
};

struct ForwardParams : Inputs {
  bool recurrent;  // token by token instead of by chunks
  Strided o;
  float* final_state;  // [N, HV, K, V] or null
};

// Gradients of inputs that are null (g, beta, A_log, initial_state) are null as well.
struct BackwardParams : Inputs {
  bool recurrent;  // as the forward pass
  Strided dout;
  float const* dfinal_state;  // or null
  Strided dq, dk, dv, dg, dbeta;
  float *dA_log, *ddt_bias;  // [N, HV]: one partial per sequence, the caller adds them up
  float* dinitial_state;
};

// In-place decode of `tokens` tokens per row on a pool of states. A bf16 state is fp32 from the first to the
// last token.
struct StepParams {
  Dtype dtype, gate_dtype, state_dtype;
  int64_t batch, slots;
  int tokens, heads, value_heads, key_dim, value_dim;
  float scale;
  bool delta, qk_l2norm, neg_eigval, state_v_first;
  bool beta_sigmoid;             // b is raw
  Strided q, k, v, a, b, o;      // a or b with data null: no decay, ones
  float const *A_log, *dt_bias;  // null: a is the log decay
  void* state;  // element [slot, head, i, j] at slot * state_slot + head * state_head + i * state_row + j
  int64_t state_slot, state_head, state_row;
  int64_t const*
      slot_ids;  // [B] or null (row b is slot b); negative or out of range: o = 0, nothing is written
};

// The step with what surrounds it in a layer: channels (q, k, v) = conv(x) before, o <- rmsnorm(o) weight
// silu(z) after.
struct FusedStepParams {
  // x [B, t, 2 H K + HV V]; y is not used; rows, slots and dtype are those of `step`.
  causal_conv1d::StepParams conv;
  StepParams step;           // q, k, v are not used
  Strided z;                 // [B, t, HV, V]
  float const* norm_weight;  // [V]
  float eps;
  bool settled;  // no kernel that still runs writes state or slots
};

namespace cpu {
// Floats of workspace, to be passed to the call with the same parameters and pool.
int64_t forward_workspace(ForwardParams const& p, ThreadPool const& pool);
int64_t backward_workspace(BackwardParams const& p, ThreadPool const& pool);
void forward(ForwardParams const& p, float* workspace, ThreadPool const& pool);
void backward(BackwardParams const& p, float* workspace, ThreadPool const& pool);
void step(StepParams const& p, ThreadPool const& pool);
int64_t fused_step_workspace(FusedStepParams const& p);
void fused_step(FusedStepParams const& p, float* workspace, ThreadPool const& pool);
}  // namespace cpu

// Hopper (sm_90a), asked before portable. supports() returns kOk or the rule that is broken; workspaces are
// in floats.
namespace sm90 {
Status supports(ForwardParams const& p);
int64_t forward_workspace(ForwardParams const& p);
Status forward(ForwardParams const& p, float* workspace, void* cuda_stream);
Status supports_backward(BackwardParams const& p);
int64_t backward_workspace(BackwardParams const& p);
Status backward(BackwardParams const& p, float* workspace, void* cuda_stream);
Status step_supports(StepParams const& p);
Status step(StepParams const& p, void* cuda_stream);
}  // namespace sm90

// Plain CUDA for any GPU that the build has code for. supports() returns kOk or the rule that is broken.
namespace portable {
Status supports(Inputs const& p);
int64_t forward_workspace(ForwardParams const& p);
int64_t backward_workspace(BackwardParams const& p);
Status forward(ForwardParams const& p, float* workspace, void* cuda_stream);
Status backward(BackwardParams const& p, float* workspace, void* cuda_stream);
Status step(StepParams const& p, void* cuda_stream);
Status fused_step_supports(FusedStepParams const& p);
Status fused_step(FusedStepParams const& p, void* cuda_stream);
}  // namespace portable

}  // namespace lt2::gdn
