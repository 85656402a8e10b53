// The topk best of each row of scores, exactly: a radix search of the topk-th best, then one pass that writes
// the indices in order.
#pragma once

#include "common/cuda/cluster.cuh"
#include "common/cuda/overlap.cuh"
#include "dsa/cuda/portable/order.cuh"
#include "dsa/cuda/portable/scan.cuh"
#include "dsa/cuda/portable/score_rows.h"
#include "dsa/cuda/portable/sequences.cuh"

namespace lt2::dsa::portable {

using namespace cuda;

inline constexpr int kSelectThreads = 512, kBins = 2048, kBinsPerThread = kBins / kSelectThreads;
inline constexpr int kVectors = 4;  // of 4 scores that a thread has under way
inline constexpr int kThreadScores = 4 * kVectors;
inline constexpr int kMostBlocks = 8;  // that share a row

struct SelectShared {
  uint32_t bins[3][kBins];
  uint32_t warps[kSelectThreads / 32];
  uint32_t bin, above, better, equal;
};

// Orders of scores [at + i * stride, + 4), i < kVectors, of a row; 0 from `end` on.
__device__ inline void load_orders(float const* row, int64_t at, int64_t stride, int64_t end,
                                   uint32_t (&keys)[kThreadScores]) {
  float4 x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int64_t const from = at + i * stride;
    if (from + 4 <= end) {
      x[i] = *reinterpret_cast<float4 const*>(row + from);
    } else {
      x[i] = {from < end ? row[from] : NAN, from + 1 < end ? row[from + 1] : NAN,
              from + 2 < end ? row[from + 2] : NAN, NAN};
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    keys[4 * i] = order(x[i].x);
    keys[4 * i + 1] = order(x[i].y);
    keys[4 * i + 2] = order(x[i].z);
    keys[4 * i + 3] = order(x[i].w);
  }
}

// f(order) for scores [begin, end) of a row; some f(0) as well.
template <class F>
__device__ void for_each_order(float const* row, int64_t begin, int64_t end, F const& f) {
  for (int64_t at = begin; at < end; at += kSelectThreads * kThreadScores) {
    uint32_t keys[kThreadScores];
    load_orders(row, at + 4 * threadIdx.x, 4 * kSelectThreads, end, keys);
#pragma unroll
    for (int i = 0; i < kThreadScores; ++i) f(keys[i]);
  }
}

// A cluster of `blocks` blocks per row, each with a slice of it.
__global__ void __launch_bounds__(kSelectThreads) select_row(IndexerParams p, ScoreRows rows, int blocks) {
  __shared__ __align__(16) SelectShared shared;
  wait_for_previous_kernel();
  int const thread = threadIdx.x, rank = cluster_rank();
  int64_t const number = blockIdx.x / blocks;
  int64_t const tile = rows.first_tile + number / rows.tile_rows, batch = tile / rows.row_tiles;
  int64_t const query = tile % rows.row_tiles * rows.tile_rows + number % rows.tile_rows;
  if (query >= p.tokens) return;
  float const* const row = rows.scores + number * rows.stride;
  int64_t const count = sight(p, batch, query).count, slice = ceil_div(count, 4 * blocks) * 4;
  int64_t const begin = min(rank * slice, count), end = min(begin + slice, count);

  // The topk-th best has the leading bits `prefix` of the digits so far; `wanted` of those with them are
  // among the best.
  uint32_t prefix = 0, wanted = static_cast<uint32_t>(min(p.topk, count));
  bool all = wanted == count;
  for (int i = thread; i < 3 * kBins; i += kSelectThreads) shared.bins[0][i] = 0;
  __syncthreads();
  for (int digit = 0; digit < 3 && !all; ++digit) {
    int const shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, size = digit == 2 ? 10 : 11;
    uint32_t* const bins = shared.bins[digit];
    for_each_order(row, begin, end, [&](uint32_t key) {
      bool const candidate = key != 0 && (digit == 0 || key >> (shift + size) == prefix);
      if (candidate) atomicAdd(&bins[key >> shift & ((1u << size) - 1)], 1u);
    });
    cluster_sync();
    uint32_t local[kBinsPerThread] = {}, sum = 0, total;  // bins from the best on
    int const best = kBins - 1 - thread * kBinsPerThread;
    for (int r = 0; r < blocks; ++r) {
      uint4 const x = *of_rank(reinterpret_cast<uint4*>(&bins[best + 1 - kBinsPerThread]), r);
      local[0] += x.w;
      local[1] += x.z;
      local[2] += x.y;
      local[3] += x.x;
    }
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) sum += local[i];
    uint32_t above = block_scan<kSelectThreads>(sum, shared.warps, &total);
    if (total < wanted) {  // some were NaN
      all = true;
      break;
    }
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (above < wanted && above + local[i] >= wanted) {
        shared.bin = best - i;
        shared.above = above;
      }
      above += local[i];
    }
    __syncthreads();
    wanted -= shared.above;
    prefix = prefix << size | shared.bin;
  }
  if (all) {
    prefix = 0;
    wanted = 0;
  }

  // What the blocks before this one select, and all of them.
  uint32_t better = 0, equal = 0, total_better, total_equal;
  for_each_order(row, begin, end, [&](uint32_t key) {
    better += key > prefix;
    equal += key == prefix;
  });
  block_scan<kSelectThreads>(better, shared.warps, &total_better);
  block_scan<kSelectThreads>(equal, shared.warps, &total_equal);
  if (thread == 0) {
    shared.better = total_better;
    shared.equal = total_equal;
  }
  cluster_sync();
  int64_t before_better = 0, all_better = 0;
  uint32_t equals = 0, all_equal = 0;  // equals: met so far
  for (int r = 0; r < blocks; ++r) {
    uint32_t const b = *of_rank(&shared.better, r), e = *of_rank(&shared.equal, r);
    if (r < rank) {
      before_better += b;
      equals += e;
    }
    all_better += b;
    all_equal += e;
  }
  cluster_arrive();

  int32_t* const out = p.indices + (batch * p.tokens + query) * p.topk;
  int64_t written = before_better + min(equals, wanted);
  for (int64_t base = begin; base < end; base += kSelectThreads * kThreadScores) {
    int64_t const at = base + thread * kThreadScores;
    uint32_t keys[kThreadScores], mine = 0, total;  // equal << 16 | better
    load_orders(row, at, 4, end, keys);
#pragma unroll
    for (int i = 0; i < kThreadScores; ++i) {
      if (at + i < end) mine += (keys[i] > prefix) + (keys[i] == prefix ? 1u << 16 : 0);
    }
    uint32_t const before = block_scan<kSelectThreads>(mine, shared.warps, &total),
                   left = wanted - min(equals, wanted);
    uint32_t rank_equal = equals + (before >> 16);
    int64_t position = written + (before & 0xffff) + min(before >> 16, left);
#pragma unroll
    for (int i = 0; i < kThreadScores; ++i) {
      bool const chosen = keys[i] > prefix || (keys[i] == prefix && rank_equal < wanted);
      rank_equal += keys[i] == prefix;
      if (chosen) out[position++] = static_cast<int32_t>(at + i);
    }
    written += (total & 0xffff) + min(total >> 16, left);
    equals += total >> 16;
  }
  int64_t const chosen = all_better + min(all_equal, wanted);
  for (int64_t i = chosen + rank * kSelectThreads + thread; i < p.topk; i += kSelectThreads * blocks)
    out[i] = -1;
  cluster_wait();
}

}  // namespace lt2::dsa::portable
