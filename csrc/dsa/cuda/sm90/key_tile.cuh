// Attention of up to 16 heads of a query to 16 gathered keys at a time, by one warp.
#pragma once

#include "common/cuda/sm90/tma.cuh"
#include "common/cuda/softmax.cuh"
#include "dsa/cuda/portable/gather.cuh"

namespace lt2::dsa::sm90 {

using namespace cuda;
using namespace cuda::sm90;

// Rows of K and V of the keys that lanes 0 to 15 have (negative: zeros) on their way into rows[0] and
// rows[1]: by the copy engine, a lane a row, which `full` waits for, or by all lanes together. Returns which
// keys there are.
template <bool kEngine, class Tile, class T>
__device__ __forceinline__ unsigned load_key_tile(char (&rows)[2][Tile::kBytes], Barrier& full, T const* k,
                                                  int64_t k_stride, T const* v, int64_t v_stride, int key,
                                                  int lane) {
  unsigned const present = __ballot_sync(0xffffffffu, key >= 0);
  if constexpr (kEngine) {
    if (lane == 0) full.arrive_expecting(__popc(present) * 4 * Tile::kDim);
    int const r = lane % Tile::kRows, which = lane / Tile::kRows;
    int64_t const number = __shfl_sync(0xffffffffu, key, r);
    char* const to = rows[which] + Tile::offset(r, 0);
    __syncwarp();
    if (number >= 0) {
      load_bytes(to, which == 0 ? k + number * k_stride : v + number * v_stride, 2 * Tile::kDim, full);
    } else {
      for (int c = 0; c < Tile::kDim / 8; ++c) *reinterpret_cast<uint4*>(to + 16 * c) = uint4{};
      fence_async_shared();
    }
  } else {
#pragma unroll 1
    for (int which = 0; which < 2; ++which)
      Tile::copy(rows[which], which == 0 ? k : v, which == 0 ? k_stride : v_stride, key, lane);
    portable::commit_copies();
  }
  return present;
}

// Softmax of what was met so far: of lane l rows (heads) l / 4 and l / 4 + 8, whose outputs are o[c][0, 1]
// and o[c][2, 3], columns 8 c + 2 (l % 4) and the next.
template <class T, class Tile>
struct RunningSoftmax {
  float o[Tile::kDim / 8][4] = {}, top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};  // of this lane's keys, until close()

  // scale: of the scores, times log2(e).
  __device__ __forceinline__ void add(uint32_t const (&q)[Tile::kDim / 16][4],
                                      char const (&rows)[2][Tile::kBytes], unsigned present, float scale,
                                      int lane) {
    float s[2][4] = {};
    Tile::template multiply<T>(s, q, rows[0], lane);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!(present >> (8 * n + 2 * (lane % 4) + e % 2) & 1)) s[n][e] = -INFINITY;
      }
    }
    float decay[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest =
          fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      highest = fmaxf(highest, top[half]);
      float const base = finite_or_zero(highest) * scale;
      decay[half] = exp2f(top[half] * scale - base);
      top[half] = highest;
      sum[half] *= decay[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * half + e];
          x = exp2f(x * scale - base);
          sum[half] += x;
        }
      }
    }
    uint32_t a[4];
    portable::pack_fragments<T>(a, s);
    Tile::template accumulate<T>(o, a, rows[1], lane, [&](float (&x)[4]) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] *= decay[e / 2];
    });
  }

  // The sum of row `half` over all keys, in all its lanes.
  __device__ __forceinline__ void close(int half) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
  }
};

}  // namespace lt2::dsa::sm90
