// A step of decoding: the keys that one query sees, scored and selected from in one launch. A cluster of
// blocks has a query, each block a slice of its keys, whose scores stay in shared memory: the topk-th best is
// found in histograms. Scores are the same sums in the same order as in indexer.cuh.
//
// A block sends to the others what they need of it and waits for what it needs of them, which takes half the
// time of a barrier of the cluster and reads behind it. Nearly all instructions run once, out of a cold
// cache: short code is fast code.
//
// Where queries and keys have yet to be rotated (IndexerStepParams) the keys that are there already are on
// their way before the kernel waits for the one before; the new key replaces its row in shared memory.
#pragma once

#include <type_traits>

#include "block_ops/cuda/portable/rope_cache.cuh"
#include "common/cuda/cluster.cuh"
#include "common/cuda/overlap.cuh"
#include "dsa/cuda/sm90/indexer.cuh"
#include "dsa/indexer_step.h"

namespace lt2::dsa::sm90::indexer {

inline constexpr int kStepBins = 2048, kBinsTogether = kStepBins / 32;
inline constexpr int kMostStepBlocks = 8;  // of a query
inline constexpr int kMostSteps = 8;       // under way in a block
inline constexpr int kStepKeys = 128;      // of a warpgroup
inline constexpr int kLaneKeys = 8;        // of a lane at a time, when it selects

// kHeads: HI, padded to 8 or 16.
template <class T_, int kDim_, int kHeads_, int kGroups_>
struct StepTraits {
  using T = T_;
  static constexpr int kGroups = kGroups_, kThreads = kGroups * kWarpgroup, kWarps = kThreads / 32;
  static constexpr int kMostStages = kMostSteps / kGroups, kFinalists = kThreads;
  static constexpr int kDim = kDim_, kHeads = kHeads_;
  static constexpr int kHalves = kDim / kTileSide, kSideBytes = kHalves * kTileBytes;  // of 64 keys
  static constexpr int kKeyBytes = kStepKeys / kTileSide * kSideBytes;                 // of a step
  static constexpr int kRow = kHeads + 4;                                              // floats

  struct alignas(1024) Shared {
    unsigned char queries[kHalves][kHeads * 128];
    alignas(16) unsigned char fresh[2 * kDim];  // the new key
    alignas(16) float weights[kHeads];
    alignas(16) uint32_t bins[2][kStepBins];
    int coarse[2][32];  // sums of bins
    Barrier full[kGroups][kMostStages], empty[kGroups][kMostStages];
    // What the blocks of the cluster sent, and their barriers.
    uint2 firsts[kMostStepBlocks][kWarps];  // least and greatest of each warp's first scores
    int together[kMostStepBlocks][32];      // coarse[0]
    uint2 fine[kMostStepBlocks][kBinsTogether / 2];
    Barrier firsts_sent, together_sent, fine_sent, finalists_sent;
    uint32_t low, high;  // of the block's scores
    int better[kWarps], equal[kWarps];
    uint32_t bin;
    int above, size, total;
    union {
      alignas(16) float dots[kWarps][32][kRow];  // of the keys of a warp
      uint2 finalists[kFinalists];               // of all blocks, in the bin of the topk-th best: order, key
    };
    int finalist_count;
    uint32_t floor;
    int equals;
    // then keys [warpgroups, stages], and orders of the scores of the block's keys
  };
};

// Bins of equal width from a score on; what is below or beyond them is in the first or last.
struct BinRange {
  float least, inverse;
  bool valid;

