// The function table of one instruction set; loop_state_<isa>.cpp compiles it.
#pragma once

#include "loop_state/cpu/decode.h"
#include "loop_state/cpu/residual.h"

namespace lt2::loop_state::LT2_ISA {
namespace {

#define LT2_BY_DTYPE(f) (p.dtype == Dtype::kBFloat16 ? f<Bf16> : f<float>)

void residual(ResidualParams const& p, int64_t begin, int64_t end) {
  LT2_BY_DTYPE(residual_rows)(p, begin, end);
}
void residual_backward(ResidualBackwardParams const& p, int64_t begin, int64_t end, float* partial) {
  LT2_BY_DTYPE(residual_backward_rows)(p, begin, end, partial);
}
void residual_norm(ResidualNormParams const& p, int64_t begin, int64_t end) {
  LT2_BY_DTYPE(residual_norm_rows)(p, begin, end);
}
void residual_norm_backward(ResidualNormBackwardParams const& p, int64_t begin, int64_t end, float* partial) {
  LT2_BY_DTYPE(residual_norm_backward_rows)(p, begin, end, partial);
}
void decode(DecodeParams const& p, int64_t unit, int head, int64_t split, float* workspace, float* partial) {
  LT2_BY_DTYPE(decode_item)(p, unit, head, split, workspace, partial);
}
void merge(DecodeParams const& p, int64_t unit, int head, float const* partials, int64_t partial_stride,
           int64_t splits) {
  LT2_BY_DTYPE(merge_item)(p, unit, head, partials, partial_stride, splits);
}

#undef LT2_BY_DTYPE

}  // namespace

extern Kernels const kKernels;
Kernels const kKernels = {&residual,         &residual_backward, &residual_norm, &residual_norm_backward,
                          &decode_workspace, &decode_partial,    &decode,        &merge};

}  // namespace lt2::loop_state::LT2_ISA
