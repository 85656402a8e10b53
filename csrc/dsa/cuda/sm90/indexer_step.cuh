// A step of decoding: the keys that one query sees, scored and selected from in one launch. A cluster of
// blocks has a query, each block a slice of its keys, whose scores stay in shared memory: the topk-th best is
// found in histograms that all blocks add up over distributed shared memory. Scores are the same sums in the
// same order as in indexer.cuh.
#pragma once

#include "common/cuda/cluster.cuh"
#include "common/cuda/overlap.cuh"
#include "dsa/cuda/sm90/indexer.cuh"

namespace lt2::dsa::sm90::indexer {

inline constexpr int kStepBins = 2048, kBinsTogether = kStepBins / 32;
inline constexpr int kMostStepBlocks = 8;  // of a query
inline constexpr int kMostSteps = 8;       // under way in a block
inline constexpr int kStepKeys = 128;      // of a warpgroup

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
    alignas(16) uint32_t bins[2][kStepBins];
    int coarse[2][32];  // sums of bins
    Barrier full[kGroups][kMostStages], empty[kGroups][kMostStages];
    uint32_t low, high;  // of the block's scores
    int better[kWarps], equal[kWarps];
    uint32_t bin;
    int above, size, total;
    union {
      alignas(16) float dots[kWarps][32][kRow];  // of the keys of a warp
      struct {
        uint2 finalists[kFinalists],
            all_finalists[kFinalists];  // in the bin of the topk-th best: own, and all
      };
    };
    int finalist_count;
    uint32_t floor;
    int equals;
    // then keys [warpgroups, stages], and orders of the scores of the block's keys
  };
};

