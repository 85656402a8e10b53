// What one instruction set provides: a range of rows or of heads, for dispatch.cpp to spread over threads.
#pragma once

#include "block_ops/block_ops.h"

namespace lt2::block_ops {

struct Kernels {
  void (*swiglu)(SwigluParams const& p, int64_t begin, int64_t end);
  void (*swiglu_backward)(SwigluBackwardParams const& p, int64_t begin, int64_t end);
  void (*gated_norm)(GatedNormParams const& p, int64_t begin, int64_t end);
  // partial: this range's part of dweight [D], then scratch [D].
  void (*gated_norm_backward)(GatedNormBackwardParams const& p, int64_t begin, int64_t end, float* partial);
  // Of the [B t] tokens, whose heads are those of q, then of k, then of v.
  void (*rope_cache)(RopeCacheParams const& p, int64_t token, int begin_head, int end_head);
  // x [rows, channels]: what enters the products.
  void (*linear_step_rows)(LinearStepParams const& p, float* x);
  void (*linear_step)(LinearStepParams const& p, float const* x, int part, int begin, int end);
};

}  // namespace lt2::block_ops
