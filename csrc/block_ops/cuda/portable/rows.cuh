// What the row-wise kernels share: strided rows, the derivative of silu.
#pragma once

#include "block_ops/block_ops.h"
#include "common/cuda/row_groups.cuh"

namespace lt2::block_ops::portable {

using namespace ::lt2::cuda;

template <class T>
__device__ T const* row_of(Rows const& x, int64_t row) {
  int64_t const offset = row < x.inner ? row * x.stride : row / x.inner * x.outer + row % x.inner * x.stride;
  return static_cast<T const*>(x.data) + offset;
}
template <class T>
__device__ T* row_of(void* data, int64_t row, int64_t width) {
  return static_cast<T*>(data) + row * width;
}

__device__ __forceinline__ float fast_sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// Every row begins at a multiple of 16 bytes.
inline bool aligned(Dtype dtype, Rows const& x) {
  int64_t const elements = dtype == Dtype::kFloat32 ? 4 : 8;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % elements == 0 && x.outer % elements == 0;
}
inline bool aligned(void const* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

}  // namespace lt2::block_ops::portable
