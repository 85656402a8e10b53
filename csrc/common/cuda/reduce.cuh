// Sums in a fixed order: the same bits on every run.
#pragma once

namespace lt2::cuda {

inline constexpr int kWarp = 32;

// Over groups of kLanes adjacent lanes; every lane gets the sum. All lanes of the warp must call.
template <int kLanes = kWarp>
__device__ float lane_sum(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Over a block of kThreads threads; every thread gets the sum. `scratch` holds kThreads / 32 floats.
template <int kThreads>
__device__ float block_sum(float x, float* scratch) {
  x = lane_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) total += scratch[w];
  return total;
}

}  // namespace lt2::cuda
