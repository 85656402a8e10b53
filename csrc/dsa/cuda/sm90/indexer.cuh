// Scores by wgmma, keys on the rows and (query, head) pairs on the columns, in an order that leaves all heads
// of a query to one thread. Here they go to memory; indexer_select.cuh selects from them as they come.
#pragma once

#include "common/cuda/element.cuh"
#include "common/cuda/sm90/barrier.cuh"
#include "common/cuda/sm90/tma.cuh"
#include "common/cuda/sm90/wgmma.cuh"
#include "dsa/cuda/portable/score_rows.h"
#include "dsa/cuda/portable/sequences.cuh"
#include "dsa/cuda/sm90/candidates.cuh"

namespace lt2::dsa::sm90::indexer {

using namespace cuda;
using namespace cuda::sm90;
using portable::ScoreRows;
using portable::Sight;

inline constexpr int kKeys = 2 * kTileSide;  // of a step

// kHeads: HI, padded to 2, 4, 8 or 16. kColumns / kParts are the columns of a product.
template <class T_, int kDim_, int kHeads_>
struct TileTraits {
  using T = T_;
  static constexpr int kDim = kDim_, kHeads = kHeads_;
  static constexpr int kColumns = kHeads == 2 ? 64 : 128;  // by registers
  static constexpr int kQueries = kColumns / kHeads;       // of a tile: one per lane at most
  static constexpr int kParts = 2;
  static constexpr int kGroups = kQueries / (4 * kParts);  // of 4 queries, of a product
  static constexpr int kHalves = kDim / kTileSide;

  using Dots = float[kColumns / kParts / 2];
  using Weights = float[kGroups][kHeads];
  using Scores = float[kGroups][2];
};

// One item of work: queries [query, ..) of a batch row, kKeys keys a step from `begin` on.
struct Item {
  int64_t batch, query;
  int begin, steps;
  int inner_begin, inner_end;  // keys that all queries see that see any
};

// Keys begin .. end - 1 of the tile from a query on. All lanes call; own is that of query `lane`.
__device__ inline Item find_item(IndexerParams const& p, ScoreRows const& rows, int64_t batch, int64_t query,
                                 int64_t begin, int64_t end, Sight& own) {
  Item item;
  item.batch = batch;
  item.query = query;
  int const q = threadIdx.x % 32;
  bool const exists = q < rows.tile_rows && item.query + q < p.tokens;
  own = exists ? portable::sight(p, item.batch, item.query + q) : Sight{0, 0};
  bool const sees = own.count > 0;
  int low = __reduce_min_sync(kAll, sees ? own.first : INT32_MAX);
  int high = __reduce_max_sync(kAll, sees ? own.first + own.count : 0);
  item.inner_begin = __reduce_max_sync(kAll, sees ? own.first : 0);
  item.inner_end = __reduce_min_sync(kAll, sees ? own.first + own.count : INT32_MAX);
  low = max(int64_t{low}, begin);
  high = min(int64_t{high}, end);
  item.begin = low;
  item.steps = high > low ? (high - low + kKeys - 1) / kKeys : 0;
  return item;
}

// Items are dealt to blocks in turns, there and back, those with most keys first.
__device__ inline int64_t item_number(int64_t round) {
  return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// Whose turn it is of kCount, and the parity of the round.
template <int kCount>
struct Turn {
  uint32_t at = 0, phase = 0;

  __device__ void advance() {
    bool const last = at == kCount - 1;
    at = last ? 0 : at + 1;
    phase ^= last;
  }
};

// Row n of the operand is head 2 (n % (4 kHeads) / 8) + n % 2 of query 4 (n / (4 kHeads)) + n / 2 % 4.
template <class Traits, int kThreads>
__device__ void load_queries(IndexerParams const& p, ScoreRows const& rows, Item const& item,
                             unsigned char (*to)[Traits::kColumns * 128]) {
  using T = typename Traits::T;
  constexpr int kHeads = Traits::kHeads, kColumns = Traits::kColumns, kChunks = Traits::kDim / 8;
  auto const* const q = static_cast<T const*>(p.q.data) + item.batch * p.q.batch;
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));  // addresses are not worth registers between items
#pragma unroll 4
  for (int i = thread; i < kColumns * kChunks; i += kThreads) {
    int const n = i / kChunks, chunk = i % kChunks;
    int const t = n / (4 * kHeads) * 4 + n / 2 % 4, h = n % (4 * kHeads) / 8 * 2 + n % 2;
    bool const valid = t < rows.tile_rows && item.query + t < p.tokens && h < p.heads;
    uint4 x{};
    if (valid) {
      x = *reinterpret_cast<uint4 const*>(q + (item.query + t) * p.q.token + h * p.q.head + chunk * 8);
    }
    *reinterpret_cast<uint4*>(to[chunk / 8] + tile_offset(n, chunk % 8)) = x;
  }
}

