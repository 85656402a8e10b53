// The inverse of I + A for the strictly lower A of a chunk of 32 tokens, by one warp, nearly in fp32; and
// decays as powers of 2.
#pragma once

#include "common/cuda/mma.cuh"

namespace lt2::gdn::portable {

using namespace cuda;

// e^(-150 ln 2) is below the smallest float, so a smaller decay of one token changes nothing, and a reset
// (-inf) stays exact while sums of such decays stay finite.
inline constexpr float kLeastLog2Decay = -150.f;
inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline constexpr int kInverseRow = 36;  // floats; 4 more than 32, against bank conflicts

// z [16 x 8 kN] = a [16 x 16 kK] b [16 kK x 8 kN], nearly in fp32: matrices in memory, rows of kInverseRow
// floats.
template <int kN, int kK>
__device__ __forceinline__ void multiply_split(float (&z)[kN][4], uint32_t const (&a_high)[kK][4],
                                               uint32_t const (&a_low)[kK][4], float const* b, int lane) {
  int const g = lane / 4, t = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) z[n][i] = 0.f;
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      float const* const column = b + (16 * k + t) * kInverseRow + 8 * n + g;
      Split const first = split(column[0], column[kInverseRow]);
      Split const second = split(column[8 * kInverseRow], column[9 * kInverseRow]);
      mma<__nv_bfloat16>(z[n], a_low[k], first.high, second.high);
      mma<__nv_bfloat16>(z[n], a_high[k], first.low, second.low);
      mma<__nv_bfloat16>(z[n], a_high[k], first.high, second.high);
    }
  }
}

// The first factor of multiply_split, from memory and from the fragments of another product.
template <int kK>
__device__ __forceinline__ void load_split(uint32_t (&high)[kK][4], uint32_t (&low)[kK][4], float const* a,
                                           int lane) {
  float const* const first = a + lane / 4 * kInverseRow + 2 * (lane % 4);
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 const x = *reinterpret_cast<float2 const*>(first + i % 2 * 8 * kInverseRow + 16 * k + i / 2 * 8);
      Split const s = split(x.x, x.y);
      high[k][i] = s.high;
      low[k][i] = s.low;
    }
  }
}
template <int kK>
__device__ __forceinline__ void split_fragments(uint32_t (&high)[kK][4], uint32_t (&low)[kK][4],
                                                float const (&z)[2 * kK][4]) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Split const s = split(z[2 * k + i / 2][i % 2 * 2], z[2 * k + i / 2][i % 2 * 2 + 1]);
      high[k][i] = s.high;
      low[k][i] = s.low;
    }
  }
}

// In place, 32 x 32 at `m`, by one warp: A (strictly lower, rows of kInverseRow floats) -> the lower triangle
// of (I + A)^-1. The two diagonal blocks of 16 by substitution in fp32, one column a lane; below them -(X2
// A21) X1.
__device__ inline void invert_32(float* m, int lane) {
  float* const block = m + lane / 16 * (16 * kInverseRow + 16);
  int const column = lane % 16;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float sum[2] = {i == column ? 1.f : 0.f, 0.f};
#pragma unroll
    for (int k = 0; k < i; k += 4) {
      float4 const a = *reinterpret_cast<float4 const*>(block + i * kInverseRow + k);
      sum[0] -= a.x * x[k];
      if (k + 1 < i) sum[1] -= a.y * x[k + 1];
      if (k + 2 < i) sum[0] -= a.z * x[k + 2];
      if (k + 3 < i) sum[1] -= a.w * x[k + 3];
    }
    x[i] = sum[0] + sum[1];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; ++i) block[i * kInverseRow + column] = x[i];
  __syncwarp();

  float* const below = m + 16 * kInverseRow;
  uint32_t high[1][4], low[1][4];
  float z[2][4], y[2][4];
  load_split(high, low, below + 16, lane);
  multiply_split<2, 1>(z, high, low, below, lane);
  split_fragments(high, low, z);
  multiply_split<2, 1>(y, high, low, m, lane);
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(below + (lane / 4 + 8 * half) * kInverseRow + 8 * n + 2 * (lane % 4)) =
          float2{-y[n][2 * half], -y[n][2 * half + 1]};
    }
  }
}

// E_ij r b_j of the lower triangle, columns col and col + 1 of row `row` of a chunk, as a pair of pairs that
// add up.
template <class T>
__device__ __forceinline__ Split inverse_pair(float const* log2_decay, float const* strength, int row,
                                              int col, float x, float y) {
  float const decay = log2_decay[row];
  float2 const g = *reinterpret_cast<float2 const*>(log2_decay + col);
  float2 const b = *reinterpret_cast<float2 const*>(strength + col);
  x = col <= row ? exp2_fast(decay - g.x) * x * b.x : 0.f;
  y = col + 1 <= row ? exp2_fast(decay - g.y) * y * b.y : 0.f;
  uint32_t const high = pack<T>(x, y);
  float2 const h = unpack<T>(high);
  return {high, pack<T>(x - h.x, y - h.y)};
}

}  // namespace lt2::gdn::portable
