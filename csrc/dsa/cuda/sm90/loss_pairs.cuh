// What an indexer's loss needs of each query and key, in tiles of 128 queries and 128 keys: the attention's
// weight p, summed over heads in registers, and the score I. They are not kept. The forward pass leaves sums
// of each query over some tiles; the backward pass leaves slopes N dI in two bytes, as fragments.
#pragma once

#include "dsa/cuda/sm90/attention_forward.cuh"

namespace lt2::dsa::sm90 {

inline constexpr int kColumnBytes = kTile * kTileSide * 2;  // of 128 rows
inline constexpr int kSlopeBytes = kTile * kTile * 2;       // of a tile
inline constexpr int kMostSpans = 64, kLongestSpan = kMaxTiles / kMostSpans;

// Slots that one thread fills and two warpgroups read, both in the order of their uses.
template <int kSlots, int kBytes>
struct Ring {
  alignas(1024) char data[kSlots][kBytes];
  Barrier loaded[kSlots], released[kSlots];

  __device__ void init() {
    for (int i = 0; i < kSlots; ++i) {
      loaded[i].init(1);
      released[i].init(2 * kWarpgroup / kWarp);
    }
  }
  // The slot to fill, when it is free.
  __device__ int reserve(int use, uint32_t bytes) {
    int const slot = use % kSlots;
    if (use >= kSlots) released[slot].wait((use / kSlots - 1) & 1);
    loaded[slot].arrive_expecting(bytes);
    return slot;
  }
  __device__ char const* wait(int use) {
    loaded[use % kSlots].wait((use / kSlots) & 1);
    return data[use % kSlots];
  }
  // By one lane of each warp.
  __device__ void release(int use) { released[use % kSlots].arrive(); }
};

template <class T_, int kDim_, int kIndexDim_, bool kSlopes_>
struct PairTraits {
  using T = T_;
  static constexpr int kDim = kDim_, kIndexDim = kIndexDim_;
  static constexpr bool kSlopes = kSlopes_;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kBytes = (kDim > kIndexDim ? kDim : kIndexDim) / kTileSide * kColumnBytes;

