// Contract of the causal depthwise convolution over the tokens of one sequence, W taps per channel:
//   z_t = bias + sum_w weight[:, w] x_{t-W+1+w};  y = silu(z), or z.
// Inputs before the first token come from the state: the last W inputs of a sequence, oldest first.
// The only header shared by bindings and kernels: POD parameters, raw pointers, an opaque stream.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/status.h"

namespace lt2::causal_conv1d {

inline constexpr int kMaxWidth = 16;

// [B, T, D] with a contiguous last axis; strides in elements.
struct Tokens {
  void* data;
  int64_t batch, token;
};

// [N, D, W]; strides in elements. data null: absent, as an input zeros.
struct State {
  void* data;
  int64_t sequence, channel, tap;
};

// Sequence n is batch row n, or tokens [cu_seqlens[n], cu_seqlens[n + 1]) of the only row; cu_seqlens must
// ascend within [0, T]. Tokens of no sequence have y = 0 and dx = 0.
struct Inputs {
  Dtype dtype;  // of x, y, the states and their gradients; float16 on CUDA only
  int64_t batch, tokens, channels, sequences;
  int width;  // 1 .. kMaxWidth
  bool silu;
  Tokens x;
  float const* weight;  // [D, W]
  float const* bias;    // [D] or null
  State initial_state;
  void const* cu_seqlens;  // [N + 1] or null
  bool cu_seqlens_int64;
};

struct ForwardParams : Inputs {
  Tokens y;
  State final_state;
};

struct BackwardParams : Inputs {
  Tokens dy;
  State dfinal_state;
  Tokens dx;
  float* dweight;  // [D, W]
  float* dbias;    // [D] or null
  State dinitial_state;
};

// In-place decode of a few tokens per row on a pool of states. No two rows may name the same slot.
struct StepParams {
  Dtype dtype;
  bool y_float32;  // on the CPU: y is not rounded to dtype
  int64_t batch, tokens, channels, slots;
  int width;
  bool silu;
  Tokens x, y;
  float const* weight;
  float const* bias;
  State state;  // [slots, D, W]
  int64_t const*
      slot_ids;  // [B] or null (row b is slot b); negative or out of range: y = 0, nothing is written
};

namespace cpu {
// Floats of workspace for backward() with the same parameters.
int64_t backward_workspace(BackwardParams const& p);
void forward(ForwardParams const& p, ThreadPool const& pool);
void backward(BackwardParams const& p, float* workspace, ThreadPool const& pool);
void step(StepParams const& p, ThreadPool const& pool);
}  // namespace cpu

// Plain CUDA for any GPU that the build has code for.
namespace portable {
int64_t backward_workspace(BackwardParams const& p);
Status forward(ForwardParams const& p, void* cuda_stream);
Status backward(BackwardParams const& p, float* workspace, void* cuda_stream);
Status step(StepParams const& p, void* cuda_stream);
}  // namespace portable

}  // namespace lt2::causal_conv1d
