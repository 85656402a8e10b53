// Scores by wgmma, keys on the rows and (query, head) pairs on the columns, in an order that leaves all heads
// of a query to one thread. They go to warps that keep each query's candidates, or to memory.
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

inline constexpr int kKeys = kTileSide;  // of a tile, one per row
inline constexpr int kScoreWarps = 8;    // two warpgroups, which take turns at tiles
inline constexpr int kSelectWarps = 8;   // two warpgroups
inline constexpr int kLaunchRegisters =
    128;  // of a thread, with as many warps that score as warps that select
inline constexpr int kScoreStride = kKeys + 8;  // floats; keeps a warp's stores off each other's banks

// kHeads: HI, padded to 2, 4, 8 or 16. kSelect: select; else write scores.
template <class T_, int kDim_, int kHeads_, bool kSelect_>
struct Traits {
  using T = T_;
  static constexpr int kDim = kDim_, kHeads = kHeads_;
  static constexpr bool kSelect = kSelect_;
  static constexpr int kColumns = kHeads == 2 ? 64 : 128;  // by registers
  static constexpr int kQueries = kColumns / kHeads;       // of a tile: one per lane at most
  static constexpr int kGroups = kQueries / 4;
  static constexpr int kThreads = 32 * (kScoreWarps + (kSelect ? kSelectWarps : 0));
  static constexpr int kStages = kSelect ? 4 : 8;  // even: each warpgroup has its own
  static constexpr int kSlots = 4;
  static constexpr int kScoreRegisters = kHeads == 2 ? 112 : 152;
  static constexpr int kHalves = kDim / kTileSide;

  struct alignas(1024) Shared {
    unsigned char keys[kStages][kHalves][kTileBytes];
    unsigned char queries[kHalves][kColumns * 128];
    float scores[kSelect ? kSlots : 1][kSelect ? kQueries : 1][kScoreStride];
    uint32_t bins[kSelect ? kSelectWarps : 1][kBins];
    Sight sights[kQueries];
    Barrier key_full[kStages], key_empty[kStages], score_full[kSlots], score_empty[kSlots];
  };
};

struct IndexLaunch {
  IndexerParams p;
  ScoreRows rows;         // of the tiles; `scores` only where they are written
  int64_t spans, span;    // each tile's keys are cut into `spans` of `span` keys (1 where kSelect)
  int capacity, kept;     // of a query's candidates; min(topk, S)
  Candidate* candidates;  // [blocks, kQueries, capacity], null: in shared memory after Shared
};

// One item of work: queries [query, ..) of a batch row, tiles of keys from `begin` on.
struct Item {
  int64_t batch, query, local_tile;
  int begin, tiles;
  int inner_begin, inner_end;  // keys that all queries see that see any
};

// Items are dealt to blocks in turns, there and back, those with most keys first.
__device__ inline int64_t item_number(int64_t round) {
  return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// All lanes call; own is that of query `lane`.
template <class Traits>
__device__ inline Item find_item(IndexLaunch const& a, int64_t number, Sight& own) {
  int64_t const tiles = a.rows.tiles, tile = number / a.spans;
  Item item;
  if constexpr (Traits::kSelect) {
    int64_t const batches = tiles / a.rows.row_tiles;
    item.batch = tile % batches;
    item.local_tile = item.batch * a.rows.row_tiles + (a.rows.row_tiles - 1 - tile / batches);
  } else {
    item.local_tile = tile;
    item.batch = (a.rows.first_tile + tile) / a.rows.row_tiles;
  }
  item.query = (a.rows.first_tile + item.local_tile) % a.rows.row_tiles * a.rows.tile_rows;
  int const q = threadIdx.x % 32;
  bool const exists = q < a.rows.tile_rows && item.query + q < a.p.tokens;
  own = exists ? portable::sight(a.p, item.batch, item.query + q) : Sight{0, 0};
  bool const sees = own.count > 0;
  int low = __reduce_min_sync(kAll, sees ? own.first : INT32_MAX);
  int high = __reduce_max_sync(kAll, sees ? own.first + own.count : 0);
  item.inner_begin = __reduce_max_sync(kAll, sees ? own.first : 0);
  item.inner_end = __reduce_min_sync(kAll, sees ? own.first + own.count : INT32_MAX);
  if constexpr (!Traits::kSelect) {
    int64_t const begin = number % a.spans * a.span;
    low = max(int64_t{low}, begin);
    high = min(int64_t{high}, begin + a.span);
  }
  item.begin = low;
  item.tiles = high > low ? (high - low + kKeys - 1) / kKeys : 0;
  return item;
}

// max(x, low), NaN if x is.
__device__ __forceinline__ float at_least(float x, float low) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
  return y;
}

