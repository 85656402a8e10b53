// Contract of the operators that carry state across the loops of a looped model and across decode steps:
//   residual:            out = h + rho h_in
//   residual + RMSNorm:  h_out = h + rho h_in;  normed = h_out rsqrt(mean(h_out^2) + eps) weight
//   decode attention:    softmax(scale q K^T) V over the cached keys of (loop, slot)
//   zero, copy:          whole slots of a pool
// The only header shared by bindings and kernels: POD parameters, raw pointers, an opaque stream.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/status.h"

namespace lt2::loop_state {

// Activations are contiguous [rows, D] of `dtype`; rho, weight [D], rstd [rows] and the gradients of rho and
// weight are float32.
struct Shape {
  Dtype dtype;
  int64_t rows, channels;
};

struct ResidualParams : Shape {
  void const *h, *h_in;
  float const* rho;
  void* out;
};

struct ResidualBackwardParams : Shape {
  void const *dout, *h_in;
  float const* rho;
  void* dh_in;
  float* drho;
};

// rho may be null here: ones.
struct ResidualNormParams : ResidualParams {
  float const* weight;
  float eps;
  void* normed;  // of the rounded out
  float* rstd;
};

// Without rho there is no h_in, dh_in and drho: the gradient of both is dh.
struct ResidualNormBackwardParams : Shape {
  void const *dh_out, *dnormed, *h_out, *h_in;
  float const *rstd, *rho, *weight;
  void *dh, *dh_in;
  float *drho, *dweight;
};

// [loops, slots, S, H, D] with a contiguous last axis; strides in elements.
struct Cache {
  void const* data;
  int64_t loop, slot, token, head;
};

// Query i of row b sees the keys [0, lengths[b] - tokens + i + 1) of its slot and loop, limited to the
// capacity; with indices those of them that its list names (whatever else is in a list is ignored). Query
// head h uses key head h / (query_heads / heads). A row without visible keys, or whose slot or loop is out of
// range, gives 0.
struct DecodeParams {
  Dtype dtype;
  int64_t batch, tokens, capacity, slots, loops;
  int query_heads, heads, key_dim, value_dim;
  float scale;
  void const* q;  // [B, t, HQ, D] contiguous
  Cache k, v;
  void const* lengths;  // [B]
  bool lengths_int64;
  int64_t const* slot_ids;  // [B] or null: row b is slot b
  int64_t const* loop_map;  // [B] or null: loop 0
  int32_t const* indices;   // [B, t, topk] or null: every key that a query sees
  int64_t topk;
  void* o;  // [B, t, HQ, DV] contiguous
};

// Slots of any element type: `rows` pieces of row_bytes contiguous bytes each, strides in bytes.
struct Pool {
  char* data;
  int64_t slots, slot_stride, rows, row_stride, row_bytes;
};

// Slots that are out of range are skipped.
struct ZeroParams {
  Pool pool;
  int64_t count;
  int64_t const* ids;
};

// Reads every source before the first write. A destination that is named twice gets the last of its sources.
struct CopyParams {
  Pool pool;
  int64_t count;
  int64_t const *src, *dst;
};

namespace cpu {
// Floats (copy: bytes) of workspace, to be passed to the call with the same parameters.
int64_t residual_backward_workspace(ResidualBackwardParams const& p);
int64_t residual_norm_backward_workspace(ResidualNormBackwardParams const& p);
int64_t decode_workspace(DecodeParams const& p, ThreadPool const& pool);
int64_t copy_workspace(CopyParams const& p);
void residual(ResidualParams const& p, ThreadPool const& pool);
void residual_backward(ResidualBackwardParams const& p, float* workspace, ThreadPool const& pool);
void residual_norm(ResidualNormParams const& p, ThreadPool const& pool);
void residual_norm_backward(ResidualNormBackwardParams const& p, float* workspace, ThreadPool const& pool);
void decode(DecodeParams const& p, float* workspace, ThreadPool const& pool);
void zero(ZeroParams const& p, ThreadPool const& pool);
void copy(CopyParams const& p, char* workspace, ThreadPool const& pool);
}  // namespace cpu

// Hopper (sm_90a), asked before portable: attention to lists of keys in one launch.
namespace sm90 {
Status supports(DecodeParams const& p);
Status decode(DecodeParams const& p, void* cuda_stream);
}  // namespace sm90

// Plain CUDA for any GPU that the build has code for. supports() returns kOk or the rule that is broken.
namespace portable {
Status supports(DecodeParams const& p);
Status supports(Shape const& p);
int64_t decode_workspace(DecodeParams const& p);
int64_t residual_backward_workspace(ResidualBackwardParams const& p);
int64_t residual_norm_backward_workspace(ResidualNormBackwardParams const& p);
int64_t copy_workspace(CopyParams const& p);
Status residual(ResidualParams const& p, void* cuda_stream);
Status residual_backward(ResidualBackwardParams const& p, float* workspace, void* cuda_stream);
Status residual_norm(ResidualNormParams const& p, void* cuda_stream);
Status residual_norm_backward(ResidualNormBackwardParams const& p, float* workspace, void* cuda_stream);
Status decode(DecodeParams const& p, float* workspace, void* cuda_stream);
Status zero(ZeroParams const& p, void* cuda_stream);
Status copy(CopyParams const& p, char* workspace, void* cuda_stream);
}  // namespace portable

}  // namespace lt2::loop_state
