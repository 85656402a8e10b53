// The topk best of each row of scores, exactly: a radix search of the topk-th best, then one pass that writes
// the indices in order.
#pragma once

#include "dsa/cuda/portable/order.cuh"
#include "dsa/cuda/portable/score_rows.h"
#include "dsa/cuda/portable/sequences.cuh"

namespace lt2::dsa::portable {

inline constexpr int kSelectThreads = 512, kBins = 2048, kBinsPerThread = kBins / kSelectThreads;
inline constexpr int kVector = 4;  // scores that a thread takes at a time

struct SelectShared {
  uint32_t bins[kBins];
  uint32_t warps[kSelectThreads / 32];
  uint32_t bin, above;
};

// Exclusive sum over the threads before this one, and over all.
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
  for (int w = 0; w < kSelectThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    *total += warps[w];
  }
  return before + sum - x;
}

// Scores [at, at + kVector) of a row of `count`; NaN after the last.
__device__ inline float4 load_scores(float const* row, int64_t at, int count) {
  if (at + kVector <= count) return *reinterpret_cast<float4 const*>(row + at);
  float x[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = at + i < count ? row[at + i] : NAN;
  return {x[0], x[1], x[2], x[3]};
}

// One block per row.
__global__ void __launch_bounds__(kSelectThreads) select_row(IndexerParams p, ScoreRows rows) {
  __shared__ SelectShared shared;
  int const thread = threadIdx.x;
  int64_t const tile = rows.first_tile + blockIdx.x / rows.tile_rows, batch = tile / rows.row_tiles;
  int64_t const query = tile % rows.row_tiles * rows.tile_rows + blockIdx.x % rows.tile_rows;
  if (query >= p.tokens) return;
  float const* const row = rows.scores + blockIdx.x * rows.stride;
  int const count = sight(p, batch, query).count;

  // The topk-th best has the leading bits `prefix` of the digits so far; `wanted` of those with them are
  // among the best.
  uint32_t prefix = 0, wanted = static_cast<uint32_t>(min(p.topk, int64_t{count}));
  bool all = wanted == static_cast<uint32_t>(count);
  for (int shift = 21; shift >= 0 && !all; shift = shift == 21 ? 10 : shift == 10 ? 0 : -1) {
    int const digit_bits = shift == 0 ? 10 : 11, known = shift + digit_bits;
    for (int i = thread; i < kBins; i += kSelectThreads) shared.bins[i] = 0;
    __syncthreads();
    for (int64_t at = int64_t{thread} * kVector; at < count; at += kSelectThreads * kVector) {
      float4 const x = load_scores(row, at, count);
      float const values[kVector] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        uint32_t const key = order(values[i]);
        bool const candidate = key != 0 && (known == 32 || key >> known == prefix);
        if (candidate) atomicAdd(&shared.bins[(key >> shift) & ((1u << digit_bits) - 1)], 1u);
      }
    }
    __syncthreads();
    uint32_t local[kBinsPerThread], sum = 0, total;  // bins from the best on
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      sum += local[i] = shared.bins[kBins - 1 - (thread * kBinsPerThread + i)];
    }
    uint32_t above = block_scan(sum, shared.warps, &total);
    if (total < wanted) {  // some were NaN
      all = true;
      break;
    }
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (above < wanted && above + local[i] >= wanted) {
        shared.bin = kBins - 1 - (thread * kBinsPerThread + i);
        shared.above = above;
      }
      above += local[i];
    }
    __syncthreads();
    wanted -= shared.above;
    prefix = prefix << digit_bits | shared.bin;
  }
  if (all) {
    prefix = 0;
    wanted = 0;
  }

  int32_t* const out = p.indices + (batch * p.tokens + query) * p.topk;
  int64_t written = 0;
  uint32_t equals = 0;  // met so far
  for (int64_t base = 0; base < count; base += kSelectThreads * kVector) {
    int64_t const at = base + thread * kVector;
    float4 const x = load_scores(row, at, count);
    uint32_t const keys[kVector] = {order(x.x), order(x.y), order(x.z), order(x.w)};
    uint32_t better = 0, equal = 0, total;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      better += keys[i] > prefix;
      equal += keys[i] == prefix;
    }
    uint32_t const before = block_scan(equal << 16 | better, shared.warps, &total);
    uint32_t rank = equals + (before >> 16);  // of the next equal
    int64_t position = written + (before & 0xffff) + min(before >> 16, wanted - min(equals, wanted));
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      bool const chosen = keys[i] > prefix || (keys[i] == prefix && rank < wanted);
      rank += keys[i] == prefix;
      if (chosen) out[position++] = static_cast<int32_t>(at + i);
    }
    written += (total & 0xffff) + min(total >> 16, wanted - min(equals, wanted));
    equals += total >> 16;
  }
  for (int64_t i = written + thread; i < p.topk; i += kSelectThreads) out[i] = -1;
}

}  // namespace lt2::dsa::portable
