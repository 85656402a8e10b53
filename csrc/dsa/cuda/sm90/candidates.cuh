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

// If y >= least: n + 1; x to `to`, which goes on.
__device__ __forceinline__ void count_if(float y, float least, int& n) {
  asm("{\n"
      ".reg .pred wanted;\n"
      "setp.ge.f32 wanted, %1, %2;\n"
      "@wanted add.s32 %0, %0, 1;\n"
      "}\n"
      : "+r"(n)
      : "f"(y), "f"(least));
}
__device__ __forceinline__ void append_if(float y, float least, Candidate*& to, Candidate x) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ge.f32 wanted, %1, %2;\n"
      "@wanted st.v2.b32 [%0], {%3, %4};\n"
      "@wanted add.u64 %0, %0, 8;\n"
      "}\n"
      : "+l"(to)
      : "f"(y), "f"(least), "f"(x.score), "r"(x.index)
      : "memory");
}
__device__ __forceinline__ void append_if(float y, float least, uint32_t& to, Candidate x) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ge.f32 wanted, %1, %2;\n"
      "@wanted st.shared.v2.b32 [%0], {%3, %4};\n"
      "@wanted add.u32 %0, %0, 8;\n"
      "}\n"
      : "+r"(to)
      : "f"(y), "f"(least), "f"(x.score), "r"(x.index)
      : "memory");
}

__device__ __forceinline__ uint32_t reserve(uint32_t counter, uint32_t n) {
  uint32_t at;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(at) : "r"(counter), "r"(n) : "memory");
  return at;
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

// f(kRows candidates of a lane) for all of them. Behind the last one of 128 there are some without a score
// (fill).
inline constexpr int kRows = 8;
template <class F>
__device__ __forceinline__ void for_rows(Candidate const* list, int count, F const& f) {
  for (int base = 0; base < count; base += 32 * kRows) {
    Candidate x[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      x[i] = {NAN, 0};
      if (base + 128 * (i / 4) < count) x[i] = list[base + 32 * i + threadIdx.x % 32];
    }
    f(x);
  }
}
__device__ __forceinline__ void fill(Candidate* list, int count) {
  int const end = (count + 127) / 128 * 128;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int const at = count + 32 * i + static_cast<int>(threadIdx.x % 32);
    if (at < end) list[at] = {NAN, 0};
  }
  __syncwarp();
}

// Of bins, counted from the worst: the one that has the k-th best candidate, `above` of which are in none.
struct Bin {
  int at, better, size;  // better: how many are in better ones, or above
};
__device__ __forceinline__ Bin find_bin(uint32_t const* bins, int k, int above) {
  int const lane = threadIdx.x % 32;
  constexpr int kOwn = kBins / 32;  // lane 0 has the best ones
  auto const* const own = reinterpret_cast<uint4 const*>(bins + kBins - kOwn * (lane + 1));
  uint4 const low = own[0], high = own[1];
  uint32_t const local[kOwn] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += local[i];
  int before = sum_up_to(sum) + above - sum;
  Bin bin{-1, 0, 0};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    int const with = before + local[i];
    if (before < k && with >= k) bin = {kBins - 1 - (kOwn * lane + i), before, static_cast<int>(local[i])};
    before = with;
  }
  int const owner = __ffs(__ballot_sync(kAll, bin.at >= 0)) - 1;
  return {__shfl_sync(kAll, bin.at, owner), __shfl_sync(kAll, bin.better, owner),
          __shfl_sync(kAll, bin.size, owner)};
}
__device__ __forceinline__ void clear(uint32_t* bins) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kBins / 128; ++i) reinterpret_cast<uint4*>(bins)[32 * i + threadIdx.x % 32] = {};
  __syncwarp();
}

// The best candidates. If `even`, those whose scores are in better bins than `bin`, bins of equal width, and
// the `equals` best of those in it, at most kFew. Else those with a rank above `low`, and of those that equal
// it the first `equals`. all: all in the bin, or all with a rank from low on.
struct Bound {
  bool even, all;
  int equals, size;  // size: of the bin
  float scale, offset, bin;
  uint32_t low;
  float score;  // scores from here on are wanted
};
inline constexpr int kFew = 32;
// A score's bin is round(scale score + offset), a float whose last bits are the bin's number. The first one
// has what is below all others, and NaN.
inline constexpr float kFirstBin = 8388608.f;

template <class Rank>
__device__ __forceinline__ void find_range(Candidate const* list, int count, Rank const& rank, uint32_t& low,
                                           uint32_t& high) {
  low = UINT32_MAX, high = 0;
  for_each(list, count, rank, [&](uint32_t key) {
    low = min(low, key == 0 ? UINT32_MAX : key);
    high = max(high, key);
  });
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
}

// Of at least the k best of `count` candidates and at most `most`, k <= most < count, by ranks, which are
// from low to high. bins: of the warp's own.
template <class Rank>
__device__ inline Bound find_rank(Candidate const* list, int count, int k, int most, uint32_t* bins,
                                  Rank const& rank, uint32_t low, uint32_t high) {
  auto const counters = static_cast<uint32_t>(__cvta_generic_to_shared(bins));
  int above = 0;  // candidates above high
  for (;;) {
    int const shift = max(0, 24 - __clz(high - low));
    clear(bins);
    for_each(list, count, rank, [&](uint32_t key) {
      increment(counters + (key - low <= high - low ? (key - low) >> shift : kBins) * 4);
    });
    __syncwarp();
    Bin const bin = find_bin(bins, k, above);
    above = bin.better;
    int const kept = above + bin.size;
    low += static_cast<uint32_t>(bin.at) << shift;
    high = low + min(high - low, (1u << shift) - 1);
    // Either all from low on are kept, or low is the k-th best itself.
    if (kept <= most || shift == 0) {
      Bound bound{};
      bound.all = kept <= most;
      bound.equals = bound.all ? kept : k - above;
      bound.low = low;
      bound.score = portable::score_of(low);
      return bound;
    }
  }
}