// Orders of the scores of keys [begin, begin + count) of the query go to `orders`; returns their least and
// greatest in shared.low, shared.high.
template <class Traits>
__device__ void score_slice(IndexerParams const& p, CUtensorMap const& map, int64_t batch, int64_t query,
                            int first_key, int count, typename Traits::Shared& shared, unsigned char* ring,
                            int stages, uint32_t* orders) {
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
                  static_cast<int>(batch), full);
      }
    }
  };
  if (loads) {
    for (int i = 0; i < min(own, stages); ++i) load(i, i);
  }
  __syncwarp();
  auto const* const q = static_cast<T const*>(p.q.data) + batch * p.q.batch + query * p.q.token;
  for (int i = thread; i < kHeads * Traits::kDim / 8; i += Traits::kThreads) {
    int const h = i / (Traits::kDim / 8), chunk = i % (Traits::kDim / 8);
    uint4 x{};
    if (h < heads) x = *reinterpret_cast<uint4 const*>(q + h * p.q.head + chunk * 8);
    *reinterpret_cast<uint4*>(shared.queries[chunk / 8] + tile_offset(h, chunk % 8)) = x;
  }
  float weights[kHeads];
  auto const* const w =
      static_cast<float const*>(p.weights.data) + batch * p.weights.batch + query * p.weights.token;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    float const x = p.weights.data == nullptr ? 1.f : h < heads ? w[h * p.weights.head] : 0.f;
    weights[h] = 0.5f * p.scale * x;
  }
  float const least = p.relu ? 0.f : -INFINITY;
  fence_async_shared();
  __syncthreads();

  uint32_t low = UINT32_MAX, high = 0;
  uint32_t parity = 0;
  for (int i = 0, stage = 0; i < own; ++i) {
    shared.full[warpgroup][stage].wait(parity);
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
        *reinterpret_cast<float2*>(&own_dots[16 * side + n % 2 * 8 + lane / 4][n / 2 * 8 + lane % 4 * 2]) = {
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
    uint32_t const order = at < count ? portable::order(score + 0.f) : 0;
    orders[at] = order;
    low = min(low, order == 0 ? UINT32_MAX : order);
    high = max(high, order);
    __syncwarp();
  }
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
  if (lane == 0) {
    atomicMin(&shared.low, low);
    atomicMax(&shared.high, high);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    step_kernel(__grid_constant__ IndexerParams const p, __grid_constant__ CUtensorMap const map, int blocks,
                int stages) {
  constexpr int kStepThreads = Traits::kThreads, kStepWarps = Traits::kWarps, kFinalists = Traits::kFinalists;
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(bytes);
  unsigned char* const ring = bytes + sizeof(typename Traits::Shared);
  auto* const orders = reinterpret_cast<uint32_t*>(ring + Traits::kGroups * stages * Traits::kKeyBytes);
  int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32, rank = cluster_rank();
  if (thread == 0) {
    for (int warpgroup = 0; warpgroup < Traits::kGroups; ++warpgroup) {
      for (int i = 0; i < stages; ++i) {
        shared.full[warpgroup][i].init(1);
        shared.empty[warpgroup][i].init(kWarpgroup / 32);
      }
    }
    fence_barrier_init();
    shared.low = UINT32_MAX;
    shared.high = 0;
    shared.finalist_count = 0;
  }
  for (int i = thread; i < 2 * kStepBins; i += kStepThreads) shared.bins[0][i] = 0;
  wait_for_previous_kernel();
  __syncthreads();
  int64_t const number = blockIdx.x / blocks, batch = number / p.tokens, query = number % p.tokens;
  Sight const sight = portable::sight(p, batch, query);
  int const slice = (sight.count + kStepKeys * blocks - 1) / (kStepKeys * blocks) * kStepKeys;
  int const begin = min(rank * slice, sight.count), count = min(slice, sight.count - begin);
  score_slice<Traits>(p, map, batch, query, sight.first + begin, count, shared, ring, stages, orders);
  let_next_kernel_start();
  cluster_sync();
  bool const is_rank = lane < blocks;
  uint32_t low = __reduce_min_sync(kAll, is_rank ? *of_rank(&shared.low, lane) : UINT32_MAX);
  uint32_t high = __reduce_max_sync(kAll, is_rank ? *of_rank(&shared.high, lane) : 0);

  int const wanted = static_cast<int>(min(p.topk, int64_t{INT32_MAX}));
  // Counts are complete in the block; afterwards those of all blocks can be read, also of 64 bins together.
  auto const publish = [&](int which) {
    constexpr int kOwn = kStepBins / kStepThreads, kLanes = kBinsTogether / kOwn;
    __syncthreads();
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) {
      uint4 const x = *reinterpret_cast<uint4*>(shared.bins[which] + thread * kOwn + i);
      sum += x.x + x.y + x.z + x.w;
    }
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) sum += __shfl_xor_sync(kAll, sum, d);
    if (thread % kLanes == 0) shared.coarse[which][thread / kLanes] = sum;
    cluster_sync();
  };
  // Finds the bin with the wanted-th best, where `above` are better than all bins: then shared.bin, above and
  // size. Returns how many there are in the bins.
  auto const find_bin = [&](int which, int above) {
    if (warp == 0) {
      // Of the lane's `count` counts, lanes in falling order; true where the wanted-th best is.
      auto const hit = [&](int count, int& before) {
        int sum = count;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
          int const y = __shfl_up_sync(kAll, sum, d);
          if (lane >= d) sum += y;
        }
        before += sum - count;
        return before < wanted && before + count >= wanted;
      };
      int count = 0, before = above;
#pragma unroll
      for (int r = 0; r < kMostStepBlocks; ++r) {
        if (r < blocks) count += *of_rank(&shared.coarse[which][31 - lane], r);
      }
      unsigned const coarse = __ballot_sync(kAll, hit(count, before));
      if (lane == 31) shared.total = before + count - above;
      if (coarse != 0) {
        int const chosen = __ffs(coarse) - 1, best = (32 - chosen) * kBinsTogether - 1 - 2 * lane;
        uint2 both{};
#pragma unroll
        for (int r = 0; r < kMostStepBlocks; ++r) {
          if (r >= blocks) continue;
          uint2 const x = *of_rank(reinterpret_cast<uint2*>(shared.bins[which] + best - 1), r);
          both.x += x.x;
          both.y += x.y;
        }
        before = __shfl_sync(kAll, before, chosen);
        if (hit(both.x + both.y, before)) {
          bool const second = before + static_cast<int>(both.y) < wanted;
          shared.bin = best - second;
          shared.above = before + (second ? both.y : 0);
          shared.size = second ? both.x : both.y;
        }
      }
    }
    __syncthreads();
    return shared.total;
  };

  // In the end what is above `floor` is selected, and of those that equal it the first `equals`. First by
  // bins of equal width; few are in the bin of the topk-th best, as a rule.
  uint32_t floor = 0;
  int equals = 0;
  // A warp has 1 / kStepWarps of the block's keys. How many are selected in all, and what of them is before
  // these.
  int const part = ((count + kStepWarps - 1) / kStepWarps + 31) / 32 * 32;
  int const from = min(warp * part, count), to = min(from + part, count);
  int chosen = 0, before_better = 0, before_equal = 0;
  bool counted = false;
  float const least = portable::score_of(low), width = portable::score_of(high) - least;
  float const inverse = kStepBins / width;
  auto const bin_of = [&](uint32_t order) {
    return min(static_cast<int>((portable::score_of(order) - least) * inverse), kStepBins - 1);
  };
  bool const is_even = low < high && width < INFINITY && inverse < INFINITY;
  bool done = low > high;  // all are NaN
  if (is_even) {
#pragma unroll 4
    for (int i = thread; i < count; i += kStepThreads) {
      if (orders[i] != 0) atomicAdd(shared.bins[0] + bin_of(orders[i]), 1u);
    }
    publish(0);
    int const total = find_bin(0, 0);
    done = total <= wanted;
    if (!done && shared.size <= kFinalists) {
      int const bin = static_cast<int>(shared.bin), size = shared.size, need = wanted - shared.above;
      int better = 0;
#pragma unroll 4
      for (int i = from + lane; i < to; i += 32) {
        uint32_t const x = orders[i];
        int const own = x == 0 ? -1 : bin_of(x);
        better += own > bin;
        if (own == bin)
          shared.finalists[atomicAdd(&shared.finalist_count, 1)] = {x, static_cast<uint32_t>(begin + i)};
      }
      better = __reduce_add_sync(kAll, better);
      if (lane == 0) shared.better[warp] = better;
      cluster_sync();
      for (int i = lane; i < rank * kStepWarps + warp; i += 32)
        before_better += *of_rank(&shared.better[i % kStepWarps], i / kStepWarps);
      // A warp copies a block's; their order does not matter.
      int const own = is_rank ? *of_rank(&shared.finalist_count, lane) : 0;
      int const start = __reduce_add_sync(kAll, lane < warp ? own : 0), copied = __shfl_sync(kAll, own, warp);
      for (int i = lane; i < copied; i += 32)
        shared.all_finalists[start + i] = *of_rank(&shared.finalists[i], warp);
      __syncthreads();
      if (thread < size) {
        uint32_t const x = shared.all_finalists[thread].x;
        int greater = 0, equal = 0;
#pragma unroll 4
        for (int i = 0; i < size; ++i) {
          greater += shared.all_finalists[i].x > x;
          equal += shared.all_finalists[i].x == x;
        }
        if (greater < need && greater + equal >= need) {  // several, which say the same
          shared.floor = x;
          shared.equals = need - greater;
        }
      }
      __syncthreads();
      floor = shared.floor;
      equals = shared.equals;
      for (int i = lane; i < size; i += 32) {
        uint2 const x = shared.all_finalists[i];
        bool const before = x.y < begin + from;
        before_better += before && x.x > floor;
        before_equal += before && x.x == floor;
      }
      before_better = __reduce_add_sync(kAll, before_better);
      before_equal = __reduce_add_sync(kAll, before_equal);
      chosen = wanted;
      done = counted = true;
    } else if (!done) {
      for (int i = thread; i < kStepBins; i += kStepThreads) shared.bins[1][i] = 0;
    }
  }
  // Else by the bits of their orders: the topk-th best is in [low, high], `above` are better than high.
  int above = 0;
  for (int round = is_even ? 1 : 0; !done; ++round) {
    int const which = round % 2;
    uint32_t* const bins = shared.bins[which];
    int const shift = max(0, 21 - __clz(high - low));
    __syncthreads();
    for (int i = thread; i < count; i += kStepThreads) {
      uint32_t const x = orders[i];
      if (x - low <= high - low) atomicAdd(bins + ((x - low) >> shift), 1u);
    }
    publish(which);
    for (int i = thread; i < kStepBins; i += kStepThreads) shared.bins[1 - which][i] = 0;
    int const total = find_bin(which, above);
    if (above == 0 && total <= wanted) break;
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

  if (!counted) {
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
  }
  cluster_arrive();
  int32_t* const out = p.indices + number * p.topk;
  int written = before_better + min(before_equal, equals);
  unsigned below;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
  for (int base = from; base < to; base += 32) {
    uint32_t const x = base + lane < to ? orders[base + lane] : 0;
    bool const is_equal = equals > 0 && x == floor && x != 0;
    unsigned const same = __ballot_sync(kAll, is_equal);
    bool const is_chosen = x > floor || (is_equal && before_equal + __popc(same & below) < equals);
    unsigned const all = __ballot_sync(kAll, is_chosen);
    if (is_chosen) out[written + __popc(all & below)] = begin + base + lane;
    before_equal += __popc(same);
    written += __popc(all);
  }
  for (int64_t i = chosen + rank * kStepThreads + thread; i < p.topk; i += kStepThreads * blocks) out[i] = -1;
  cluster_wait();
}

}  // namespace lt2::dsa::sm90::indexer
