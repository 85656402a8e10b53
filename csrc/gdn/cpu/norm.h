// The gated RMSNorm that ends the fused step: o <- rmsnorm(x) weight silu(z), per token and value head.
#pragma once

#include "gdn/cpu/step.h"

namespace lt2::gdn::LT2_ISA {
namespace {

template <class T>
void gated_norm_item(FusedStepParams const& p, Strided const& x, int64_t row, int head) {
  int64_t const slot = p.step.slot_ids == nullptr ? row : p.step.slot_ids[row];
  bool const live = slot >= 0 && slot < p.step.slots;
  int const n = p.step.value_dim;
  for (int t = 0; t < p.step.tokens; ++t) {
    float const* const values = token_row<float const>(x, row, t, head);
    T const* const gates = token_row<T const>(p.z, row, t, head);
    T* const o = token_row<T>(p.step.o, row, t, head);
    float const norm = 1.f / __builtin_sqrtf(dot(values, values, n) / n + p.eps);
    for (int c = 0; c < n; ++c) {
      float const z = to_float(gates[c]);
      store_one(o + c, live ? values[c] * norm * p.norm_weight[c] * z * sigmoid(z) : 0.f);
    }
  }
}

void gated_norm(FusedStepParams const& p, Strided const& x, int64_t row, int head) {
  (p.step.dtype == Dtype::kBFloat16 ? gated_norm_item<Bf16> : gated_norm_item<float>)(p, x, row, head);
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
