// Scores by wgmma, and selection as they come: the lanes that have them append those that may be among the
// best to their query's list.
#pragma once

#include "dsa/cuda/sm90/candidates.cuh"
#include "dsa/cuda/sm90/indexer.cuh"

namespace lt2::dsa::sm90::indexer {

inline constexpr int kTurns = 2;        // the first of the named barriers that give turns to warpgroups
inline constexpr int kStrides = 4;      // of samples: a.stride, and 2, 4, 8 times as much
inline constexpr int kSpareRoom = 48;   // of a list at least, that should not be needed
inline constexpr int kMostUnmet = 256;  // between meetings: counts have 16 bits
inline constexpr int kBeyond = 2;       // candidates behind a list's end: what comes too late is stored there

struct KeyMaps {
  CUtensorMap all, sampled[kStrides];
};

struct SelectLaunch {
  IndexerParams p;
  ScoreRows rows;            // of the tiles
  int capacity, kept, most;  // of a list; min(topk, S); after a cut before the end
  Candidate* lists;          // [blocks, kQueries, capacity + kBeyond], null: in shared memory after Shared
  int stride;                // of samples
};

// Queries of one tile and all keys that they see; those with most keys are the first items.
__device__ inline Item find_item(SelectLaunch const& a, uint32_t number, Sight& own) {
  auto const batches = static_cast<uint32_t>(a.p.batch);
  int64_t const query = (a.rows.row_tiles - 1 - number / batches) * a.rows.tile_rows;
  return find_item(a.p, a.rows, number % batches, query, 0, INT32_MAX, own);
}

// A sample of the keys, evenly spread, passes before all keys. It tells what a query's topk-th best score may
// be, so that fewer candidates are kept; if the guess was too high, all keys pass again without one.
struct Sample {
  int steps;                 // 0: none
  int which, stride, first;  // of the maps; first: row of the map
};
__device__ inline Sample sample_of(SelectLaunch const& a, Item const& item) {
  Sample sample{0, 0, a.stride, 0};
  int const keys = item.steps * kKeys, most = a.capacity / kKeys - 1;
  if (keys <= a.capacity) return sample;
  while (sample.which + 1 < kStrides && keys > most * kKeys * sample.stride) {
    ++sample.which;
    sample.stride *= 2;
  }
  sample.first = (item.begin + sample.stride - 1) / sample.stride;
  sample.steps = min(most, (keys / sample.stride + kKeys - 1) / kKeys);
  return sample;
}

struct Job {  // a tile
  Item item;
  Sample sample;
};

template <class T>
__device__ __forceinline__ T read(T const& x) {
  return *static_cast<T const volatile*>(&x);
}
__device__ __forceinline__ void red_max(int* to, int x) {
  asm volatile("red.shared.max.s32 [%0], %1;" ::"r"(shared_address(to)), "r"(x) : "memory");
}

// Counts of two queries of a lane are in one word, so that one atomic addition gets room in both lists.
__device__ constexpr int count_at(int q) { return q / 8 * 8 + q % 4 * 2 + q / 4 % 2; }
// kListsHere: lists are in shared memory, as the compiler knows; else they may be.
template <class T, int kDim_, int kHeads_, bool kListsHere_ = false>
struct SelectTraits : TileTraits<T, kDim_, kHeads_> {
  static constexpr bool kListsHere = kListsHere_;
  using Tile = TileTraits<T, kDim_, kHeads_>;
  static constexpr int kTiles = 2;  // a warpgroup has 64 keys of a step, a part of the columns
  static constexpr int kScoreThreads = Tile::kParts * kTiles * kWarpgroup, kScoreWarps = kScoreThreads / 32;
  static constexpr int kThreads = kScoreThreads + kWarpgroup;  // and a warp that loads keys
  static constexpr int kScoreRegisters = 112, kLoadRegisters = 32;
  static constexpr int kStages = kDim_ == 64 && kHeads_ != 8 ? 4 : 3;