  struct Shared {
    Ring<3, kBytes> queries, keys;
    int count;
    uint16_t tiles[kLongestSpan];
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

struct PairMaps {
  CUtensorMap q, k, index_q, index_k;
};

// Of a query's keys in a span; `mass` is -1 where there is none.
struct PairSums {
  float top, total, mass, loss;  // largest I, sum of e^(I - top), sum of p, sum of p (log p - I)
};

struct PairLaunch {
  LossParams p;
  Masks masks;          // bits null: each query sees the newest topk of its keys
  int64_t first;        // query tile, counted over batch rows
  int64_t spans, span;  // spans of a query tile, key tiles of a span
  PairSums* sums;       // [query tiles, spans, 128]
  uint4* slopes;        // [query tiles, key tiles, 16 x 16 blocks of 8 x 8]
};

// Slopes of two bytes: small ones would lose bits of a float16.
template <class T>
constexpr float kSlopeScale = std::is_same_v<T, __half> ? 64.f : 1.f;

// Block (query block, key block) of 8 x 8 in a tile of slopes: a word per lane, four blocks of a row
// together.
__host__ __device__ constexpr int slope_word(int query_block, int key_block, int lane) {
  return ((query_block * 4 + key_block / 4) * kWarp + lane) * 4 + key_block % 4;
}

template <int kDim>
__device__ __forceinline__ void load_rows(char* to, CUtensorMap const& map, int head, int64_t tile, int row,
                                          Barrier& loaded) {
  load_columns<kDim / kTileSide, kColumnBytes>(to, map, head, static_cast<int>(tile) * kTile, row, loaded);
}

// s [64, 128] = rows [64, kDim] columns [128, kDim]^T; complete on return, and what was started before.
template <class T, int kDim>
__device__ __forceinline__ void multiply_rows(float (&s)[kTile / 2], char const* rows, char const* columns) {
  uint64_t const a = k_major(rows), b = k_major(columns);
  pin(s);
  wgmma_begin();
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
    wgmma<T, kTile>(s, a + k_step<kColumnBytes>(j), b + k_step<kColumnBytes>(j), j > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(s);
}

template <class Traits>
__device__ void load_pairs(typename Traits::Shared& shared, PairLaunch const& a, PairMaps const& maps,
                           int row, int64_t tile, int64_t first_key_tile) {
  constexpr int kBytes = Traits::kDim * kTile * 2, kIndexBytes = Traits::kIndexDim * kTile * 2;
  int const heads = static_cast<int>(a.p.query_heads), group = heads / static_cast<int>(a.p.key_heads);
  int query = 0, key = 0;
  for (int i = 0; i < shared.count; ++i) {
    int64_t const key_tile = first_key_tile + shared.tiles[i];
    for (int h = 0; h < heads; ++h) {
      if (h % group == 0) {
        int const slot = shared.keys.reserve(key++, kBytes);
        load_rows<Traits::kDim>(shared.keys.data[slot], maps.k, h / group, key_tile, row,
                                shared.keys.loaded[slot]);
      }
      int const slot = shared.queries.reserve(query++, kBytes);
      load_rows<Traits::kDim>(shared.queries.data[slot], maps.q, h, tile, row, shared.queries.loaded[slot]);
    }
    int const slot = shared.keys.reserve(key++, kIndexBytes);
    load_rows<Traits::kIndexDim>(shared.keys.data[slot], maps.index_k, 0, key_tile, row,
                                 shared.keys.loaded[slot]);
    for (int j = 0; j < a.p.index_heads; ++j) {
      int const at = shared.queries.reserve(query++, kIndexBytes);
      load_rows<Traits::kIndexDim>(shared.queries.data[at], maps.index_q, j, tile, row,
                                   shared.queries.loaded[at]);
    }
  }
}

// Sums of a thread's share of a row's keys.
struct RowSums {
  float top = -INFINITY, total = 0.f, mass = 0.f, loss = 0.f;
  uint32_t seen = 0;

  __device__ __forceinline__ static float base_of(float top) { return top == -INFINITY ? 0.f : top; }

  __device__ __forceinline__ void merge(int distance) {
    float const other = __shfl_xor_sync(0xffffffffu, top, distance), highest = fmaxf(top, other);
    float const base = base_of(highest);
    float const own = total * exp2_fast((top - base) * portable::kLog2E);
    float const its =
        __shfl_xor_sync(0xffffffffu, total, distance) * exp2_fast((other - base) * portable::kLog2E);
    total = own + its;
    top = highest;
    mass += __shfl_xor_sync(0xffffffffu, mass, distance);
    loss += __shfl_xor_sync(0xffffffffu, loss, distance);
    seen |= __shfl_xor_sync(0xffffffffu, seen, distance);
  }
};

template <class Traits>
__device__ void compute_pairs(typename Traits::Shared& shared, PairLaunch const& a, int64_t unit, int64_t row,
                              int64_t tile, int64_t span, int group, int thread) {
  using T = typename Traits::T;
  constexpr float kLog2E = portable::kLog2E, kLn2 = 0.6931471805599453f;
  LossParams const& p = a.p;
  int const warp = thread / kWarp, lane = thread % kWarp, own = group * kTileSide + 16 * warp + lane / 4;
  int const key_heads = static_cast<int>(p.key_heads), heads = static_cast<int>(p.query_heads) / key_heads;
  int64_t const index_heads = p.index_heads;
  float const scale = p.scale * kLog2E, share = 1.f / static_cast<float>(p.query_heads);
  int64_t queries[2];
  float const* lse[2];
  float const* weights[2];
  Range ranges[2];
  float log_sums[2], masses[2];
  RowSums sums[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t const token = tile * kTile + own + 8 * half, there = min(token, p.tokens - 1);
    queries[half] = row * p.tokens + there;
    lse[half] = p.lse + queries[half] * p.query_heads;
    weights[half] =
        p.weights.data == nullptr ? nullptr : portable::row_of<float const>(p.weights, row, there, 0);
    if (a.masks.bits == nullptr) ranges[half] = keys_of(p, row, token);
    if constexpr (Traits::kSlopes) {
      log_sums[half] = p.log_sums[queries[half]];
      masses[half] = p.masses[queries[half]];
    }
  }
  int query = 0, key = 0;
  for (int i = 0; i < shared.count; ++i) {
    int64_t const key_tile = span * a.span + shared.tiles[i];
    uint32_t words[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (a.masks.bits == nullptr) {
        words[half] = bits_of(ranges[half], static_cast<int>(key_tile), lane % 4);
      } else {
        words[half] = reinterpret_cast<uint32_t const*>(
            a.masks.bits + a.masks.tile(row, tile, key_tile) * kTile + own + 8 * half)[lane % 4];
      }
    }
    float s[kTile / 2], weight[kTile / 2] = {}, score[kTile / 2] = {};
    for (int h = 0; h < key_heads * heads; ++h) {
      float const base[2] = {lse[0][h] * kLog2E, lse[1][h] * kLog2E};
      char const* const k = shared.keys.wait(key);
      multiply_rows<T, Traits::kDim>(s, shared.queries.wait(query) + group * kTileBytes, k);
      bool const last = h % heads == heads - 1;
      if (lane == 0) {
        shared.queries.release(query);
        if (last) shared.keys.release(key);
      }
      ++query;
      key += last;
#pragma unroll
      for (int e = 0; e < kTile / 2; ++e) weight[e] += exp2_fast(s[e] * scale - base[e / 2 % 2]);
    }
    char const* const k = shared.keys.wait(key);
    for (int64_t j = 0; j < index_heads; ++j) {
      float w[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w[half] = p.index_scale * (weights[half] == nullptr ? 1.f : weights[half][j * p.weights.head]);
      }
      multiply_rows<T, Traits::kIndexDim>(s, shared.queries.wait(query) + group * kTileBytes, k);
      if (lane == 0) {
        shared.queries.release(query);
        if (j + 1 == index_heads) shared.keys.release(key);
      }
      ++query;
#pragma unroll
      for (int e = 0; e < kTile / 2; ++e) score[e] += w[e / 2 % 2] * fmaxf(s[e], 0.f);
    }
    ++key;

    if constexpr (Traits::kSlopes) {
      uint4* const to =
          a.slopes + ((unit - a.first) * a.masks.key_tiles + key_tile) * (kSlopeBytes / sizeof(uint4));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const base = log_sums[half] * kLog2E;
        uint32_t packed[kTile / 8];
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
          float d[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int const at = 4 * n + 2 * half + e;
            float const slope = masses[half] * exp2_fast(score[at] * kLog2E - base) - weight[at] * share;
            d[e] = words[half] & (1u << (2 * n + e)) ? slope * kSlopeScale<T> : 0.f;
          }
          packed[n] = pack<T>(d[0], d[1]);
        }
        int const block = 8 * group + 2 * warp + half;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          to[slope_word(block, 4 * c, lane) / 4] =
              uint4{packed[4 * c], packed[4 * c + 1], packed[4 * c + 2], packed[4 * c + 3]};
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RowSums& row_sums = sums[half];
        float highest = row_sums.top;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int const at = 4 * n + 2 * half + e;
            bool const there = words[half] & (1u << (2 * n + e));
            score[at] = there ? score[at] : -INFINITY;
            weight[at] = there ? weight[at] * share : 0.f;
            highest = fmaxf(highest, score[at]);
          }
        }
        float const base = RowSums::base_of(highest) * kLog2E;
        float total = row_sums.total * exp2_fast(row_sums.top * kLog2E - base);
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int const at = 4 * n + 2 * half + e;
            total += exp2_fast(score[at] * kLog2E - base);
            row_sums.mass += weight[at];
            if (weight[at] != 0.f) row_sums.loss += weight[at] * (__log2f(weight[at]) * kLn2 - score[at]);
          }
        }
        row_sums.total = total;
        row_sums.top = highest;
        row_sums.seen |= words[half];
      }
    }
  }
  if constexpr (!Traits::kSlopes) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowSums& x = sums[half];
      x.merge(1);
      x.merge(2);
      if (lane % 4 == 0) {
        a.sums[(unit * a.spans + span) * kTile + own + 8 * half] = {x.top, x.total, x.seen ? x.mass : -1.f,
                                                                    x.loss};
      }
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    pair_kernel(__grid_constant__ PairLaunch const a, __grid_constant__ PairMaps const maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  if (is_idle(a.masks)) return;
  int64_t const unit = a.first + blockIdx.x / a.spans, span = blockIdx.x % a.spans;
  int64_t const row = unit / a.masks.query_tiles, tile = unit % a.masks.query_tiles;
  int64_t const first_key_tile = span * a.span;
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    shared.queries.init();
    shared.keys.init();
    fence_barrier_init();
  }
  if (threadIdx.x / kWarp == 1) {
    int const count =
        list_used(a.masks.used + a.masks.tile(row, tile, first_key_tile), 1,
                  static_cast<int>(min(a.span, a.masks.key_tiles - first_key_tile)), shared.tiles);
    if (threadIdx.x % kWarp == 0) shared.count = count;
  }
  __syncthreads();
  if (Traits::kSlopes && shared.count == 0) return;
  if (group == 2) {
    shrink_registers<24>();
    if (thread == 0) load_pairs<Traits>(shared, a, maps, static_cast<int>(row), tile, first_key_tile);
  } else {
    grow_registers<240>();
    compute_pairs<Traits>(shared, a, unit, row, tile, span, group, thread);
  }
}

}  // namespace lt2::dsa::sm90
