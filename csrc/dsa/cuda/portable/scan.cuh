// Sums over the threads of a block.
#pragma once

#include <cstdint>

namespace lt2::dsa::portable {

// Exclusive sum over the threads before this one, and over all.
template <int kThreads>
__device__ inline uint32_t block_scan(uint32_t x, uint32_t* warps, uint32_t* total) {
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    uint32_t const y = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += y;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  uint32_t before = 0;
  *total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    *total += warps[w];
  }
  return before + sum - x;
}

}  // namespace lt2::dsa::portable