  struct alignas(1024) Shared {
    unsigned char keys[kStages][kTiles][Tile::kHalves][kTileBytes];
    unsigned char queries[Tile::kHalves][Tile::kColumns * 128];
    uint32_t bins[kScoreWarps][kBins + 4];
    uint32_t nobody[32];  // counts of lanes that append nothing, so that there is no branch
    Job job, next;
    Sight sights[Tile::kQueries], next_sights[Tile::kQueries];
    uint16_t counts[Tile::kQueries];  // of the lists, at count_at(query)
    float bounds[Tile::kQueries];     // scores from here on are wanted
    int fullest[2];                   // the longest list's count, as known at meetings in turn
    int growth;                       // of the lists in a step, three times what is expected
    uint32_t lost;                    // queries whose lists grew faster and were too short
    Barrier key_full[kStages], key_empty[kStages];
    Barrier next_full, next_empty;
    Barrier judged;  // an item has passed: whether its keys have to pass again
    uint32_t again;  // number of the last item of which they have to, from 1 on
  };
};

// What load_queries and load_weights are going to read, to the L2 cache.
template <class Traits>
__device__ __forceinline__ void prefetch_queries(IndexerParams const& p, Item const& item) {
  auto const prefetch = [](void const* x) { asm volatile("prefetch.global.L2 [%0];" ::"l"(x)); };
  auto const* const q = static_cast<typename Traits::T const*>(p.q.data) + item.batch * p.q.batch;
  auto const* const w = static_cast<float const*>(p.weights.data) + item.batch * p.weights.batch;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < Traits::kQueries * Traits::kHeads; i += 32) {
    int64_t const t = item.query + i / Traits::kHeads, h = i % Traits::kHeads;
    if (t >= p.tokens || h >= p.heads) continue;
    for (int d = 0; d < Traits::kDim; d += 64) prefetch(q + t * p.q.token + h * p.q.head + d);
    if (p.weights.data != nullptr && h == 0) prefetch(w + t * p.weights.token);
  }
}

// Says what the next tile is, and loads the keys of its steps, by one thread.
template <class Traits>
__device__ void load_keys(SelectLaunch const& a, KeyMaps const& maps, typename Traits::Shared& shared) {
  Turn<Traits::kStages> keys;
  for (uint32_t round = 0; int64_t{round} * gridDim.x < a.rows.tiles; ++round) {
    int64_t const number = item_number(round);
    if (number >= a.rows.tiles) continue;
    shared.next_empty.wait(round % 2 ^ 1);
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane), "+r"(round));  // what follows from them is not worth registers
    {
      Sight sight;
      Item const found = find_item(a, number, sight);
      if (lane < Traits::kQueries) shared.next_sights[lane] = sight;
      if (lane == 0) shared.next = {found, sample_of(a, found)};
    }
    __syncwarp();
    if (lane == 0) shared.next_full.arrive();
    Item const& item = shared.next.item;
    Sample const& sample = shared.next.sample;
    prefetch_queries<Traits>(a.p, item);
    auto const load = [&](CUtensorMap const& map, int at, int steps) {
      for (int i = 0; i < steps; ++i, at += kKeys) {
        Barrier& full = shared.key_full[keys.at];
        shared.key_empty[keys.at].wait(keys.phase ^ 1);
        full.arrive_expecting(Traits::kTiles * Traits::kHalves * kTileBytes);
        for (int tile = 0; tile < Traits::kTiles; ++tile) {
          for (int half = 0; half < Traits::kHalves; ++half) {
            load_tile(shared.keys[keys.at][tile][half], map, half * kTileSide, 0, at + tile * kTileSide,
                      static_cast<int>(item.batch), full);
          }
        }
        keys.advance();
      }
    };
    if (lane == 0) {
      if (sample.steps > 0) load(maps.sampled[sample.which], sample.first, sample.steps);
      load(maps.all, item.begin, item.steps);
      if (sample.steps > 0) {
        // Not taken for the item before, which has judged already: with a sample there are more than 4 steps,
        // so this item's first keys have left their places.
        static_assert(Traits::kStages <= 4);
        shared.judged.wait(round % 2);
        if (read(shared.again) == round + 1) load(maps.all, item.begin, item.steps);
      }
    }
    __syncwarp();
  }
}