  // Of scores of which some are from `low` to `high`.
  __device__ BinRange(uint32_t low, uint32_t high) : least(portable::score_of(low)) {
    constexpr float kMore = 1.25f;  // than these
    float const width = portable::score_of(high) - least;
    inverse = __fdividef(kStepBins / kMore, width);
    valid = low < high && width < INFINITY && inverse < INFINITY;
  }
  __device__ int bin_of(uint32_t order) const {
    return min(max(static_cast<int>((portable::score_of(order) - least) * inverse), 0), kStepBins - 1);
  }
};

// As send(), also where there is but one block, which is no cluster.
template <class T>
__device__ __forceinline__ void deliver(T* to, T const& x, Barrier& sent, int rank, int blocks) {
  if (blocks > 1) {
    send(to, x, sent, rank);
  } else {
    *to = x;
  }
}
// All threads of the block call it once.
__device__ __forceinline__ void await_delivery(Barrier& sent, int blocks) {
  if (blocks > 1) {
    sent.wait(0);
  } else {
    __syncthreads();
  }
}

template <class Params>
inline constexpr bool kRotates = std::is_same_v<Params, IndexerStepParams>;

// The row's queries to shared memory as the operand of products, and its new key, both rotated.
template <class Traits>
__device__ __forceinline__ void rotate_queries(IndexerStepParams const& p, int64_t batch, int64_t slot,
                                               typename Traits::Shared& shared, int rank) {
  using T = typename Traits::T;
  using Row = RowOf<T, 8>;
  constexpr int kHeads = Traits::kHeads, kPieces = Traits::kDim / 16, kKey = kHeads;  // of a half of a head
  static_assert((kHeads + 1) * kPieces <= Traits::kThreads);
  int const h = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, c = 8 * piece;
  bool const mine = h <= kHeads, there = h < p.heads || h == kKey;
  float cos[8], sin[8];
  if (mine) {
    load_floats(cos, p.index.cos + batch * p.index.angle_row + c);
    load_floats(sin, p.index.sin + batch * p.index.angle_row + c);
  }
  int64_t const place = p.index.places[batch];
  wait_for_previous_kernel();
  if (!mine) return;
  auto const* const from = h == kKey ? static_cast<T const*>(p.index.k.data) + batch * p.index.k.row
                                     : static_cast<T const*>(p.q.data) + batch * p.q.batch + h * p.q.head;
  Row first = Row::zero(), second = Row::zero();
  if (there) {
    first = Row::load(from + c);
    second = Row::load(from + c + Traits::kDim / 2);
    block_ops::portable::rotate(first, second, cos, sin);
  }
  auto const to = [&](int chunk) {
    return h == kKey ? shared.fresh + 16 * chunk : shared.queries[chunk / 8] + tile_offset(h, chunk % 8);
  };
  first.store(reinterpret_cast<T*>(to(piece)));
  second.store(reinterpret_cast<T*>(to(piece + kPieces)));
  fence_async_shared();
  if (h == kKey && rank == 0 && slot >= 0 && slot < p.index.slots && place >= 0 && place < p.keys) {
    T* const kept = static_cast<T*>(p.k.data) + slot * p.k.batch + place * p.k.token + c;
    first.store(kept);
    second.store(kept + Traits::kDim / 2);
  }
}

// Orders of the scores of keys [begin, begin + count) of the query go to `orders`, and are counted in
// shared.bins[0] where the range that is returned is valid; their least and greatest to shared.low and
// shared.high. `slot`: of the keys, for Params that rotate.
template <class Traits, class Params>
__device__ BinRange score_slice(Params const& p, CUtensorMap const& map, int64_t batch, int64_t slot,
                                int64_t query, int first_key, int count, typename Traits::Shared& shared,
                                unsigned char* ring, int stages, uint32_t* orders, int blocks, int rank) {
  using T = typename Traits::T;
  constexpr int kHeads = Traits::kHeads, kGroups = Traits::kGroups, kSides = kStepKeys / kTileSide;
  int const thread = threadIdx.x, lane = thread % 32, warpgroup = thread / kWarpgroup;
  int const heads = static_cast<int>(p.heads), tiles = (count + kStepKeys - 1) / kStepKeys;
  int const own = (tiles - warpgroup + kGroups - 1) / kGroups;  // tiles warpgroup, warpgroup + kGroups, ..
  bool const loads = thread % kWarpgroup == 0;
  ring += warpgroup * stages * Traits::kKeyBytes;
  auto const load = [&](int i, int stage) {
    Barrier& full = shared.full[warpgroup][stage];
    full.arrive_expecting(Traits::kKeyBytes);
    for (int side = 0; side < kSides; ++side) {
      for (int half = 0; half < Traits::kHalves; ++half) {
        load_tile(ring + stage * Traits::kKeyBytes + side * Traits::kSideBytes + half * kTileBytes, map,
                  half * kTileSide, 0, first_key + (kGroups * i + warpgroup) * kStepKeys + side * kTileSide,
                  static_cast<int>(slot), full);
      }
    }
  };
  if (loads) {
#pragma unroll 1
    for (int i = 0; i < min(own, stages); ++i) load(i, i);
  }
  __syncwarp();
  constexpr int kChunks = Traits::kDim / 8;
  static_assert(kHeads * kChunks <= Traits::kThreads);
  [[maybe_unused]] int fresh = -1;  // which of the block's keys is new
  if constexpr (kRotates<Params>) {
    rotate_queries<Traits>(p, batch, slot, shared, rank);
    let_next_kernel_start();
    int64_t const own_place = p.index.places[batch] - first_key;
    if (own_place >= 0 && own_place < count) fresh = static_cast<int>(own_place);
  } else if (thread < kHeads * kChunks) {
    auto const* const q = static_cast<T const*>(p.q.data) + batch * p.q.batch + query * p.q.token;
    int const h = thread / kChunks, chunk = thread % kChunks;
    uint4 x{};
    if (h < heads) x = *reinterpret_cast<uint4 const*>(q + h * p.q.head + chunk * 8);
    *reinterpret_cast<uint4*>(shared.queries[chunk / 8] + tile_offset(h, chunk % 8)) = x;
    fence_async_shared();
  }
  if (int const h = Traits::kThreads - 1 - thread; h < kHeads) {
    auto const* const w =
        static_cast<float const*>(p.weights.data) + batch * p.weights.batch + query * p.weights.token;
    float const x = p.weights.data == nullptr ? 1.f : h < heads ? w[h * p.weights.head] : 0.f;
    shared.weights[h] = 0.5f * p.scale * x;
  }
  float const least = p.relu ? 0.f : -INFINITY;
  __syncthreads();
  float weights[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; h += 4) {
    float4 const x = *reinterpret_cast<float4 const*>(shared.weights + h);
    weights[h] = x.x, weights[h + 1] = x.y, weights[h + 2] = x.z, weights[h + 3] = x.w;
  }

  uint32_t low = UINT32_MAX, high = 0, first = 0, parity = 0;
  BinRange range(0, 0);
#pragma unroll 1
  for (int i = 0, stage = 0; i < max(own, 2); ++i) {
    uint32_t order = 0;
    if (i < own) {
      shared.full[warpgroup][stage].wait(parity);
      if constexpr (kRotates<Params>) {
        int const row = fresh - (kGroups * i + warpgroup) * kStepKeys;
        if (fresh >= 0 && row >= 0 && row < kStepKeys) {
          if (int const c = thread % kWarpgroup; c < kChunks) {
            unsigned char* const tile =
                ring + stage * Traits::kKeyBytes + row / kTileSide * Traits::kSideBytes + c / 8 * kTileBytes;
            *reinterpret_cast<uint4*>(tile + tile_offset(row % kTileSide, c % 8)) =
                *reinterpret_cast<uint4 const*>(shared.fresh + 16 * c);
            fence_async_shared();
          }
          named_barrier(1 + warpgroup, kWarpgroup);
        }
      }
      float dots[kSides][kHeads / 2];
      wgmma_begin();
      uint64_t const keys = k_major(ring + stage * Traits::kKeyBytes), queries = k_major(shared.queries);
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
#pragma unroll
        for (int k = 0; k < Traits::kDim / 16; ++k) {
          wgmma<T, kHeads>(dots[side], keys + side * (Traits::kSideBytes >> 4) + k_step(k),
                           queries + k_step<kHeads * 128>(k), k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int side = 0; side < kSides; ++side) pin(dots[side]);
      if (lane == 0) shared.empty[warpgroup][stage].arrive();
      if (loads && i + stages < own) {
        shared.empty[warpgroup][stage].wait(parity);
        load(i + stages, stage);
      }
      __syncwarp();
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
      // Through shared memory, so that a lane has all heads of a key.
      auto& own_dots = shared.dots[thread / 32];
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
#pragma unroll
        for (int n = 0; n < kHeads / 4; ++n) {
          *reinterpret_cast<float2*>(
              &own_dots[16 * side + n % 2 * 8 + lane / 4][n / 2 * 8 + lane % 4 * 2]) = {
              dots[side][2 * n], dots[side][2 * n + 1]};
        }
      }
      __syncwarp();
      float x[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; h += 4) {
        float4 const four = *reinterpret_cast<float4 const*>(&own_dots[lane][h]);
        x[h] = four.x, x[h + 1] = four.y, x[h + 2] = four.z, x[h + 3] = four.w;
      }
      float score = 0.f;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) score = fmaf(weights[h], x[h] + fabsf(x[h]), score);
      if (!p.relu || !(fabsf(score) < INFINITY)) {  // linear, or something is infinite or NaN
        score = 0.f;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          if (h < heads) score = fmaf(2.f * weights[h], at_least(x[h], least), score);
        }
      }
      int const at = (kGroups * i + warpgroup) * kStepKeys + lane / 16 * kTileSide +
                     thread % kWarpgroup / 32 * 16 + lane % 16;
      order = at < count ? portable::order(score + 0.f) : 0;
      orders[at] = order;
      low = min(low, order == 0 ? UINT32_MAX : order);
      high = max(high, order);
      __syncwarp();
    }
    // The first tiles of all warps tell the range of the bins, in time for the second ones.
    if (i == 0) {
      first = order;
      low = __reduce_min_sync(kAll, low);
      high = __reduce_max_sync(kAll, high);
      cluster_wait();  // all blocks have barriers
      if (lane < blocks)
        deliver(&shared.firsts[rank][thread / 32], uint2{low, high}, shared.firsts_sent, lane, blocks);
      continue;
    }
    if (i == 1) {
      await_delivery(shared.firsts_sent, blocks);
      uint32_t lowest = UINT32_MAX, highest = 0;
#pragma unroll 1
      for (int j = lane; j < blocks * Traits::kWarps; j += 32) {
        uint2 const x = shared.firsts[0][j];
        lowest = min(lowest, x.x);
        highest = max(highest, x.y);
      }
      range = BinRange(__reduce_min_sync(kAll, lowest), __reduce_max_sync(kAll, highest));
      if (range.valid && first != 0) atomicAdd(shared.bins[0] + range.bin_of(first), 1u);
    }
    if (range.valid && order != 0) atomicAdd(shared.bins[0] + range.bin_of(order), 1u);
  }
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
  if (lane == 0) {
    atomicMin(&shared.low, low);
    atomicMax(&shared.high, high);
  }
  return range;
}

