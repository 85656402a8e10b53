// A softmax of scores that come a few at a time.
#pragma once

#include <cmath>

namespace lt2::cuda {

// The highest score as what exponents are relative to: 0 where there is none yet.
__device__ __forceinline__ float finite_or_zero(float x) { return x == -INFINITY ? 0.f : x; }

}  // namespace lt2::cuda