template <class Traits>
__device__ void select(SelectLaunch const& a, typename Traits::Shared& shared) {
  constexpr int kGroups = Traits::kGroups, kQueries = Traits::kQueries, kPairs = (kGroups + 1) / 2;
  int const thread = threadIdx.x, lane = thread % 32;
  int const warp = __shfl_sync(kAll, thread / 32, 0);
  int const warpgroup = warp / 4, next_warpgroup = (warpgroup + 1) % (Traits::kScoreWarps / 4);
  int const tile = warpgroup % Traits::kTiles, part = warpgroup / Traits::kTiles;
  int const row = tile * kTileSide + warp % 4 * 16 + lane / 4;  // also row + 8
  int const own = part * 4 * kGroups + lane % 4;                // query of group 0
  auto const shift = [&](int g) { return kGroups == 1 ? 16 * part : 16 * (g % 2); };
  auto const meet = [] { named_barrier(1, Traits::kScoreThreads); };
  auto const uniform = [](int x) { return __shfl_sync(kAll, x, 0); };  // which ptxas may know
  auto* const here = reinterpret_cast<Candidate*>(&shared + 1);
  Candidate* const lists = Traits::kListsHere || a.lists == nullptr
                               ? here
                               : a.lists + int64_t{blockIdx.x} * kQueries * (a.capacity + kBeyond);
  auto const list_of = [&](int q) { return lists + q * (a.capacity + kBeyond); };
  // Where to append: an address in shared memory, or an index.
  uint32_t begin[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    uint32_t const at = (own + 4 * g) * (a.capacity + kBeyond);
    begin[g] = Traits::kListsHere ? shared_address(here + at) : at;
    asm volatile("" : "+r"(begin[g]));  // not to be computed again
  }
  auto const append_if = [&](bool condition, uint32_t to, Candidate x) {
    if constexpr (Traits::kListsHere) {
      store_if(condition, to, x);
    } else {
      store_if(condition, lists + to, x);
    }
  };
  constexpr uint32_t kOne = Traits::kListsHere ? sizeof(Candidate) : 1;
  uint32_t const counter = shared_address(&shared.counts[count_at(own) & ~1]);
  uint32_t const nobody = shared_address(&shared.nobody[lane]);
  Turn<Traits::kStages> keys;
  auto const pass_turn = [&] { arrive_at_named_barrier(kTurns + next_warpgroup, 2 * kWarpgroup); };
  if (next_warpgroup == 0) pass_turn();
  bool careful = false;  // lists grew faster than the sample said
  for (uint32_t round = 0; int64_t{round} * gridDim.x < a.rows.tiles; ++round) {
    if (item_number(round) >= a.rows.tiles) continue;
    asm volatile("" : "+r"(round));  // what follows from it is not worth registers
    meet();                          // nobody reads what belongs to the last item any more
    if (warp == 0) {
      shared.next_full.wait(round % 2);
      if (lane < kQueries) {
        Sight const sight = shared.next_sights[lane];
        shared.sights[lane] = sight;
        shared.counts[count_at(lane)] = 0;
        shared.bounds[lane] = sight.count > 0 ? -INFINITY : NAN;
      }
      if (lane < 2) shared.fullest[lane] = 0;
      if (lane == 0) {
        shared.growth = shared.lost = 0;
        shared.job = shared.next;
      }
      __syncwarp();
      if (lane == 0) shared.next_empty.arrive();
    }
    meet();
    Item const& item = shared.job.item;
    Sample const& sample = shared.job.sample;
    load_queries<Traits, Traits::kScoreThreads>(a.p, a.rows, item, shared.queries);
    typename Traits::Weights weights;
    load_weights<Traits>(a.p, a.rows, item, own, weights);
    fence_async_shared();
    meet();

    int const inner_begin = item.inner_begin, inner_end = item.inner_end;
    typename Traits::Dots dots;
    float least[kGroups];
    // The products of a step.
    auto const start = [&] {
      shared.key_full[keys.at].wait(keys.phase);
      multiply<Traits>(shared.keys[keys.at][tile], shared.queries, part, dots);
    };
    // A started step, keys first, first + stride, .., and the start of the next one if there are more.
    auto const take = [&](int first, int stride, auto more) {
      wgmma_wait<0>();
      pin(dots);
      if (lane == 0) shared.key_empty[keys.at].arrive();
      keys.advance();
      typename Traits::Scores scores;
      // Next products start one after the other, a little apart: of all at once no other work would be
      // beside.
      add_heads<Traits>(a.p, dots, weights, scores, [&] {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) pin(scores[g]);
        named_barrier(kTurns + warpgroup, 2 * kWarpgroup);
      });
#pragma unroll
      for (int g = 0; g < kGroups; ++g) pin(scores[g]);
      pass_turn();
      int const key = first + row * stride, next = key + 8 * stride;
      if (first < inner_begin || first + kKeys * stride > inner_end) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          Sight const s = shared.sights[own + 4 * g];
          if (key < s.first || key >= s.first + s.count) scores[g][0] = NAN;
          if (next < s.first || next >= s.first + s.count) scores[g][1] = NAN;
        }
      }
      if constexpr (more) start();
      bool wanted[kGroups][2];
      uint32_t at[kPairs];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        uint32_t n = 0;
