// The function table of one instruction set; block_ops_<isa>.cpp compiles it.
#pragma once

#include "block_ops/cpu/linear.h"
#include "block_ops/cpu/rope.h"
#include "block_ops/cpu/rows.h"

namespace lt2::block_ops::LT2_ISA {
namespace {

#define LT2_BY_DTYPE(f) (p.dtype == Dtype::kBFloat16 ? f<Bf16> : f<float>)

void swiglu(SwigluParams const& p, int64_t begin, int64_t end) { LT2_BY_DTYPE(swiglu_rows)(p, begin, end); }
void swiglu_backward(SwigluBackwardParams const& p, int64_t begin, int64_t end) {
  LT2_BY_DTYPE(swiglu_backward_rows)(p, begin, end);
}
void gated_norm(GatedNormParams const& p, int64_t begin, int64_t end) {
  LT2_BY_DTYPE(gated_norm_rows)(p, begin, end);
}
void gated_norm_backward(GatedNormBackwardParams const& p, int64_t begin, int64_t end, float* partial) {
  LT2_BY_DTYPE(gated_norm_backward_rows)(p, begin, end, partial);
}
void rope_cache(RopeCacheParams const& p, int64_t token, int begin_head, int end_head) {
  LT2_BY_DTYPE(rope_cache_heads)(p, token, begin_head, end_head);
}
void linear_step_rows(LinearStepParams const& p, float* x) { LT2_BY_DTYPE(linear_step_rows)(p, x); }
void linear_step(LinearStepParams const& p, float const* x, int part, int begin, int end) {
  LT2_BY_DTYPE(linear_step_outputs)(p, x, part, begin, end);
}

#undef LT2_BY_DTYPE

}  // namespace

extern Kernels const kKernels;
Kernels const kKernels = {&swiglu,     &swiglu_backward,  &gated_norm, &gated_norm_backward,
                          &rope_cache, &linear_step_rows, &linear_step};

}  // namespace lt2::block_ops::LT2_ISA
