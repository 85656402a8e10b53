// Contract of the recurrences with a decay per key channel, per value head with state S [K, V]:
//   S <- Diag(e^g) S;  S <- S + beta k (v - k^T S)^T  (delta) or S + beta k v^T;  o = scale q^T S.
// The only header shared by bindings and kernels. Parameters are gdn's, but for these: g and dg are [B, T,
// HV, K] with a contiguous last axis, never null; dt_bias is [HV, K], ddt_bias [N, HV, K].
#pragma once

#include "gdn/gdn.h"

namespace lt2::kda {

using gdn::BackwardParams;
using gdn::ForwardParams;
using gdn::Inputs;
using gdn::Strided;

// In-place decode of `tokens` tokens per row (a sequence) on a pool of states; a bf16 state is fp32 from the
// first to the last token.
struct StepParams : Inputs {
  Strided o;
  int64_t slots;
  Dtype state_dtype;
  void* state;  // element [slot, head, i, j] at slot * state_slot + head * state_head + i * state_row + j
  int64_t state_slot, state_head, state_row;
  int64_t const* slot_ids;  // [B] or null (row b is slot b); out of range: o = 0, nothing is written
};

namespace cpu {
// Floats of workspace, to be passed to the call with the same parameters and pool.
int64_t forward_workspace(ForwardParams const& p, ThreadPool const& pool);
int64_t backward_workspace(BackwardParams const& p, ThreadPool const& pool);
void forward(ForwardParams const& p, float* workspace, ThreadPool const& pool);
void backward(BackwardParams const& p, float* workspace, ThreadPool const& pool);
void step(StepParams const& p, ThreadPool const& pool);
}  // namespace cpu

// Plain CUDA for any GPU that the build has code for. supports() returns kOk or the rule that is broken;
// workspaces are in floats.
namespace portable {
Status supports(Inputs const& p);
int64_t forward_workspace(ForwardParams const& p);
int64_t backward_workspace(BackwardParams const& p);
Status forward(ForwardParams const& p, float* workspace, void* cuda_stream);
Status backward(BackwardParams const& p, float* workspace, void* cuda_stream);
Status step(StepParams const& p, void* cuda_stream);
}  // namespace portable

}  // namespace lt2::kda