#pragma unroll
        for (int g = 2 * pair; g < min(kGroups, 2 * pair + 2); ++g) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            wanted[g][r] = scores[g][r] >= least[g];  // NaN is not
            n += wanted[g][r] ? 1 << shift(g) : 0;
          }
        }
        at[pair] = reserve(n != 0 ? counter + 16 * pair : nobody, n);
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        uint32_t const position = static_cast<uint16_t>(at[g / 2] >> shift(g));
        uint32_t const to = begin[g] + kOne * min(position, static_cast<uint32_t>(a.capacity));
        append_if(wanted[g][0], to, {scores[g][0], key});
        append_if(wanted[g][1], to + (wanted[g][0] ? kOne : 0), {scores[g][1], next});
      }
    };
    // All meet, and know how long the longest list is.
    uint32_t turn = 0;
    auto const fullest = [&] {
      __syncwarp();
      int const count = __reduce_max_sync(kAll, lane < kQueries ? int{read(shared.counts[lane])} : 0);
      if (lane == 0) red_max(&shared.fullest[turn], count);
      meet();
      int const longest = uniform(read(shared.fullest[turn]));
      turn ^= 1;
      return longest;
    };

    // A sample passes, all keys, and if the bound of some queries was too high all keys for these.
    enum { kSample, kKeysOfAll, kAgain };
    unsigned failed = 0;
    float growth = INFINITY;
    int const all_steps = uniform(item.steps), sample_steps = uniform(sample.steps);
    int pass = sample_steps > 0 ? kSample : kKeysOfAll;
    bool more;
    do {
      bool const sampled = pass == kSample;
      int const stride = sampled ? sample.stride : 1;
      int first = sampled ? sample.first * stride : item.begin, steps = sampled ? sample_steps : all_steps;
      int count = 0;                       // of the longest list
      int reach = 2 * a.capacity / kKeys;  // of a guess, as it has been right
      bool last;
      do {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) least[g] = read(shared.bounds[own + 4 * g]);
        // Until the longest list may be full, or is likely to be.
        auto const steps_to_take = [&] {
          int const room = a.capacity - count, sure = room / kKeys;
          int const likely = static_cast<int>(__fdividef(room - kSpareRoom, growth));
          return min(steps, pass == kKeysOfAll ? max(sure, min(reach, likely)) : sure);
        };
        for (int now = steps_to_take(); now > 0; now = steps_to_take()) {
          steps -= now;
          // The last step without a branch: ptxas would wait for each product.
          start();
#pragma unroll 1
          for (int i = now - 1; i > 0; --i, first += kKeys * stride) take(first, stride, std::true_type{});
          take(first, stride, std::false_type{});
          first += kKeys * stride;
          int const before = count;
          count = fullest();
          growth = fmaxf(growth, __fdividef(2.f * (count - before), now));
          reach = min(2 * reach, kMostUnmet);
        }
        last = steps == 0;
        if (pass == kKeysOfAll && last) {
          bool const guessed = lane < kQueries && read(shared.bounds[lane]) > -INFINITY;
          int const found = read(shared.counts[count_at(lane % kQueries)]);
          unsigned const lost = __ballot_sync(kAll, found > a.capacity) | read(shared.lost);
          careful |= lost != 0;
          failed = __ballot_sync(kAll, guessed && found < a.kept) | lost;
          if (thread == 0) {
            if (failed != 0) shared.again = round + 1;
            shared.judged.arrive();
          }
        }
        meet();
        if (thread < 2) shared.fullest[thread] = 0;
        for (int q = warp; q < kQueries; q += Traits::kScoreWarps) {
          int const count = read(shared.counts[count_at(q)]);
          int k = a.kept, most = last ? a.kept : a.most;
          if (sampled) {
            // As many of the sample are expected among the topk best, and more for safety.
            float const expected = static_cast<float>(a.kept) * count / max(shared.sights[q].count, 1);
            k = static_cast<int>(expected + 4.f * sqrtf(expected) + 4.f);
            most = k + k / 4;
          }
          int left = sampled ? 0 : count;
          if (sampled && lane == 0) red_max(&shared.growth, 3 * kKeys * k / max(count, 1) + 1);
          if (count > a.capacity) {
            left = 0;
            if (lane == 0) shared.bounds[q] = NAN, atomicOr(&shared.lost, 1u << q);
          } else if (count > most) {
            Bound bound = find_bound(list_of(q), count, k, most, shared.bins[warp]);
            if (!sampled) left = keep<Traits::kListsHere>(list_of(q), count, bound, shared.bins[warp]);
            if (lane == 0) shared.bounds[q] = bound.score;
          }
          __syncwarp();
          if (lane == 0) shared.counts[count_at(q)] = left;
        }
        meet();
        count = a.most;
      } while (!last);
      more = sampled || (pass == kKeysOfAll && failed != 0);
      if (sampled) {
        if (!careful) growth = uniform(read(shared.growth));
      } else if (more) {
        for (int q = warp; q < kQueries; q += Traits::kScoreWarps) {
          bool const empty = failed >> q & 1;
          if (lane == 0) shared.bounds[q] = empty ? -INFINITY : NAN;
          if (lane == 0 && empty) shared.counts[count_at(q)] = 0;
        }
        meet();
      }
      ++pass;
    } while (more);
    __syncwarp();
    for (int q = warp; q < kQueries; q += Traits::kScoreWarps) {
      if (q >= a.rows.tile_rows || item.query + q >= a.p.tokens) continue;
      Candidate* const list = list_of(q);
      int const count = read(shared.counts[count_at(q)]);
      Sight const s = shared.sights[q];
      int32_t* const out = a.p.indices + (item.batch * a.p.tokens + item.query + q) * a.p.topk;
      // Behind the candidates there is room for what is sorted and for bits; in memory neither is worth it.
      int32_t* const sorted = Traits::kListsHere ? reinterpret_cast<int32_t*>(list + a.kept) : out;
      constexpr int kSpare = sizeof(shared.queries) / Traits::kScoreWarps;
      int const behind = a.kept + (a.kept + 1) / 2;
      auto* const words = Traits::kListsHere ? reinterpret_cast<uint64_t*>(list + behind)
                                             : reinterpret_cast<uint64_t*>(shared.queries[0] + warp * kSpare);
      int const bytes =
          Traits::kListsHere ? (a.capacity - behind) * static_cast<int>(sizeof(Candidate)) : kSpare;
      int const most = min(bytes / 256, 16), per_lane = most > 4 ? (most - 1) | 1 : most;  // by banks
      sort_indices(list, count, s.first, s.first + s.count, words, per_lane, shared.bins[warp], sorted);
      for (int64_t i = lane; i < a.p.topk; i += 32) {
        if (Traits::kListsHere || i >= count) out[i] = i < count ? sorted[i] : -1;
      }
      __syncwarp();
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    select_kernel(__grid_constant__ SelectLaunch const a, __grid_constant__ KeyMaps const maps) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(bytes);
  if (threadIdx.x == 0) {
    shared.judged.init(1);
    shared.next_full.init(1);
    shared.next_empty.init(1);
    shared.again = 0;
    for (int i = 0; i < Traits::kStages; ++i) {
      shared.key_full[i].init(1);
      shared.key_empty[i].init(Traits::kScoreWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < Traits::kScoreThreads) {
    grow_registers<Traits::kScoreRegisters>();
    select<Traits>(a, shared);
  } else {
    shrink_registers<Traits::kLoadRegisters>();
    if (threadIdx.x < Traits::kScoreThreads + 32) load_keys<Traits>(a, maps, shared);
  }
}

}  // namespace lt2::dsa::sm90::indexer
