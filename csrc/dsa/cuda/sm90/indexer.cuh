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

inline constexpr int kScoreWarps = 8;        // two warpgroups
inline constexpr int kSelectWarps = 8;       // two warpgroups
inline constexpr int kKeys = 2 * kTileSide;  // of a step: a tile for each warpgroup that scores
// Registers of a thread, with as many warps that score as warps that select.
inline constexpr int kLaunchRegisters = 128;
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
  static constexpr int kStages = kSelect ? 2 : 4;  // steps
  static constexpr int kSlots = kQueries > 16 ? 2 : 3;
  static constexpr int kScoreRegisters = kHeads == 2 ? 120 : kHeads == 4 ? 152 : 160;
  static constexpr int kHalves = kDim / kTileSide;
  static constexpr int kTogether = kHeads == 4 ? 1 : kDim == kTileSide ? 4 : 2;  // steps, by registers

  struct alignas(1024) Shared {
    unsigned char keys[kStages][2][kHalves][kTileBytes];
    unsigned char queries[kHalves][kColumns * 128];
    float scores[kSelect ? kSlots : 1][kSelect ? kQueries : 1][kScoreStride];
    uint32_t bins[kSelect ? kSelectWarps : 1][kBins + 1];
    Sight sights[kQueries];
    int firsts[kQueries];  // first keys, for the warps that select
    Barrier key_full[kStages][2], key_empty[kStages][2], score_full[kSlots], score_empty[kSlots];
    Barrier judged;  // an item with a sample has passed: whether its keys have to pass again
    uint32_t again;  // number of the last item with a sample of which they have to
  };
};

struct IndexLaunch {
  IndexerParams p;
  ScoreRows rows;         // of the tiles; `scores` only where they are written
  int64_t spans, span;    // each tile's keys are cut into `spans` of `span` keys (1 where kSelect)
  int capacity, kept;     // of a query's candidates; min(topk, S)
  Candidate* candidates;  // [blocks, kQueries, capacity], null: in shared memory after Shared
  int stride;             // of samples
  // A cut takes so long that all others wait. So all warps cut their lists in the same steps, before they are
  // full: to `most`, in step `due` where all keys are candidates, later `growth` times as late.
  int most;
  float due, growth;
};

// One item of work: queries [query, ..) of a batch row, kKeys keys a step from `begin` on.
struct Item {
  int64_t batch, query, local_tile;
  int begin, steps;
  int inner_begin, inner_end;  // keys that all queries see that see any
};

inline constexpr int kStrides = 4;  // of samples: a.stride, and 2, 4, 8 times as much

struct KeyMaps {
  CUtensorMap all, sampled[kStrides];
};

// Keys key, key + stride, ..: rows `at`, at + 1, .. of a map.
struct Step {
  int key, stride, at;
};

// A sample of the keys, evenly spread, passes before all keys. It tells what a query's topk-th best score may
// be, so that fewer candidates are kept; if the guess was too high, all keys pass again without one.
struct Sample {
  int steps;  // 0: none
  int which, stride, first;

  __device__ Step step(int i) const {
    int const at = first + i * kKeys;
    return {at * stride, stride, at};
  }
};
template <class Traits>
__device__ Sample sample_of(IndexLaunch const& a, Item const& item) {
  constexpr int kLongest = 8;  // a sample is at most 1 / kLongest of all
  Sample sample{0, 0, a.stride, 0};
  if (!Traits::kSelect || int64_t{item.steps} * kKeys < kLongest * int64_t{a.kept}) return sample;
  int const keys = item.steps * kKeys, most = a.capacity / kKeys - 1;
  while (sample.which + 1 < kStrides && keys > most * kKeys * sample.stride) {
    ++sample.which;
    sample.stride *= 2;
  }
  sample.first = (item.begin + sample.stride - 1) / sample.stride;
  sample.steps = min(most, (keys / sample.stride + kKeys - 1) / kKeys);
  return sample;
}

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
  item.steps = high > low ? (high - low + kKeys - 1) / kKeys : 0;
  return item;
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

// max(x, low), NaN if x is.
__device__ __forceinline__ float at_least(float x, float low) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
  return y;
}