// The same by scores. The list is filled behind its end.
__device__ inline Bound find_bound(Candidate* list, int count, int k, int most, uint32_t* bins) {
  fill(list, count);
  float low = INFINITY, high = -INFINITY;
  for_rows(list, count, [&](Candidate const(&x)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) low = fminf(low, x[i].score), high = fmaxf(high, x[i].score);
  });
  uint32_t const lowest = __reduce_min_sync(kAll, portable::order(low));
  uint32_t const highest = __reduce_max_sync(kAll, portable::order(high));
  low = portable::score_of(lowest), high = portable::score_of(highest);
  if (8 * k < count) low = 0.5f * (low + high);  // hardly any of the best are below
  float const width = (high - low) * (1.f / (kBins - 6)), scale = __fdividef(1.f, width);
  // Else the sum with the offset is not precise enough, or a score is infinite.
  if (fmaxf(fabsf(low), fabsf(high)) * scale < 0x1p18f) {
    float const offset = kFirstBin + 2 - low * scale;
    auto const counters =
        static_cast<uint32_t>(__cvta_generic_to_shared(bins)) - __float_as_uint(kFirstBin) * 4;
    clear(bins);
    for_rows(list, count, [&](Candidate const(&x)[kRows]) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        increment(counters + __float_as_uint(fmaxf(fmaf(x[i].score, scale, offset), kFirstBin)) * 4);
      }
    });
    __syncwarp();
    Bin const bin = find_bin(bins, k, 0);
    bool const all = bin.better + bin.size <= most;
    if (bin.at > 0 && (all || bin.size <= kFew)) {
      Bound bound{true, all, k - bin.better, bin.size, scale, offset, kFirstBin + bin.at};
      bound.score = (bound.bin - offset - 0.75f) * width;  // a quarter of a bin more than it has
      return bound;
    }
  }
  return find_rank(list, count, k, most, bins, ByScore{}, lowest, highest);
}

// Keeps the candidates within a bound of find_bound's, of equals those of the lowest indices: how many. Later
// ones that equal the last of them are not wanted.
template <bool kHere>
__device__ inline int keep(Candidate* list, int count, Bound& bound, uint32_t* bins) {
  int const lane = threadIdx.x % 32;
  int written = 0;
  unsigned below;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
  if (bound.even) {
    auto const few = static_cast<uint32_t>(__cvta_generic_to_shared(bins)), counter = few + kFew * 8;
    float const least = bound.bin + !bound.all;
    __syncwarp();  // the last counts of the bins have been read
    if (lane == 0) bins[kFew * 2] = 0;
    __syncwarp();
    for_rows(list, count, [&](Candidate const(&x)[kRows]) {
      float bin[kRows];
      int n = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        bin[i] = fmaf(x[i].score, bound.scale, bound.offset);
        count_if(bin[i], least, n);
      }
      if (!bound.all) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (bin[i] != bound.bin) continue;
          // As numbers of 64 bits the best are the greatest: by score, and of equals the lowest index.
          store_if(true, few + 8 * reserve(counter, 1),
                   {__int_as_float(~x[i].index), static_cast<int>(order(__float_as_uint(x[i].score + 0.f)))});
        }
      }
      int const up_to = sum_up_to(n);
      int const all = __shfl_sync(kAll, up_to, 31);
      __syncwarp();  // all have read what is overwritten now
      auto const put = [&](auto to) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) append_if(bin[i], least, to, x[i]);
      };
      Candidate* const to = list + written + up_to - n;
      if constexpr (kHere) {
        put(static_cast<uint32_t>(__cvta_generic_to_shared(to)));
      } else {
        put(to);
      }
      written += all;
    });
    __syncwarp();
    if (!bound.all) {
      auto const* const keys = reinterpret_cast<uint64_t const*>(bins);
      uint64_t const own = lane < bound.size ? keys[lane] : 0;
      int better = 0;
      for (int i = 0; i < bound.size; ++i) better += keys[i] > own;
      bool const chosen = lane < bound.size && better < bound.equals;
      auto const score = static_cast<uint32_t>(own >> 32);
      int const at = written + __popc(__ballot_sync(kAll, chosen) & below);
      if (chosen) list[at] = {portable::score_of(score), static_cast<int>(~static_cast<uint32_t>(own))};
      written += bound.equals;
      uint32_t const last = __reduce_min_sync(kAll, chosen ? score : UINT32_MAX);
      bound.score = portable::score_of(last + 1);
    }
    __syncwarp();
    return written;
  }
  bound.score = portable::score_of(bound.low + 1);
  ByIndex const by_index{bound.low};
  uint32_t first = 1;
  if (!bound.all) {
    uint32_t low, high;
    find_range(list, count, by_index, low, high);
    first = find_rank(list, count, bound.equals, bound.equals, bins, by_index, low, high).low;
  }
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
#pragma unroll 4
    for (int i = 0; i < per_lane; ++i) {
      before[per_lane * lane + i] = mine;
      mine += __popcll(words[per_lane * lane + i]);
    }
    int const up_to = sum_up_to(mine);
#pragma unroll 4
    for (int i = 0; i < per_lane; ++i) before[per_lane * lane + i] += up_to - mine;
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
