// Scores as unsigned numbers of the same order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lt2::dsa::portable {

// -0 equals 0, NaN is 0 and nothing else is.
__device__ inline uint32_t order(float score) {
  uint32_t const bits = __float_as_uint(score + 0.f);
  return score == score ? bits ^ (static_cast<int32_t>(bits) < 0 ? 0xffffffffu : 0x80000000u) : 0u;
}
__device__ inline float score_of(uint32_t order) {
  return __uint_as_float(order ^ (static_cast<int32_t>(order) < 0 ? 0x80000000u : 0xffffffffu));
}

}  // namespace lt2::dsa::portable
