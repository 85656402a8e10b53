// The best scores of one query so far, kept by one warp that meets its keys in order.
#pragma once

#include <cuda_runtime.h>

#include "dsa/cuda/portable/order.cuh"

namespace lt2::dsa::sm90::indexer {

inline constexpr unsigned kAll = 0xffffffffu;
inline constexpr int kBins = 256;

struct alignas(8) Candidate {
  float score;
  int index;
};

// Ascending by index, none NaN; the k best of all scores met are among them.
struct Candidates {
  Candidate* list;  // in shared or global memory
  int count;
  float threshold;  // k candidates are as good, so only better ones are wanted; NaN: no threshold yet

  // Two scores per lane, of keys index and index + 1, in the order of lanes.
  __device__ void append(float2 x, int index) {
    bool const first = x.x == x.x && !(x.x <= threshold), second = x.y == x.y && !(x.y <= threshold);
    unsigned const firsts = __ballot_sync(kAll, first), seconds = __ballot_sync(kAll, second);
    if ((firsts | seconds) == 0) return;
    unsigned below;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
    Candidate* const to = list + (count + __popc(firsts & below) + __popc(seconds & below));
    if (first) to[0] = {x.x, index};
    if (second) to[first] = {x.y, index + 1};
    count += __popc(firsts) + __popc(seconds);
  }
};

// Keeps the best `most` candidates at most, but all of the k best; of equals the first ones. k <= most <
// count. bins: kBins of the warp's own.
__device__ inline void cut(Candidates& c, int k, int most, uint32_t* bins) {
  using portable::order;
  Candidate* const list = c.list;
  int const count = c.count;
  int const lane = threadIdx.x % 32;
  __syncwarp();
  uint32_t low = UINT32_MAX, high = 0;  // the k-th best is in [low, high]
  for (int i = lane; i < count; i += 32) {
    uint32_t const key = order(list[i].score);
    low = min(low, key);
    high = max(high, key);
  }
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
  int above = 0;     // candidates above high
  int kept = count;  // candidates from low on
  int equals;        // of those that are `low`, how many are kept
  for (;;) {
    int const shift = max(0, 24 - __clz(high - low));
    for (int i = lane; i < kBins; i += 32) bins[i] = 0;
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < count; i += 32) {
      uint32_t const key = order(list[i].score);
      if (key >= low && key <= high) atomicAdd(&bins[(key - low) >> shift], 1u);
    }
    __syncwarp();
    // Lane l has bins kBins - 1 - 8 l and the 7 below.
    int local[kBins / 32], sum = 0;
#pragma unroll
    for (int i = 0; i < kBins / 32; ++i) sum += local[i] = bins[kBins - 1 - (kBins / 32 * lane + i)];
    int before = sum;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      int const x = __shfl_up_sync(kAll, before, distance);
      if (lane >= distance) before += x;
    }
    before += above - sum;
    int bin = -1, better = 0, size = 0;
#pragma unroll
    for (int i = 0; i < kBins / 32; ++i) {
      if (before < k && before + local[i] >= k) {
        bin = kBins - 1 - (kBins / 32 * lane + i);
        better = before;
        size = local[i];
      }
      before += local[i];
    }
    int const owner = __ffs(__ballot_sync(kAll, bin >= 0)) - 1;
    bin = __shfl_sync(kAll, bin, owner);
    above = __shfl_sync(kAll, better, owner);
    kept = above + __shfl_sync(kAll, size, owner);
    low += static_cast<uint32_t>(bin) << shift;
    high = low + min(high - low, (1u << shift) - 1);
    equals = kept <= most ? kept : k - above;
    if (kept <= most || shift == 0) break;
  }
  // Either all from low on are kept, or low is the k-th best itself.
  bool const all = kept <= most;
  int written = 0;
  unsigned below;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
  for (int base = 0; base < count; base += 32) {
    int const i = base + lane;
    Candidate const x = i < count ? list[i] : Candidate{NAN, 0};
    uint32_t const key = order(x.score);
    unsigned const equal = __ballot_sync(kAll, key == low);
    bool const chosen = key > low || (key == low && (all || __popc(equal & below) < equals));
    unsigned const chosens = __ballot_sync(kAll, chosen);
    equals -= min(equals, __popc(equal));
    if (chosen) list[written + __popc(chosens & below)] = x;
    written += __popc(chosens);
    __syncwarp();
  }
  c.count = written;
  c.threshold = portable::score_of(low);
}

}  // namespace lt2::dsa::sm90::indexer
