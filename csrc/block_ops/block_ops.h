// Contract of what surrounds the token mixers in a block:
//   swiglu:         out = silu(gate) up
//   gated RMSNorm:  out = o rsqrt(mean(o^2) + eps) weight silu(z)
//   linear step:    out_i = x W_i^T for a few rows x, perhaps of rmsnorm(x), perhaps + residual; or of two W
//                   silu(x W_0^T) (x W_1^T)
//   rope cache:     rotated queries; rotated keys, and values, into a cache at the places of their tokens
// The only header shared by bindings and kernels: POD parameters, raw pointers, an opaque stream.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/status.h"

namespace lt2::block_ops {

// [rows, channels] of `dtype`. Outputs are contiguous; weight, rstd and dweight are float32.
struct Shape {
  Dtype dtype;
  int64_t rows, channels;
};

// Rows of contiguous channels: row r begins (r / inner) outer + (r % inner) stride elements after data.
struct Rows {
  void const* data;
  int64_t inner, stride, outer;
};

struct SwigluParams : Shape {
  Rows gate, up;
  void* out;
};

struct SwigluBackwardParams : Shape {
  Rows dout, gate, up;
  void *dgate, *dup;
};

struct GatedNormParams : Shape {
  Rows o, z;
  float const* weight;
  float eps;
  void* out;
  float* rstd;  // [rows]
};

struct GatedNormBackwardParams : Shape {
  Rows dout, o, z;
  float const *rstd, *weight;
  void *d_o, *dz;
  float* dweight;
};

constexpr int kMostLinears = 8, kMostStepRows = 16;

// x, weights and outputs contiguous.
struct LinearStepParams {
  struct Part {
    void const* weight;  // [outputs, channels]
    void* out;           // [rows, outputs]
    int outputs;
    bool float_out;  // else of dtype
  };
  Dtype dtype;
  int rows, channels, count;
  Part parts[kMostLinears];
  void const* x;            // [rows, channels]
  void const* norm_weight;  // [channels] float32 or of dtype, or null
  void const* residual;     // [rows, outputs] or null; of one output
  float eps;
  bool float_norm_weight, swiglu;
  bool settled;  // no kernel that still runs writes weights, norm_weight or residual
};

// [B, t, H, D], a cache [slots, S, H, D], with a contiguous last axis; strides in elements.
struct Heads {
  void* data;
  int64_t row, token, head;
};

// x [D] at angles [D / 2] becomes (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 its halves. A token whose
// slot or place is out of range writes nothing into the caches.
struct RopeCacheParams {
  Dtype dtype;
  int64_t batch, tokens, slots, capacity;
  int query_heads, heads, dim, value_dim;  // both even
  Heads q, k, v, k_cache, v_cache;
  float const *cos, *sin;   // [B or 1, t, D / 2] contiguous
  int64_t angle_row;        // 0 or t D / 2
  int64_t const* places;    // [B, t]
  int64_t const* slot_ids;  // [B] or null: row b is slot b
  void* q_out;              // [B, t, HQ, D] contiguous
};

namespace cpu {
// Floats of workspace, to be passed to the call with the same parameters.
int64_t gated_norm_backward_workspace(GatedNormBackwardParams const& p);
void swiglu(SwigluParams const& p, ThreadPool const& pool);
void swiglu_backward(SwigluBackwardParams const& p, ThreadPool const& pool);
void gated_norm(GatedNormParams const& p, ThreadPool const& pool);
void gated_norm_backward(GatedNormBackwardParams const& p, float* workspace, ThreadPool const& pool);
void rope_cache(RopeCacheParams const& p, ThreadPool const& pool);
// workspace [rows, channels].
void linear_step(LinearStepParams const& p, float* workspace, ThreadPool const& pool);
}  // namespace cpu

// Plain CUDA for any GPU that the build has code for. supports() returns kOk or the rule that is broken.
namespace portable {
Status gated_norm_supports(Shape const& p);
int64_t gated_norm_backward_workspace(GatedNormBackwardParams const& p);
Status swiglu(SwigluParams const& p, void* cuda_stream);
Status swiglu_backward(SwigluBackwardParams const& p, void* cuda_stream);
Status gated_norm(GatedNormParams const& p, void* cuda_stream);
Status gated_norm_backward(GatedNormBackwardParams const& p, float* workspace, void* cuda_stream);
Status rope_cache(RopeCacheParams const& p, void* cuda_stream);
Status linear_step_supports(LinearStepParams const& p);
Status linear_step(LinearStepParams const& p, void* cuda_stream);
}  // namespace portable

}  // namespace lt2::block_ops