// Sums of lanes before this one.
__device__ __forceinline__ int sum_before(int x) {
  int const lane = threadIdx.x % 32;
  int sum = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int const y = __shfl_up_sync(kAll, sum, d);
    if (lane >= d) sum += y;
  }
  return sum - x;
}

// What is beyond the blocks of the queries is of the attention's heads: they may be rotated at any time.
template <class Traits, class Params>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    step_kernel(__grid_constant__ Params const p, __grid_constant__ CUtensorMap const map, int blocks,
                int stages) {
  constexpr int kStepThreads = Traits::kThreads, kStepWarps = Traits::kWarps, kFinalists = Traits::kFinalists;
  constexpr int kOwnBins = kStepBins / kStepThreads, kSumLanes = kBinsTogether / kOwnBins;
  static_assert(kSumLanes >= kMostStepBlocks && kStepWarps >= kMostStepBlocks);
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(bytes);
  unsigned char* const ring = bytes + sizeof(typename Traits::Shared);
  auto* const orders = reinterpret_cast<uint32_t*>(ring + Traits::kGroups * stages * Traits::kKeyBytes);
  int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32, rank = cluster_rank();
  unsigned const number = blockIdx.x / blocks;
  if constexpr (kRotates<Params>) {
    if (number >= p.batch) {
      wait_for_previous_kernel();
      let_next_kernel_start();
      int64_t const pieces = block_ops::portable::rope_pieces(p.attention, 8),
                    i = (blockIdx.x - p.batch * blocks) * kStepThreads + thread;
      if (i < p.batch * pieces)
        block_ops::portable::rope_cache_piece<typename Traits::T, 8>(p.attention, i / pieces,
                                                                     static_cast<int>(i % pieces));
      return;
    }
  }
  if (thread < Traits::kGroups * stages) {
    shared.full[thread / stages][thread % stages].init(1);
    shared.empty[thread / stages][thread % stages].init(kWarpgroup / 32);
    fence_barrier_init();
  } else if (thread == 32) {
    shared.firsts_sent.init(1);
    shared.together_sent.init(1);
    shared.fine_sent.init(1);
    shared.finalists_sent.init(1);
    shared.firsts_sent.arrive_expecting(blocks * sizeof(shared.firsts[0]));
    shared.together_sent.arrive_expecting(blocks * sizeof(shared.together[0]));
    shared.fine_sent.arrive_expecting(blocks * sizeof(shared.fine[0]));
    fence_barrier_init();
  } else if (thread == 64) {
    shared.low = UINT32_MAX;
    shared.high = 0;
    shared.finalist_count = 0;
  }
  for (int i = thread; i < 2 * kStepBins / 4; i += kStepThreads)
    reinterpret_cast<uint4*>(shared.bins)[i] = uint4{};
  cluster_arrive_relaxed();
  if constexpr (!kRotates<Params>) wait_for_previous_kernel();
  __syncthreads();
  unsigned const tokens = static_cast<unsigned>(p.tokens), batch = number / tokens, query = number % tokens;
  Sight sight = portable::sight(p, batch, query);
  int64_t slot = batch;
  if constexpr (kRotates<Params>) {
    if (p.index.slot_ids != nullptr) slot = p.index.slot_ids[batch];
    if (slot < 0 || slot >= p.index.slots) sight.count = 0;
  }
  int const slice = (sight.count + kStepKeys * blocks - 1) / (kStepKeys * blocks) * kStepKeys;
  int const begin = min(rank * slice, sight.count), count = min(slice, sight.count - begin);
  BinRange const range = score_slice<Traits>(p, map, batch, slot, query, sight.first + begin, count, shared,
                                             ring, stages, orders, blocks, rank);
  if constexpr (!kRotates<Params>) let_next_kernel_start();

  // In the end what is above `floor` is selected, and of those that equal it the first `equals`. First by
  // bins of equal width; few are in the bin of the topk-th best, as a rule.
  int const wanted = static_cast<int>(min(p.topk, int64_t{INT32_MAX}));
  uint32_t floor = 0;
  int equals = 0;
  // A warp has 1 / kStepWarps of the block's keys. How many are selected in all, and what of them is before
  // these.
  int const part = ((count + kStepWarps - 1) / kStepWarps + 31) / 32 * 32;
  int const from = min(warp * part, count), to = min(from + part, count);
  int chosen = 0, before_better = 0, before_equal = 0;
  auto const load_orders = [&](int base, uint32_t (&x)[kLaneKeys]) {
    int const first = base + kLaneKeys * lane;
#pragma unroll
    for (int i = 0; i < kLaneKeys; i += 4) {
      uint4 const four = *reinterpret_cast<uint4 const*>(orders + (first < to ? first : from) + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) x[i] = first + i < to ? x[i] : 0;
  };
  // The thread's counts of bins, of 64 together in all kSumLanes lanes that have them.
  auto const sum_bins = [&](int which) {
    __syncthreads();
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kOwnBins; i += 4) {
      uint4 const x = *reinterpret_cast<uint4 const*>(shared.bins[which] + thread * kOwnBins + i);
      sum += x.x + x.y + x.z + x.w;
    }
#pragma unroll
    for (int d = 1; d < kSumLanes; d *= 2) sum += __shfl_xor_sync(kAll, sum, d);
    return sum;
  };

  bool done = false, is_exchanged = false;  // without other blocks having to read this one's memory
  if (range.valid) {
    int const sum = sum_bins(0);
    if (thread % kSumLanes < blocks)
      deliver(&shared.together[rank][thread / kSumLanes], sum, shared.together_sent, thread % kSumLanes,
              blocks);
    await_delivery(shared.together_sent, blocks);
    int here = 0,
        earlier = 0;  // in the lane's bins, the last lane's the worst: of all blocks, of those before
#pragma unroll 1
    for (int r = 0; r < blocks; ++r) {
      int const x = shared.together[r][31 - lane];
      here += x;
      earlier += r < rank ? x : 0;
    }
    int before = sum_before(here);
    unsigned const found = __ballot_sync(kAll, before < wanted && before + here >= wanted);
    done = found == 0 || __shfl_sync(kAll, before + here, 31) <= wanted;
    if (!done) {
      int const owner = __ffs(found) - 1, first_bin = (31 - owner) * kBinsTogether;
      before = __shfl_sync(kAll, before, owner);
      before_better = lane < owner ? earlier : 0;
      if (warp < blocks) {
        uint2 const two = reinterpret_cast<uint2 const*>(shared.bins[0] + first_bin)[lane];
        deliver(&shared.fine[rank][lane], two, shared.fine_sent, warp, blocks);
      }
      await_delivery(shared.fine_sent, blocks);
      int low = 0, high = 0, low_earlier = 0, high_earlier = 0;  // of the lane's two bins
#pragma unroll 1
      for (int r = 0; r < blocks; ++r) {
        uint2 const x = shared.fine[r][31 - lane];
        low += x.x, high += x.y;
        if (r < rank) low_earlier += x.x, high_earlier += x.y;
      }
      before += sum_before(low + high);
      bool const is_high = before + high >= wanted;
      int const hit = __ffs(__ballot_sync(kAll, before < wanted && before + high + low >= wanted)) - 1;
      int const fine_bin = __shfl_sync(kAll, 63 - 2 * lane - !is_high, hit), bin = first_bin + fine_bin;
      int const need = wanted - __shfl_sync(kAll, is_high ? before : before + high, hit);
      int const size = __shfl_sync(kAll, is_high ? high : low, hit);
      if (63 - 2 * lane > fine_bin) before_better += high_earlier;
      if (62 - 2 * lane > fine_bin) before_better += low_earlier;
      before_better = __reduce_add_sync(kAll, before_better);
      if (size <= kFinalists) {
        // The finalists of the blocks before this one come first.
        int const start = __reduce_add_sync(
            kAll, lane < rank ? reinterpret_cast<uint32_t const*>(shared.fine[lane])[fine_bin] : 0);
        if (thread == 0) shared.finalists_sent.arrive_expecting(size * sizeof(uint2));
        int better = 0;
#pragma unroll 1
        for (int base = from; base < to; base += 32 * kLaneKeys) {
          uint32_t x[kLaneKeys];
          load_orders(base, x);
          unsigned among = 0;
#pragma unroll
          for (int i = 0; i < kLaneKeys; ++i) {
            int const own = x[i] == 0 ? -1 : range.bin_of(x[i]);
            better += own > bin;
            among |= (own == bin) << i;
          }
#pragma unroll 1
          for (; among != 0; among &= among - 1) {
            int const at = base + kLaneKeys * lane + __ffs(among) - 1;
            int const slot = start + atomicAdd(&shared.finalist_count, 1);
            uint2 const finalist{orders[at], static_cast<uint32_t>(begin + at)};
#pragma unroll 1
            for (int r = 0; r < blocks; ++r)
              deliver(&shared.finalists[slot], finalist, shared.finalists_sent, r, blocks);
          }
        }
        better = __reduce_add_sync(kAll, better);
        if (lane == 0) shared.better[warp] = better;
        if (blocks > 1) shared.finalists_sent.wait(0);
        __syncthreads();
        if (thread < size) {
          uint32_t const x = shared.finalists[thread].x;
          int greater = 0, equal = 0;
#pragma unroll 2
          for (int i = 0; i < size; ++i) {
            uint32_t const y = shared.finalists[i].x;
            greater += y > x;
            equal += y == x;
          }
          if (greater < need && greater + equal >= need) {  // several, which say the same
            shared.floor = x;
            shared.equals = need - greater;
          }
        }
        int late = lane < warp ? shared.better[lane] : 0;
        __syncthreads();
        floor = shared.floor;
        equals = shared.equals;
#pragma unroll 1
        for (int i = lane; i < size; i += 32) {
          uint2 const x = shared.finalists[i];
          bool const is_before = x.y < begin + from;
          late += is_before && x.x > floor;
          before_equal += is_before && x.x == floor;
        }
        before_better += __reduce_add_sync(kAll, late);
        before_equal = __reduce_add_sync(kAll, before_equal);
        chosen = wanted;
        done = is_exchanged = true;
      }
    }
  }
  // Else by the bits of their orders: the topk-th best is in [low, high], `above` are better than high.
  uint32_t low = 0, high = 0;
  if (!is_exchanged) {
    before_better = 0;
    cluster_sync();
    low = __reduce_min_sync(kAll, lane < blocks ? *of_rank(&shared.low, lane) : UINT32_MAX);
    high = __reduce_max_sync(kAll, lane < blocks ? *of_rank(&shared.high, lane) : 0);
    done |= low > high;  // all are NaN
  }
  int above = 0;
  for (int round = 1; !done; ++round) {
    int const which = round % 2;
    uint32_t* const bins = shared.bins[which];
    int const shift = max(0, 21 - __clz(high - low));
    __syncthreads();
    for (int i = thread; i < count; i += kStepThreads) {
      uint32_t const x = orders[i];
      if (x - low <= high - low) atomicAdd(bins + ((x - low) >> shift), 1u);
    }
    int const sum = sum_bins(which);
    if (thread % kSumLanes == 0) shared.coarse[which][thread / kSumLanes] = sum;
    cluster_sync();
    for (int i = thread; i < kStepBins; i += kStepThreads) shared.bins[1 - which][i] = 0;
    if (warp == 0) {
      // Of the lane's `count` counts, lanes in falling order; true where the wanted-th best is.
      auto const hit = [&](int count, int& before) {
        before += sum_before(count);
        return before < wanted && before + count >= wanted;
      };
      int here = 0, before = above;
#pragma unroll 1
      for (int r = 0; r < blocks; ++r) here += *of_rank(&shared.coarse[which][31 - lane], r);
      unsigned const coarse = __ballot_sync(kAll, hit(here, before));
      if (lane == 31) shared.total = before + here - above;
      if (coarse != 0) {
        int const owner = __ffs(coarse) - 1, best = (32 - owner) * kBinsTogether - 1 - 2 * lane;
        uint2 both{};
#pragma unroll 1
        for (int r = 0; r < blocks; ++r) {
          uint2 const x = *of_rank(reinterpret_cast<uint2*>(bins + best - 1), r);
          both.x += x.x;
          both.y += x.y;
        }
        before = __shfl_sync(kAll, before, owner);
        if (hit(both.x + both.y, before)) {
          bool const second = before + static_cast<int>(both.y) < wanted;
          shared.bin = best - second;
          shared.above = before + (second ? both.y : 0);
          shared.size = second ? both.x : both.y;
        }
      }
    }
    __syncthreads();
    if (above == 0 && shared.total <= wanted) break;
    above = shared.above;
    low += shared.bin << shift;
    high = low + min(high - low, (1u << shift) - 1);
    if (above + shared.size == wanted) {
      floor = low - 1;
      break;
    }
    if (shift == 0) {
      floor = low;
      equals = wanted - above;
      break;
    }
  }
  if (!is_exchanged) {
    int better = 0, equal = 0;
    for (int i = from + lane; i < to; i += 32) {
      better += orders[i] > floor;
      equal += orders[i] == floor;
    }
    better = __reduce_add_sync(kAll, better);
    equal = __reduce_add_sync(kAll, equal);
    if (lane == 0) shared.better[warp] = better, shared.equal[warp] = equal;
    cluster_sync();
    int all_better = 0, all_equal = 0;
    for (int i = lane; i < blocks * kStepWarps; i += 32) {
      int const b = *of_rank(&shared.better[i % kStepWarps], i / kStepWarps);
      int const e = *of_rank(&shared.equal[i % kStepWarps], i / kStepWarps);
      all_better += b;
      all_equal += e;
      if (i < rank * kStepWarps + warp) before_better += b, before_equal += e;
    }
    before_better = __reduce_add_sync(kAll, before_better);
    before_equal = __reduce_add_sync(kAll, before_equal);
    chosen = __reduce_add_sync(kAll, all_better) + min(__reduce_add_sync(kAll, all_equal), equals);
    cluster_arrive();
  }

  int32_t* const out = p.indices + number * p.topk;
  auto const is_equal = [&](uint32_t x) { return static_cast<int>(equals > 0 && x == floor && x != 0); };
#pragma unroll 1
  for (int base = from; base < to; base += 32 * kLaneKeys) {
    uint32_t x[kLaneKeys];
    load_orders(base, x);
    int counts = 0;  // of better ones, and of equal ones in the high half
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) counts += (x[i] > floor) + (is_equal(x[i]) << 16);
    int const before = sum_before(counts), all = __shfl_sync(kAll, before + counts, 31);
    int same = before_equal + (before >> 16), at = before_better + (before & 0xffff) + min(same, equals);
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      int const equal = is_equal(x[i]);
      if (x[i] > floor || (equal && same < equals)) out[at++] = begin + base + kLaneKeys * lane + i;
      same += equal;
    }
    before_better += all & 0xffff;
    before_equal += all >> 16;
  }
  for (int64_t i = chosen + rank * kStepThreads + thread; i < p.topk; i += kStepThreads * blocks) out[i] = -1;
  if (!is_exchanged) cluster_wait();
}

}  // namespace lt2::dsa::sm90::indexer
