// Elements of an operand that comes in several types; all arithmetic is fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace lt2::cuda {

template <Dtype>
struct ElementOf;
template <>
struct ElementOf<Dtype::kFloat32> {
  using Type = float;
};
template <>
struct ElementOf<Dtype::kBFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct ElementOf<Dtype::kFloat16> {
  using Type = __half;
};
template <Dtype kDtype>
using Element = typename ElementOf<kDtype>::Type;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// For the odd scalar whose type is not worth a template. Loading and converting are two functions, so that a
// kernel can have several loads under way.
__device__ inline uint32_t load_bits(Dtype dtype, void const* data, int64_t i) {
  return dtype == Dtype::kFloat32 ? static_cast<uint32_t const*>(data)[i]
                                  : static_cast<uint16_t const*>(data)[i];
}
__device__ inline float bits_to_float(Dtype dtype, uint32_t bits) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return __uint_as_float(bits << 16);
    case Dtype::kFloat16:
      return to_float(__ushort_as_half(static_cast<unsigned short>(bits)));
    default:
      return __uint_as_float(bits);
  }
}
__device__ inline float load_element(Dtype dtype, void const* data, int64_t i) {
  return bits_to_float(dtype, load_bits(dtype, data, i));
}

__device__ inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
// log(1 + e^x), linear above 20 as in torch.
__device__ inline float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
__device__ inline float softplus_derivative(float x) { return x > 20.f ? 1.f : sigmoid(x); }

}  // namespace lt2::cuda