// Tile i of an item, by one thread; `tile` counts on over the items.
template <class Traits>
__device__ void load_keys(CUtensorMap const& map, Item const& item, int i, int64_t tile,
                          typename Traits::Shared& shared) {
  int const stage = static_cast<int>(tile % Traits::kStages);
  shared.key_empty[stage].wait((tile / Traits::kStages + 1) & 1);
  shared.key_full[stage].arrive_expecting(Traits::kHalves * kTileBytes);
  for (int half = 0; half < Traits::kHalves; ++half) {
    load_tile(shared.keys[stage][half], map, half * kTileSide, 0, item.begin + i * kKeys,
              static_cast<int>(item.batch), shared.key_full[stage]);
  }
}

// Row n of the operand is head 2 (n % (4 kHeads) / 8) + n % 2 of query 4 (n / (4 kHeads)) + n / 2 % 4.
template <class Traits>
__device__ void load_queries(IndexLaunch const& a, Item const& item, typename Traits::Shared& shared) {
  using T = typename Traits::T;
  constexpr int kHeads = Traits::kHeads, kColumns = Traits::kColumns, kChunks = Traits::kDim / 8;
  auto const* const q = static_cast<T const*>(a.p.q.data) + item.batch * a.p.q.batch;
#pragma unroll 4
  for (int i = threadIdx.x; i < kColumns * kChunks; i += 32 * kScoreWarps) {
    int const n = i / kChunks, chunk = i % kChunks;
    int const t = n / (4 * kHeads) * 4 + n / 2 % 4, h = n % (4 * kHeads) / 8 * 2 + n % 2;
    bool const valid = t < a.rows.tile_rows && item.query + t < a.p.tokens && h < a.p.heads;
    uint4 x{};
    if (valid) {
      x = *reinterpret_cast<uint4 const*>(q + (item.query + t) * a.p.q.token + h * a.p.q.head + chunk * 8);
    }
    *reinterpret_cast<uint4*>(shared.queries[chunk / 8] + tile_offset(n, chunk % 8)) = x;
  }
}

template <class Traits>
__device__ void score(IndexLaunch const& a, CUtensorMap const& map, typename Traits::Shared& shared) {
  using T = typename Traits::T;
  constexpr int kHeads = Traits::kHeads, kColumns = Traits::kColumns, kGroups = Traits::kGroups;
  int const thread = threadIdx.x, lane = thread % 32, warpgroup = thread / kWarpgroup;
  int const row = thread % kWarpgroup / 32 * 16 + lane / 4, q4 = lane % 4;  // also row + 8
  int const heads = static_cast<int>(a.p.heads);
  float const least = a.p.relu ? 0.f : -INFINITY;
  int64_t met = 0;
  int64_t const items = a.rows.tiles * a.spans;
  for (int64_t round = 0; round * gridDim.x < items; ++round) {
    int64_t const number = item_number(round);
    if (number >= items) continue;
    Sight sight;
    Item const item = find_item<Traits>(a, number, sight);
    bool const loads = thread % kWarpgroup == 0;
    int const first = static_cast<int>((met + warpgroup) % 2);  // of this warpgroup's tiles
    if (loads) {
      for (int i = first; i < min(item.tiles, Traits::kStages); i += 2)
        load_keys<Traits>(map, item, i, met + i, shared);
    }
    __syncwarp();
    named_barrier(1, 32 * kScoreWarps);  // nobody reads the last item's queries any more
    if (thread < Traits::kQueries) shared.sights[thread] = sight;
    load_queries<Traits>(a, item, shared);
    float weights[kGroups][kHeads];
    auto const* const w = static_cast<float const*>(a.p.weights.data) + item.batch * a.p.weights.batch;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      int const t = 4 * g + q4;
      bool const valid = t < a.rows.tile_rows && item.query + t < a.p.tokens;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float const x = a.p.weights.data == nullptr ? 1.f
                        : valid && h < heads ? w[(item.query + t) * a.p.weights.token + h * a.p.weights.head]
                                             : 0.f;
        weights[g][h] = x * a.p.scale;
      }
    }
    fence_async_shared();
    named_barrier(1, 32 * kScoreWarps);

    for (int i = first; i < item.tiles; i += 2) {
      int64_t const tile = met + i;
      int const stage = static_cast<int>(tile % Traits::kStages);
      shared.key_full[stage].wait((tile / Traits::kStages) & 1);
      float dots[kColumns / 2];
      uint64_t const keys = k_major(shared.keys[stage]), queries = k_major(shared.queries);
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < Traits::kDim / 16; ++k) {
        wgmma<T, kColumns>(dots, keys + k_step(k), queries + k_step<kColumns * 128>(k), k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(dots);
      if (lane == 0) shared.key_empty[stage].arrive();
      if (loads && i + Traits::kStages < item.tiles) {
        load_keys<Traits>(map, item, i + Traits::kStages, tile + Traits::kStages, shared);
      }
      __syncwarp();

      float scores[kGroups][2] = {};
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) break;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float const x = dots[4 * (g * kHeads / 2 + h / 2) + 2 * r + h % 2];
            scores[g][r] = fmaf(weights[g][h], at_least(x, least), scores[g][r]);
          }
        }
      }
      int const key = item.begin + i * kKeys + row;
      if constexpr (Traits::kSelect) {
        if (item.begin + i * kKeys < item.inner_begin || item.begin + (i + 1) * kKeys > item.inner_end) {
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            Sight const s = shared.sights[4 * g + q4];
            if (key < s.first || key >= s.first + s.count) scores[g][0] = NAN;
            if (key + 8 < s.first || key + 8 >= s.first + s.count) scores[g][1] = NAN;
          }
        }
        int const slot = static_cast<int>(tile % Traits::kSlots);
        shared.score_empty[slot].wait((tile / Traits::kSlots + 1) & 1);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          shared.scores[slot][4 * g + q4][row] = scores[g][0];
          shared.scores[slot][4 * g + q4][row + 8] = scores[g][1];
        }
        __syncwarp();
        if (lane == 0) shared.score_full[slot].arrive();
      } else {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          int const t = 4 * g + q4;
          Sight const s = shared.sights[t];
          int const at = key - s.first, limit = s.count;
          float* const out = a.rows.scores + (item.local_tile * a.rows.tile_rows + t) * a.rows.stride;
          if (at >= 0 && at < limit) out[at] = scores[g][0];
          if (at + 8 >= 0 && at + 8 < limit) out[at + 8] = scores[g][1];
        }
      }
    }
    met += item.tiles;
  }
}

