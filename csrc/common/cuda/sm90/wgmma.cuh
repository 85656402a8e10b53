// Matrix products of a warpgroup: D [64, N] fp32 in registers += A [64, 16 k] B [16 k, N], operands of 2
// bytes.
//
// Fragments: thread (warp w, lane l) holds of D element i at row 16 w + l / 4 + 8 (i / 2 % 2), column
// 8 (i / 4) + 2 (l % 4) + i % 2. Packed in pairs these are A's fragments of the next product, in the same
// order.
#pragma once

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "common/cuda/mma.cuh"
#include "common/cuda/sm90/tma.cuh"

namespace lt2::cuda::sm90 {

// Descriptors of operands in tiles (see tma.cuh), 64 elements of a row each, the next kStride bytes further.
// k_major: the summed axis lies along the rows of the tiles; its k-th 16 elements are k_step(k) further.
__device__ inline uint64_t k_major(void const* tile) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffff) >> 4) | (uint64_t{1} << 16) |
         (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}
template <int kStride = kTileBytes>
__device__ constexpr uint64_t k_step(int k) {
  return (k / 4) * (kStride >> 4) + (k % 4) * 2;
}
// The summed axis is the tile's rows; 16 of them are kRowStep. Either operand may lie this way.
template <int kStride = kTileBytes>
__device__ uint64_t row_major(void const* tile) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffff) >> 4) | (uint64_t{kStride >> 4} << 16) |
         (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}
inline constexpr uint64_t kRowStep = 2048 >> 4;

using cute::SM90::GMMA::Major;

template <class T, int kN, Major kMajorB>
struct Wgmma;
#define LT2_WGMMA(N, T, NAME)                                                           \
  template <Major kMajorB>                                                              \
  struct Wgmma<T, N, kMajorB> {                                                         \
    using Registers = cute::SM90::GMMA::MMA_64x##N##x16_##NAME##_RS<Major::K, kMajorB>; \
    template <Major kMajorA>                                                            \
    using Shared = cute::SM90::GMMA::MMA_64x##N##x16_##NAME##_SS<kMajorA, kMajorB>;     \
  };
LT2_WGMMA(8, __nv_bfloat16, F32BF16BF16)
LT2_WGMMA(16, __nv_bfloat16, F32BF16BF16)
LT2_WGMMA(32, __nv_bfloat16, F32BF16BF16)
LT2_WGMMA(64, __nv_bfloat16, F32BF16BF16)
LT2_WGMMA(96, __nv_bfloat16, F32BF16BF16)
LT2_WGMMA(128, __nv_bfloat16, F32BF16BF16)
LT2_WGMMA(192, __nv_bfloat16, F32BF16BF16)
LT2_WGMMA(8, __half, F32F16F16)
LT2_WGMMA(16, __half, F32F16F16)
LT2_WGMMA(32, __half, F32F16F16)
LT2_WGMMA(64, __half, F32F16F16)
LT2_WGMMA(96, __half, F32F16F16)
LT2_WGMMA(128, __half, F32F16F16)
LT2_WGMMA(192, __half, F32F16F16)
#undef LT2_WGMMA

template <class Atom, int... kI>
__device__ __forceinline__ void fma_registers(uint32_t const* a, uint64_t b, float* d,
                                              cute::SM90::GMMA::ScaleOut scale,
                                              std::integer_sequence<int, kI...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, d[kI]..., scale);
}
template <class Atom, int... kI>
__device__ __forceinline__ void fma_shared(uint64_t a, uint64_t b, float* d, cute::SM90::GMMA::ScaleOut scale,
                                           std::integer_sequence<int, kI...>) {
  Atom::fma(a, b, d[kI]..., scale);
}

// One step of 16 into d [kN / 2]: A in 4 registers, or in shared memory (k_major; row_major with kMajorA =
// MN).
template <class T, int kN, Major kMajorB = Major::K>
__device__ __forceinline__ void wgmma(float* d, uint32_t const* a, uint64_t b, bool accumulate) {
  fma_registers<typename Wgmma<T, kN, kMajorB>::Registers>(
      a, b, d, accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero,
      std::make_integer_sequence<int, kN / 2>{});
}
template <class T, int kN, Major kMajorB = Major::K, Major kMajorA = Major::K>
__device__ __forceinline__ void wgmma(float* d, uint64_t a, uint64_t b, bool accumulate) {
  fma_shared<typename Wgmma<T, kN, kMajorB>::template Shared<kMajorA>>(
      a, b, d, accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero,
      std::make_integer_sequence<int, kN / 2>{});
}

// Before the first product after registers that products use were touched.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// At most kPending committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses of the registers across.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// As load_matrices (mma.cuh).
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                                               uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t r0, uint32_t r1,
                                                          uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace lt2::cuda::sm90
