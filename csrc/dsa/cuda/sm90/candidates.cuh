// The best scores of one query so far, kept by one warp that meets its keys in order.
#pragma once

#include <cuda_runtime.h>

#include "dsa/cuda/portable/order.cuh"

namespace lt2::dsa::sm90::indexer {

inline constexpr unsigned kAll = 0xffffffffu;
inline constexpr int kBins = 256;  // and one that counts what belongs to none: no branch around a count

struct alignas(8) Candidate {
  float score;
  int index;
};

__device__ __forceinline__ void store_if(bool condition, Candidate* to, Candidate x) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %0, 0;\n"
      "@wanted st.v2.b32 [%1], {%2, %3};\n"
      "}\n" ::"r"(int{condition}),
      "l"(to), "f"(x.score), "r"(x.index)
      : "memory");
}

__device__ __forceinline__ void increment(uint32_t counter) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(counter) : "memory");
}

// portable::order() of numbers other than -0 and NaN; kNothing gives 0, which no number does.
inline constexpr uint32_t kNothing = 0xffffffffu;
__device__ __forceinline__ uint32_t order(uint32_t bits) {
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// f(order) for the scores of all candidates, several loads under way at once; some f(0) after the last.
template <class F>
__device__ __forceinline__ void for_each(Candidate const* list, int count, F const& f) {
  constexpr int kBatch = 16;
  for (int base = threadIdx.x % 32; base < count; base += 32 * kBatch) {
    uint32_t bits[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      bits[i] = base + 32 * i < count ? __float_as_uint(list[base + 32 * i].score) : kNothing;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) f(order(bits[i]));
  }
}

// Ascending by index, none NaN; the k best of all scores met are among them.
struct Candidates {
  Candidate* list;  // in shared or global memory
  int count;
  float least;  // only scores from here on are wanted: k candidates are better than all below

  // Four scores per lane, not -0, of keys index .. index + 3, in the order of lanes. Without a branch, so
  // that several queries overlap.
  __device__ void append(float4 x, int index) {
    float const scores[4] = {x.x, x.y, x.z, x.w};
    bool wanted[4];
    int mine = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wanted[i] = scores[i] >= least;  // NaN is not
      mine += wanted[i];
    }
    unsigned below;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
    unsigned const ones = __ballot_sync(kAll, mine & 1), twos = __ballot_sync(kAll, mine & 2),
                   fours = __ballot_sync(kAll, mine & 4);
    Candidate* to =
        list + (count + __popc(ones & below) + 2 * __popc(twos & below) + 4 * __popc(fours & below));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_if(wanted[i], to, {scores[i], index + i});
      to += wanted[i];
    }
    count += __popc(ones) + 2 * __popc(twos) + 4 * __popc(fours);
  }
};

// The best candidates: all with an order from `low` on, or of those that equal it only the first `equals`.
struct Bound {
  uint32_t low;
  bool all;
  int equals;
};

// Of at least the k best of `count` candidates and at most `most`, k <= most < count. bins: kBins of the
// warp's own.
__device__ inline Bound find_bound(Candidate const* list, int count, int k, int most, uint32_t* bins) {
  int const lane = threadIdx.x % 32;
  __syncwarp();
  uint32_t low = UINT32_MAX, high = 0;  // the k-th best is in [low, high]
  for_each(list, count, [&](uint32_t key) {
    low = min(low, key == 0 ? UINT32_MAX : key);
    high = max(high, key);
  });
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
  auto const counters = static_cast<uint32_t>(__cvta_generic_to_shared(bins));
  int above = 0;     // candidates above high
  int kept = count;  // candidates from low on
  int equals;        // of those that are `low`, how many are kept
  for (;;) {
    int const shift = max(0, 24 - __clz(high - low));
    for (int i = lane; i < kBins; i += 32) bins[i] = 0;
    __syncwarp();
    for_each(list, count, [&](uint32_t key) {
      increment(counters + (key - low <= high - low ? (key - low) >> shift : kBins) * 4);
    });
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
  return {low, kept <= most, equals};
}

// Keeps the best `most` candidates at most, but all of the k best; of equals the first ones.
__device__ inline void cut(Candidates& c, int k, int most, uint32_t* bins) {
  Candidate* const list = c.list;
  int const count = c.count, lane = threadIdx.x % 32;
  auto [low, all, equals] = find_bound(list, count, k, most, bins);
  int written = 0;
  unsigned below;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
  constexpr int kBatch = 4;
  for (int base = lane; base - lane < count; base += 32 * kBatch) {
    Candidate x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      x[i] = base + 32 * i < count ? list[base + 32 * i] : Candidate{__uint_as_float(kNothing), 0};
    }
    __syncwarp();  // all have read what is overwritten now
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      uint32_t const key = order(__float_as_uint(x[i].score));
      bool chosen = key >= low;
      if (!all) {
        unsigned const equal = __ballot_sync(kAll, key == low);
        chosen = key > low || (key == low && __popc(equal & below) < equals);
        equals -= min(equals, __popc(equal));
      }
      unsigned const chosens = __ballot_sync(kAll, chosen);
      store_if(chosen, list + (written + __popc(chosens & below)), x[i]);
      written += __popc(chosens);
    }
  }
  __syncwarp();
  c.count = written;
  c.least = portable::score_of(low + 1);  // of later ones, equals are not wanted
}

}  // namespace lt2::dsa::sm90::indexer