// Each warp has kQueries / kSelectWarps queries of its own.
template <class Traits>
__device__ void select(IndexLaunch const& a, typename Traits::Shared& shared) {
  constexpr int kOwn = Traits::kQueries / kSelectWarps;
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32 - kScoreWarps;
  Candidate* const lists =
      (a.candidates == nullptr ? reinterpret_cast<Candidate*>(&shared + 1)
                               : a.candidates + int64_t{blockIdx.x} * Traits::kQueries * a.capacity) +
      warp * kOwn * a.capacity;
  int64_t met = 0;
  int64_t const items = a.rows.tiles * a.spans;
  for (int64_t round = 0; round * gridDim.x < items; ++round) {
    int64_t const number = item_number(round);
    if (number >= items) continue;
    Sight sight;
    Item const item = find_item<Traits>(a, number, sight);
    Candidates own[kOwn];
    int first[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      first[j] = __shfl_sync(kAll, sight.first, warp * kOwn + j);
      bool const sees = __shfl_sync(kAll, sight.count, warp * kOwn + j) > 0;
      own[j] = {lists + j * a.capacity, 0, sees ? NAN : INFINITY};
    }
    for (int i = 0; i <= item.tiles; ++i) {
      bool const last = i == item.tiles;
      if (!last) {
        int64_t const tile = met + i;
        int const slot = static_cast<int>(tile % Traits::kSlots);
        shared.score_full[slot].wait((tile / Traits::kSlots) & 1);
        float2 scores[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          scores[j] = *reinterpret_cast<float2 const*>(&shared.scores[slot][warp * kOwn + j][2 * lane]);
        }
        __syncwarp();
        if (lane == 0) shared.score_empty[slot].arrive();
        int const key = item.begin + i * kKeys + 2 * lane;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) own[j].append(scores[j], key - first[j]);
      }
      int const limit = last ? a.kept : a.capacity - kKeys;
      for (;;) {
        int full = -1;
        Candidates c;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          if (own[j].count <= limit) continue;
          full = j;
          c = own[j];
        }
        if (full < 0) break;
        cut(c, a.kept, last ? a.kept : a.kept + (a.capacity - a.kept) / 4, shared.bins[warp]);
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          if (j == full) own[j] = c;
        }
      }
    }
    met += item.tiles;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      int const q = warp * kOwn + j;
      if (q >= a.rows.tile_rows || item.query + q >= a.p.tokens) continue;
      int32_t* const out = a.p.indices + (item.batch * a.p.tokens + item.query + q) * a.p.topk;
      for (int64_t c = lane; c < a.p.topk; c += 32) {
        out[c] = c < own[j].count ? own[j].list[c].index : -1;
      }
    }
    __syncwarp();
  }
}

template <int kRegisters>
__device__ void set_registers() {
  if constexpr (kRegisters > kLaunchRegisters) {
    grow_registers<kRegisters>();
  } else {
    shrink_registers<kRegisters>();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    index_kernel(__grid_constant__ IndexLaunch const a, __grid_constant__ CUtensorMap const keys) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kStages; ++i) {
      shared.key_full[i].init(1);
      shared.key_empty[i].init(kWarpgroup / 32);
    }
    for (int i = 0; i < Traits::kSlots; ++i) {
      shared.score_full[i].init(kWarpgroup / 32);
      shared.score_empty[i].init(kSelectWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32 * kScoreWarps) {
    if constexpr (Traits::kSelect) set_registers<Traits::kScoreRegisters>();
    score<Traits>(a, keys, shared);
  } else if constexpr (Traits::kSelect) {
    set_registers<2 * kLaunchRegisters - Traits::kScoreRegisters>();
    select<Traits>(a, shared);
  }
}

}  // namespace lt2::dsa::sm90::indexer