// A warpgroup's keys of a step, by one thread; `number` counts the steps of all items.
template <class Traits>
__device__ void load_keys(CUtensorMap const& map, Item const& item, int warpgroup, int at, uint32_t number,
                          typename Traits::Shared& shared) {
  uint32_t const stage = number % Traits::kStages;
  Barrier& full = shared.key_full[stage][warpgroup];
  shared.key_empty[stage][warpgroup].wait((number / Traits::kStages + 1) & 1);
  full.arrive_expecting(Traits::kHalves * kTileBytes);
  for (int half = 0; half < Traits::kHalves; ++half) {
    load_tile(shared.keys[stage][warpgroup][half], map, half * kTileSide, 0, at + warpgroup * kTileSide,
              static_cast<int>(item.batch), full);
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

// The products of a step are made in two parts of half the columns, so that one runs while the scores of the
// other are added up.
template <class Traits>
__device__ void score(IndexLaunch const& a, KeyMaps const& maps, typename Traits::Shared& shared) {
  using T = typename Traits::T;
  constexpr int kHeads = Traits::kHeads, kColumns = Traits::kColumns / 2, kGroups = Traits::kGroups / 2;
  int const thread = threadIdx.x, lane = thread % 32, warpgroup = thread / kWarpgroup;
  int const row = thread % (32 * kScoreWarps) / 32 * 16 + lane / 4, q4 = lane % 4;  // also row + 8
  int const heads = static_cast<int>(a.p.heads);
  float const least = a.p.relu ? 0.f : -INFINITY;
  bool const loads = thread % kWarpgroup == 0;
  uint32_t met = 0;  // steps of earlier items
  Turn<Traits::kStages> keys;
  Turn<Traits::kSlots> slots;
  [[maybe_unused]] uint32_t samples = 0;
  int64_t const items = a.rows.tiles * a.spans;
  for (int64_t round = 0; round * gridDim.x < items; ++round) {
    int64_t const number = item_number(round);
    if (number >= items) continue;
    Sight sight;
    Item const item = find_item<Traits>(a, number, sight);
    if (item.steps == 0) continue;
    Sample const sample = sample_of<Traits>(a, item);
    int passes = sample.steps + item.steps;
    auto const step_of = [&](int i) {
      if (i < sample.steps) return sample.step(i);
      i -= sample.steps;
      int const key = item.begin + (i < item.steps ? i : i - item.steps) * kKeys;
      return Step{key, 1, key};
    };
    auto const load = [&](int i) {
      if (!loads || i >= passes) return;
      CUtensorMap const& map = i < sample.steps ? maps.sampled[sample.which] : maps.all;
      load_keys<Traits>(map, item, warpgroup, step_of(i).at, met + i, shared);
    };
    for (int i = 0; i < Traits::kStages; ++i) load(i);
    __syncwarp();
    named_barrier(1, 32 * kScoreWarps);  // nobody reads the last item's queries any more
    if (thread < Traits::kQueries) shared.sights[thread] = sight;
    load_queries<Traits>(a, item, shared);
    float weights[2][kGroups][kHeads];
    auto const* const w = static_cast<float const*>(a.p.weights.data) + item.batch * a.p.weights.batch;
#pragma unroll
    for (int g = 0; g < 2 * kGroups; ++g) {
      int const t = 4 * g + q4;
      bool const valid = t < a.rows.tile_rows && item.query + t < a.p.tokens;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float const x = a.p.weights.data == nullptr ? 1.f
                        : valid && h < heads ? w[(item.query + t) * a.p.weights.token + h * a.p.weights.head]
                                             : 0.f;
        weights[g / kGroups][g % kGroups][h] = 0.5f * a.p.scale * x;
      }
    }
#pragma unroll
    for (int g = 0; g < 2 * kGroups; ++g) pin(weights[g / kGroups][g % kGroups]);  // not to be computed again
    fence_async_shared();
    named_barrier(1, 32 * kScoreWarps);

    float dots[2][kColumns / 2];
    auto const multiply = [&](int part, uint32_t stage) {
      wgmma_begin();
      uint64_t const keys = k_major(shared.keys[stage][warpgroup]);
      uint64_t const queries = k_major(shared.queries) + part * (kColumns * 128 >> 4);
#pragma unroll
      for (int k = 0; k < Traits::kDim / 16; ++k) {
        wgmma<T, kColumns>(dots[part], keys + k_step(k), queries + k_step<2 * kColumns * 128>(k), k > 0);
      }
      wgmma_commit();
    };
    // Keys first, first + stride, ..
    auto const finish = [&](int part, int first, int stride, uint32_t slot) {
      // Twice relu(x) is x + |x|, which takes no turn of the pipe for comparisons.
      float scores[kGroups][2] = {}, sum = 0.f;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float const x = dots[part][4 * (g * kHeads / 2 + h / 2) + 2 * r + h % 2];
            scores[g][r] = fmaf(weights[part][g][h], x + fabsf(x), scores[g][r]);
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) sum += scores[g][0] + scores[g][1];
      if (!a.p.relu || !(fabsf(sum) < INFINITY)) {  // linear, or something is infinite or NaN
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            scores[g][r] = 0.f;
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
              float const x = dots[part][4 * (g * kHeads / 2 + h / 2) + 2 * r + h % 2];
              float weight = weights[part][g][h];
              asm volatile("" : "+f"(weight));  // not to be doubled before the loop
              if (h < heads) scores[g][r] = fmaf(2.f * weight, at_least(x, least), scores[g][r]);
            }
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        scores[g][0] += 0.f;  // no -0
        scores[g][1] += 0.f;
      }
      int const key = first + row * stride, next = key + 8 * stride;
      if constexpr (Traits::kSelect) {
        if (first < item.inner_begin || first + kKeys * stride > item.inner_end) {
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            Sight const s = shared.sights[4 * (part * kGroups + g) + q4];
            if (key < s.first || key >= s.first + s.count) scores[g][0] = NAN;
            if (next < s.first || next >= s.first + s.count) scores[g][1] = NAN;
          }
        }
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          float* const out = shared.scores[slot][4 * (part * kGroups + g) + q4] + row;
          out[0] = scores[g][0];
          out[8] = scores[g][1];
        }
      } else {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          int const t = 4 * (part * kGroups + g) + q4;
          Sight const s = shared.sights[t];
          int const at = key - s.first;
          float* const out = a.rows.scores + (item.local_tile * a.rows.tile_rows + t) * a.rows.stride;
          if (at >= 0 && at < s.count) out[at] = scores[g][0];
          if (at + 8 >= 0 && at + 8 < s.count) out[at + 8] = scores[g][1];
        }
      }
    };

    // Products of the next part are under way while those of one are added up, but not beyond `count` steps:
    // around a loop ptxas would wait for them.
    int i = 0;
    auto const take = [&](auto count, int first, int stride) {
      shared.key_full[keys.at][warpgroup].wait(keys.phase);
      multiply(0, keys.at);
      multiply(1, keys.at);
#pragma unroll
      for (int j = 0; j < count; ++j) {
        auto next = keys;
        next.advance();
        if constexpr (Traits::kSelect) shared.score_empty[slots.at].wait(slots.phase ^ 1);
        wgmma_wait<1>();
        pin(dots[0]);
        finish(0, first, stride, slots.at);
        if (j + 1 < count) {
          shared.key_full[next.at][warpgroup].wait(next.phase);
          multiply(0, next.at);
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();
        }
        pin(dots[1]);
        if (lane == 0) shared.key_empty[keys.at][warpgroup].arrive();
        finish(1, first, stride, slots.at);
        if constexpr (Traits::kSelect) {
          __syncwarp();
          if (lane == 0) shared.score_full[slots.at].arrive();
        }
        if (j + 1 < count) multiply(1, next.at);
        load(i + Traits::kStages);
        __syncwarp();
        keys = next;
        slots.advance();
        ++i;
        first += kKeys * stride;
      }
    };
    // A sample, all keys, all keys again.
