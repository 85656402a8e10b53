// Some channels of a row in a register.
#pragma once

#include "common/cuda/element.cuh"

namespace lt2::cuda {

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using Type = uint16_t;
};
template <>
struct BitsOf<4> {
  using Type = uint32_t;
};
template <>
struct BitsOf<8> {
  using Type = uint2;
};
template <>
struct BitsOf<16> {
  using Type = uint4;
};

// kVec adjacent channels of one row, moved at once.
template <class T, int kVec>
struct RowOf {
  using Bits = typename BitsOf<sizeof(T) * kVec>::Type;
  Bits bits;

  __device__ static RowOf load(T const* p) { return {*reinterpret_cast<Bits const*>(p)}; }
  __device__ static RowOf zero() { return {Bits{}}; }
  __device__ void store(T* p) const { *reinterpret_cast<Bits*>(p) = bits; }
  __device__ T& operator[](int c) { return reinterpret_cast<T*>(&bits)[c]; }
  __device__ T operator[](int c) const { return reinterpret_cast<T const*>(&bits)[c]; }
  __device__ float at(int c) const { return to_float((*this)[c]); }
};

}  // namespace lt2::cuda
