// Lists of a query's best scores so far, in no order, and what a warp does with one.
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
// `to`: in shared memory.
__device__ __forceinline__ void store_if(bool condition, uint32_t to, Candidate x) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %0, 0;\n"
      "@wanted st.shared.v2.b32 [%1], {%2, %3};\n"
      "}\n" ::"r"(int{condition}),
      "r"(to), "f"(x.score), "r"(x.index)
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

// Ranks of candidates, unsigned numbers: the better, the greater; 0: not one of them. -0 is loaded as 0.
struct ByScore {
  using Loaded = uint32_t;
  static constexpr int kBatch = 16;
  __device__ static Loaded nothing() { return kNothing; }
  __device__ static Loaded load(Candidate const& c) { return __float_as_uint(c.score + 0.f); }
  __device__ uint32_t operator()(Loaded bits) const { return order(bits); }
};
// Of those with one score the first are the best.
struct ByIndex {
  using Loaded = Candidate;
  static constexpr int kBatch = 4;
  uint32_t score;  // its order
  __device__ static Loaded nothing() { return {__uint_as_float(kNothing), 0}; }
  __device__ static Loaded load(Candidate const& c) { return {c.score + 0.f, c.index}; }
  __device__ uint32_t operator()(Loaded c) const {
    return order(__float_as_uint(c.score)) == score ? ~static_cast<uint32_t>(c.index) : 0;
  }
};

struct Index {
  using Loaded = int;
  static constexpr int kBatch = 8;
  __device__ static Loaded nothing() { return -1; }
  __device__ static Loaded load(Candidate const& c) { return c.index; }
  __device__ uint32_t operator()(Loaded index) const { return index; }
};

// f(rank) for all candidates, several loads under way at once; some f of nothing after the last.
template <class Rank, class F>
__device__ __forceinline__ void for_each(Candidate const* list, int count, Rank const& rank, F const& f) {
  constexpr int kBatch = Rank::kBatch;
  for (int base = threadIdx.x % 32; base < count; base += 32 * kBatch) {
    typename Rank::Loaded x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      x[i] = base + 32 * i < count ? Rank::load(list[base + 32 * i]) : Rank::nothing();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) f(rank(x[i]));
  }
}

// The sum over lanes up to this one.
__device__ __forceinline__ int sum_up_to(int x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    int const y = __shfl_up_sync(kAll, x, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) x += y;
  }
  return x;
}

// The best candidates: all with a rank from `low` on, or of those that equal it only `equals`.
struct Bound {
  uint32_t low;
  bool all;
  int equals;
};

// Of at least the k best of `count` candidates and at most `most`, k <= most < count. bins: kBins of the
// warp's own.
template <class Rank = ByScore>
__device__ inline Bound find_bound(Candidate const* list, int count, int k, int most, uint32_t* bins,
                                   Rank const& rank = {}) {
  int const lane = threadIdx.x % 32;
  __syncwarp();
  uint32_t low = UINT32_MAX, high = 0;  // the k-th best is in [low, high]
  for_each(list, count, rank, [&](uint32_t key) {
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
    for_each(list, count, rank, [&](uint32_t key) {
      increment(counters + (key - low <= high - low ? (key - low) >> shift : kBins) * 4);
    });
    __syncwarp();
    // Lane l has bins kBins - 1 - 8 l and the 7 below.
    int local[kBins / 32], sum = 0;
#pragma unroll
    for (int i = 0; i < kBins / 32; ++i) sum += local[i] = bins[kBins - 1 - (kBins / 32 * lane + i)];
    int before = sum_up_to(sum) + above - sum;
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

// Keeps the candidates within a bound of find_bound's, of equals those of the lowest indices: how many.
__device__ inline int keep(Candidate* list, int count, Bound const& bound, uint32_t* bins) {
  int const lane = threadIdx.x % 32;
  ByIndex const by_index{bound.low};
  uint32_t const first =
      bound.all ? 1 : find_bound(list, count, bound.equals, bound.equals, bins, by_index).low;
  int written = 0;
  unsigned below;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
  constexpr int kBatch = 8;
  for (int base = lane; base - lane < count; base += 32 * kBatch) {
    Candidate x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      x[i] = base + 32 * i < count ? ByIndex::load(list[base + 32 * i]) : ByIndex::nothing();
    }
    __syncwarp();  // all have read what is overwritten now
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      bool const chosen = order(__float_as_uint(x[i].score)) > bound.low || by_index(x[i]) >= first;
      unsigned const chosens = __ballot_sync(kAll, chosen);
      if (chosen) list[written + __popc(chosens & below)] = x[i];
      written += __popc(chosens);
    }
  }
  __syncwarp();
  return written;
}

// The indices of candidates, those of keys begin .. end - 1, ascending, counted from begin. For 64 keys there
// are a word of bits and, in bins, how many candidates come before them: 2048 per_lane keys at a time,
// per_lane <= 16.
__device__ inline void sort_indices(Candidate const* list, int count, int begin, int end, uint64_t* words,
                                    int per_lane, uint32_t* bins, int* to) {
  int const lane = threadIdx.x % 32;
  auto* const before = reinterpret_cast<uint16_t*>(bins);
  auto* const bits = reinterpret_cast<uint32_t*>(words);
  uint32_t const keys = 2048 * per_lane;
  for (int low = begin; low < end; low += keys) {
    __syncwarp();
    for (int i = 0; i < per_lane; ++i) words[32 * i + lane] = 0;
    __syncwarp();
    for_each(list, count, Index{}, [&](uint32_t index) {
      uint32_t const at = index - low;
      if (at < keys) atomicOr(&bits[at / 32], 1u << at % 32);
    });
    __syncwarp();
    int mine = 0;
    for (int i = 0; i < per_lane; ++i) mine += __popcll(words[per_lane * lane + i]);
    int const up_to = sum_up_to(mine);
    int sum = up_to - mine;
    for (int i = 0; i < per_lane; ++i) {
      before[per_lane * lane + i] = sum;
      sum += __popcll(words[per_lane * lane + i]);
    }
    __syncwarp();
    for_each(list, count, Index{}, [&](uint32_t index) {
      uint32_t const at = index - low;
      if (at >= keys) return;
      int const earlier = __popcll(words[at / 64] & ((uint64_t{1} << at % 64) - 1));
      to[before[at / 64] + earlier] = index - begin;
    });
    to += __shfl_sync(kAll, up_to, 31);
  }
  __syncwarp();
}

}  // namespace lt2::dsa::sm90::indexer