#pragma unroll 1
    for (int pass = sample.steps > 0 ? 0 : 1; pass < 3; ++pass) {
      int const end = i + (pass == 0 ? sample.steps : item.steps), stride = pass == 0 ? sample.stride : 1;
      int first = pass == 0 ? sample.first * sample.stride : item.begin;
      if (pass == 2) {
        if (!Traits::kSelect || sample.steps == 0) break;
        shared.judged.wait(samples++ & 1);
        if (*static_cast<uint32_t volatile*>(&shared.again) != samples) break;
        passes += item.steps;
        for (int j = 0; j < Traits::kStages; ++j) load(i + j);
        __syncwarp();
      }
      constexpr int kTogether = Traits::kTogether;
#pragma unroll 1
      for (; i + kTogether <= end; first += kTogether * kKeys * stride)
        take(std::integral_constant<int, kTogether>{}, first, stride);
#pragma unroll 1
      for (; i < end; first += kKeys * stride) take(std::integral_constant<int, 1>{}, first, stride);
    }
    met += passes;
  }
}

// Of a sample that has `expected` of the topk best, so many may be among them.
__device__ __forceinline__ float guessed_rank(float expected) {
  return expected + 4.f * sqrtf(expected) + 4.f;
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
  uint32_t met = 0, samples = 0;
  int64_t const items = a.rows.tiles * a.spans;
  for (int64_t round = 0; round * gridDim.x < items; ++round) {
    int64_t const number = item_number(round);
    if (number >= items) continue;
    Sight sight;
    Item const item = find_item<Traits>(a, number, sight);
    Sample const sample = sample_of<Traits>(a, item);
    int counts[kOwn];
    float least[kOwn];
    uint32_t guessed = 0;  // bits of queries
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      bool const sees = __shfl_sync(kAll, sight.count, warp * kOwn + j) > 0;
      counts[j] = 0;
      least[j] = sees ? -INFINITY : NAN;
    }
    auto const list_of = [&](int j) { return Candidates{lists + j * a.capacity, counts[j], least[j]}; };
    __syncwarp();
    if (lane / kOwn == warp) shared.firsts[lane] = sight.first;
    __syncwarp();
    auto const append = [&](int begin) {
      uint32_t const now = met++, slot = now % Traits::kSlots;
      shared.score_full[slot].wait((now / Traits::kSlots) & 1);
      float4 scores[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        scores[j] = *reinterpret_cast<float4 const*>(&shared.scores[slot][warp * kOwn + j][4 * lane]);
      }
      int const key = begin + 4 * lane;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        Candidates c = list_of(j);
        c.append(scores[j], key - shared.firsts[warp * kOwn + j]);
        counts[j] = c.count;
      }
      // Now that all lanes have compared their scores: an arrival overtakes loads that are under way.
      __syncwarp();
      if (lane == 0) shared.score_empty[slot].arrive();
    };
    auto const cut_to = [&](int limit, int most) {
      for (;;) {
        int full = -1;
        Candidates c;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          if (counts[j] <= limit) continue;
          full = j;
          c = list_of(j);
        }
        if (full < 0) break;
        cut(c, a.kept, most, shared.bins[warp]);
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          if (j == full) counts[j] = c.count, least[j] = c.least;
        }
      }
    };
    for (int i = 0; i < sample.steps; ++i) append(0);
    if (sample.steps > 0) {
#pragma unroll 1
      for (int turn = 0; turn < kOwn; ++turn) {
        Candidates c;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          if (j == turn) c = list_of(j);
        }
        // As many of the sample are expected among the topk best, and more for safety.
        int const seen = __shfl_sync(kAll, sight.count, warp * kOwn + turn);
        float const expected = static_cast<float>(a.kept) * c.count / max(seen, 1);
        int const rank = static_cast<int>(guessed_rank(expected)), most = rank + rank / 4;
        __syncwarp();
        if (most < c.count) {
          c.least = portable::score_of(find_bound(c.list, c.count, rank, most, shared.bins[warp]).low);
          guessed |= 1u << turn;
        }
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          if (j == turn) counts[j] = 0, least[j] = c.least;
        }
      }
    }
    float due = a.due;
    if (sample.steps > 0) {
      float const stride = static_cast<float>(sample.stride);
      due *= kKeys * item.steps / (stride * guessed_rank(a.kept / stride));
    }
    for (bool is_last = sample.steps == 0;; is_last = true) {
      for (int step = 0; step < item.steps; ++step) {
        append(item.begin + step * kKeys);
        bool const is_due = step >= due;
        if (is_due) due *= a.growth;
        cut_to(is_due ? a.most : a.capacity - kKeys, a.most);
      }
      if (is_last) break;
      uint32_t failed = 0;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) failed |= counts[j] < a.kept ? guessed & (1u << j) : 0;
      ++samples;
      if (lane == 0) {
        if (failed != 0) *static_cast<uint32_t volatile*>(&shared.again) = samples;
        shared.judged.arrive();
      }
      __syncwarp();
      shared.judged.wait((samples - 1) & 1);
      bool const anew = *static_cast<uint32_t volatile*>(&shared.again) == samples;
      named_barrier(2, 32 * kSelectWarps);  // all have looked before one may say it of the next item
      if (!anew) break;
      cut_to(a.most, a.most);  // a later cut would raise their bounds from NaN
      due = a.due;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        bool const emptied = failed >> j & 1;
        least[j] = emptied ? -INFINITY : NAN;
        if (emptied) counts[j] = 0;
      }
    }
    cut_to(a.kept, a.kept);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      int const q = warp * kOwn + j;
      if (q >= a.rows.tile_rows || item.query + q >= a.p.tokens) continue;
      int32_t* const out = a.p.indices + (item.batch * a.p.tokens + item.query + q) * a.p.topk;
      for (int64_t c = lane; c < a.p.topk; c += 32) {
        out[c] = c < counts[j] ? lists[j * a.capacity + c].index : -1;
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
    index_kernel(__grid_constant__ IndexLaunch const a, __grid_constant__ KeyMaps const maps) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(bytes);
  if (threadIdx.x == 0) {
    shared.judged.init(kSelectWarps);
    shared.again = 0;
    for (int i = 0; i < Traits::kStages; ++i) {
      for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
        shared.key_full[i][warpgroup].init(1);
        shared.key_empty[i][warpgroup].init(kWarpgroup / 32);
      }
    }
    for (int i = 0; i < Traits::kSlots; ++i) {
      shared.score_full[i].init(kScoreWarps);
      shared.score_empty[i].init(kSelectWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32 * kScoreWarps) {
    if constexpr (Traits::kSelect) set_registers<Traits::kScoreRegisters>();
    score<Traits>(a, maps, shared);
  } else if constexpr (Traits::kSelect) {
    set_registers<2 * kLaunchRegisters - Traits::kScoreRegisters>();
    select<Traits>(a, shared);
  }
}

}  // namespace lt2::dsa::sm90::indexer