// Of queries first, first + 4, .. of the tile, times scale / 2.
template <class Traits>
__device__ __forceinline__ void load_weights(IndexerParams const& p, ScoreRows const& rows, Item const& item,
                                             int first, typename Traits::Weights& weights) {
  auto const* const w = static_cast<float const*>(p.weights.data) + item.batch * p.weights.batch;
#pragma unroll
  for (int g = 0; g < Traits::kGroups; ++g) {
    int const t = first + 4 * g;
    bool const valid = t < rows.tile_rows && item.query + t < p.tokens;
#pragma unroll
    for (int h = 0; h < Traits::kHeads; ++h) {
      float const x = p.weights.data == nullptr ? 1.f
                      : valid && h < p.heads    ? w[(item.query + t) * p.weights.token + h * p.weights.head]
                                                : 0.f;
      weights[g][h] = 0.5f * p.scale * x;
    }
  }
#pragma unroll
  for (int g = 0; g < Traits::kGroups; ++g) pin(weights[g]);  // not to be computed again
}

// Of 64 keys with a part of the columns, committed.
template <class Traits>
__device__ __forceinline__ void multiply(unsigned char const (&keys)[Traits::kHalves][kTileBytes],
                                         unsigned char const (*queries)[Traits::kColumns * 128], int part,
                                         typename Traits::Dots& dots) {
  constexpr int kColumns = Traits::kColumns / Traits::kParts;
  wgmma_begin();
  uint64_t const rows = k_major(keys), columns = k_major(queries) + part * (kColumns * 128 >> 4);
#pragma unroll
  for (int k = 0; k < Traits::kDim / 16; ++k) {
    wgmma<typename Traits::T, kColumns>(dots, rows + k_step(k), columns + k_step<Traits::kColumns * 128>(k),
                                        k > 0);
  }
  wgmma_commit();
}

// max(x, low), NaN if x is.
__device__ __forceinline__ float at_least(float x, float low) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
  return y;
}

// The sums over heads: of a thread's two keys of a product with queries first, first + 4, .. summed() when
// they are made, before it is looked whether they are finite.
template <class Traits, class Summed>
__device__ __forceinline__ void add_heads(IndexerParams const& p, typename Traits::Dots const& dots,
                                          typename Traits::Weights const& weights,
                                          typename Traits::Scores& scores, Summed const& summed) {
  constexpr int kHeads = Traits::kHeads, kGroups = Traits::kGroups;
  auto const dot = [&](int g, int r, int h) { return dots[4 * (g * kHeads / 2 + h / 2) + 2 * r + h % 2]; };
#pragma unroll
  for (int g = 0; g < kGroups; ++g) scores[g][0] = scores[g][1] = 0.f;
  // Twice relu(x) is x + |x|, which takes no turn of the pipe for comparisons.
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float const x = dot(g, r, h);
        scores[g][r] = fmaf(weights[g][h], x + fabsf(x), scores[g][r]);
      }
    }
  }
  summed();
  float sum = scores[0][0] + scores[0][1];
#pragma unroll
  for (int g = 1; g < kGroups; ++g) sum += scores[g][0] + scores[g][1];
  if (fabsf(sum) < (p.relu ? INFINITY : 0.f)) return;
  // Linear, or something is infinite or NaN.
  float const least = p.relu ? 0.f : -INFINITY;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scores[g][r] = 0.f;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float weight = weights[g][h];
        asm volatile("" : "+f"(weight));  // not to be doubled before the loop
        if (h < p.heads) scores[g][r] = fmaf(2.f * weight, at_least(dot(g, r, h), least), scores[g][r]);
      }
    }
  }
}

// Scores to memory: few queries, each tile's keys cut into spans for many blocks.
struct ScoreLaunch {
  IndexerParams p;
  ScoreRows rows;
  int64_t spans, span;  // of a tile; keys of one
};

template <class T, int kDim, int kHeads>
struct ScoreTraits : TileTraits<T, kDim, kHeads> {
  static constexpr int kThreads = 2 * kWarpgroup;  // each 64 keys of a step
  static constexpr int kStages = 4;
  static constexpr int kTogether = kHeads == 4 ? 1 : kDim == kTileSide ? 4 : 2;  // steps, by registers

  struct alignas(1024) Shared {
    unsigned char keys[kStages][2][kDim / kTileSide][kTileBytes];
    unsigned char queries[kDim / kTileSide][TileTraits<T, kDim, kHeads>::kColumns * 128];
    Sight sights[TileTraits<T, kDim, kHeads>::kQueries];
    Barrier key_full[kStages][2], key_empty[kStages][2];
  };
};

// The products of a step are made in two parts of half the columns, so that one runs while the scores of the
// other are added up.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    score_kernel(__grid_constant__ ScoreLaunch const a, __grid_constant__ CUtensorMap const map) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(bytes);
  constexpr int kGroups = Traits::kGroups, kStages = Traits::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
        shared.key_full[i][warpgroup].init(1);
        shared.key_empty[i][warpgroup].init(kWarpgroup / 32);
      }
    }
    fence_barrier_init();
  }
  __syncthreads();
  int const thread = threadIdx.x, lane = thread % 32, warpgroup = thread / kWarpgroup;
  int const row = thread / 32 * 16 + lane / 4, q4 = lane % 4;  // also row + 8
  bool const loads = thread % kWarpgroup == 0;
  uint32_t met = 0;  // steps of earlier items
  Turn<kStages> keys;
  int64_t const items = a.rows.tiles * a.spans;
  for (int64_t round = 0; round * gridDim.x < items; ++round) {
    int64_t const number = item_number(round);
    if (number >= items) continue;
    int64_t const local_tile = number / a.spans, begin = number % a.spans * a.span;
    Sight sight;
    int64_t const tile = a.rows.first_tile + local_tile;
    Item const item = find_item(a.p, a.rows, tile / a.rows.row_tiles,
                                tile % a.rows.row_tiles * a.rows.tile_rows, begin, begin + a.span, sight);
    if (item.steps == 0) continue;
    auto const load = [&](int i) {
      if (!loads || i >= item.steps) return;
      uint32_t const now = met + i, stage = now % kStages;
      Barrier& full = shared.key_full[stage][warpgroup];
      shared.key_empty[stage][warpgroup].wait((now / kStages + 1) & 1);
      full.arrive_expecting(Traits::kHalves * kTileBytes);
      for (int half = 0; half < Traits::kHalves; ++half) {
        load_tile(shared.keys[stage][warpgroup][half], map, half * kTileSide, 0,
                  item.begin + i * kKeys + warpgroup * kTileSide, static_cast<int>(item.batch), full);
      }
    };
    for (int i = 0; i < kStages; ++i) load(i);
    __syncwarp();
    __syncthreads();  // nobody reads the last item's queries any more
    if (thread < Traits::kQueries) shared.sights[thread] = sight;
    load_queries<Traits, Traits::kThreads>(a.p, a.rows, item, shared.queries);
    typename Traits::Weights weights[2];
    load_weights<Traits>(a.p, a.rows, item, q4, weights[0]);
    load_weights<Traits>(a.p, a.rows, item, q4 + 4 * kGroups, weights[1]);
    fence_async_shared();
    __syncthreads();

    typename Traits::Dots dots[2];
    auto const start = [&](int part, uint32_t stage) {
      multiply<Traits>(shared.keys[stage][warpgroup], shared.queries, part, dots[part]);
    };
    auto const finish = [&](int part, int first) {
      typename Traits::Scores scores;
      add_heads<Traits>(a.p, dots[part], weights[part], scores, [] {});
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        int const t = 4 * (part * kGroups + g) + q4;
        Sight const s = shared.sights[t];
        int const at = first + row - s.first;
        float* const out = a.rows.scores + (local_tile * a.rows.tile_rows + t) * a.rows.stride;
        if (at >= 0 && at < s.count) out[at] = scores[g][0] + 0.f;  // no -0
        if (at + 8 >= 0 && at + 8 < s.count) out[at + 8] = scores[g][1] + 0.f;
      }
    };
    // Products of the next part are under way while those of one are added up, but not beyond `count` steps:
    // around a loop ptxas would wait for them.
    int i = 0;
    auto const take = [&](auto count) {
      shared.key_full[keys.at][warpgroup].wait(keys.phase);
      start(0, keys.at);
      start(1, keys.at);
#pragma unroll
      for (int j = 0; j < count; ++j) {
        int const first = item.begin + i * kKeys;
        auto next = keys;
        next.advance();
        wgmma_wait<1>();
        pin(dots[0]);
        finish(0, first);
        if (j + 1 < count) {
          shared.key_full[next.at][warpgroup].wait(next.phase);
          start(0, next.at);
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();
        }
        pin(dots[1]);
        if (lane == 0) shared.key_empty[keys.at][warpgroup].arrive();
        finish(1, first);
        if (j + 1 < count) start(1, next.at);
        load(i + kStages);
        __syncwarp();
        keys = next;
        ++i;
      }
    };
    constexpr int kTogether = Traits::kTogether;
#pragma unroll 1
    while (i + kTogether <= item.steps) take(std::integral_constant<int, kTogether>{});
#pragma unroll 1
    while (i < item.steps) take(std::integral_constant<int, 1>{});
    met += item.steps;
  }
}

}  // namespace lt2::dsa::sm90::indexer
