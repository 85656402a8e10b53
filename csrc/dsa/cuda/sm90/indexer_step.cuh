// A step of decoding: the keys that one query sees, scored and selected from in one launch. A cluster of
// blocks has a query, each block a slice of its keys, whose scores stay in shared memory: the topk-th best is
// found in histograms that all blocks add up over distributed shared memory. Scores are the same sums in the
// same order as in indexer.cuh.
#pragma once

#include "common/cuda/cluster.cuh"
#include "common/cuda/overlap.cuh"
#include "dsa/cuda/sm90/indexer.cuh"

namespace lt2::dsa::sm90::indexer {

inline constexpr int kStepThreads = 2 * kWarpgroup, kStepWarps = kStepThreads / 32, kStepBins = 2048;
inline constexpr int kMostStepBlocks = 8;  // of a query
static_assert(kMostStepBlocks == kStepWarps);
inline constexpr int kMostStages = 8, kFinalists = kStepThreads;

// kHeads: HI, padded to 8 or 16.
template <class T_, int kDim_, int kHeads_>
struct StepTraits {
  using T = T_;
  static constexpr int kDim = kDim_, kHeads = kHeads_;
  static constexpr int kColumns = 4 * kHeads;  // of four queries, as in indexer.cuh; three are zero
  static constexpr int kHalves = kDim / kTileSide, kKeyBytes = kHalves * kTileBytes;

  struct alignas(1024) Shared {
    unsigned char queries[kHalves][kColumns * 128];
    uint32_t bins[2][kStepBins];
    Barrier full[2][kMostStages], empty[2][kMostStages];
    uint32_t low, high;  // of the block's scores
    int better[kStepWarps], equal[kStepWarps];
    int sums[kStepWarps];
    uint32_t bin;
    int above, size;
    uint32_t finalists[kFinalists],
        all_finalists[kFinalists];  // in the bin of the topk-th best: own, and all
    int finalist_count;
    uint32_t floor;
    int equals;
    // then keys [2 warpgroups, stages], and orders of the scores of the block's keys
  };
};

// Exclusive sum over the threads before this one.
__device__ inline int step_scan(int x, int* sums, int* total) {
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    int const y = __shfl_up_sync(kAll, sum, distance);
    if (lane >= distance) sum += y;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int before = 0;
  *total = 0;
#pragma unroll
  for (int w = 0; w < kStepWarps; ++w) {
    if (w < warp) before += sums[w];
    *total += sums[w];
  }
  return before + sum - x;
}

// Orders of the scores of keys [begin, begin + count) of the query go to `orders`; returns their least and
// greatest in shared.low, shared.high.
template <class Traits>
__device__ void score_slice(IndexerParams const& p, CUtensorMap const& map, int64_t batch, int64_t query,
                            int first_key, int count, typename Traits::Shared& shared, unsigned char* ring,
                            int stages, uint32_t* orders) {
  using T = typename Traits::T;
  constexpr int kHeads = Traits::kHeads, kColumns = Traits::kColumns;
  int const thread = threadIdx.x, lane = thread % 32, warpgroup = thread / kWarpgroup;
  int const row = thread % kWarpgroup / 32 * 16 + lane / 4;  // also row + 8
  int const heads = static_cast<int>(p.heads), tiles = (count + kTileSide - 1) / kTileSide;
  int const own = (tiles - warpgroup + 1) / 2;  // tiles warpgroup, warpgroup + 2, ..
  bool const loads = thread % kWarpgroup == 0;
  ring += warpgroup * stages * Traits::kKeyBytes;
  auto const load = [&](int i, int stage) {
    Barrier& full = shared.full[warpgroup][stage];
    full.arrive_expecting(Traits::kKeyBytes);
    for (int half = 0; half < Traits::kHalves; ++half) {
      load_tile(ring + stage * Traits::kKeyBytes + half * kTileBytes, map, half * kTileSide, 0,
                first_key + (2 * i + warpgroup) * kTileSide, static_cast<int>(batch), full);
    }
  };
  if (loads) {
    for (int i = 0; i < min(own, stages); ++i) load(i, i);
  }
  __syncwarp();
  auto const* const q = static_cast<T const*>(p.q.data) + batch * p.q.batch + query * p.q.token;
  for (int i = thread; i < kColumns * Traits::kDim / 8; i += kStepThreads) {
    int const n = i / (Traits::kDim / 8), chunk = i % (Traits::kDim / 8), h = n / 8 * 2 + n % 2;
    uint4 x{};
    if (n % 8 < 2 && h < heads) x = *reinterpret_cast<uint4 const*>(q + h * p.q.head + chunk * 8);
    *reinterpret_cast<uint4*>(shared.queries[chunk / 8] + tile_offset(n, chunk % 8)) = x;
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
    float dots[kColumns / 2];
    wgmma_begin();
    uint64_t const keys = k_major(ring + stage * Traits::kKeyBytes), queries = k_major(shared.queries);
#pragma unroll
    for (int k = 0; k < Traits::kDim / 16; ++k) {
      wgmma<T, kColumns>(dots, keys + k_step(k), queries + k_step<kColumns * 128>(k), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(dots);
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
    float scores[2] = {};
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float const x = dots[4 * (h / 2) + 2 * r + h % 2];
        scores[r] = fmaf(weights[h], x + fabsf(x), scores[r]);
      }
    }
    if (!p.relu || !(fabsf(scores[0] + scores[1]) < INFINITY)) {  // linear, or something is infinite or NaN
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scores[r] = 0.f;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          float const x = dots[4 * (h / 2) + 2 * r + h % 2];
          if (h < heads) scores[r] = fmaf(2.f * weights[h], at_least(x, least), scores[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // the first lane of four has the query
      int const at = (2 * i + warpgroup) * kTileSide + row + 8 * r;
      uint32_t const x = at < count && lane % 4 == 0 ? portable::order(scores[r] + 0.f) : 0;
      if (lane % 4 == 0) orders[at] = x;
      low = min(low, x == 0 ? UINT32_MAX : x);
      high = max(high, x);
    }
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
__global__ void __launch_bounds__(kStepThreads, 1)
    step_kernel(__grid_constant__ IndexerParams const p, __grid_constant__ CUtensorMap const map, int blocks,
                int stages) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(bytes);
  unsigned char* const ring = bytes + sizeof(typename Traits::Shared);
  auto* const orders = reinterpret_cast<uint32_t*>(ring + 2 * stages * Traits::kKeyBytes);
  int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32, rank = cluster_rank();
  if (thread == 0) {
    for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
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
  int const slice = (sight.count + kTileSide * blocks - 1) / (kTileSide * blocks) * kTileSide;
  int const begin = min(rank * slice, sight.count), count = min(slice, sight.count - begin);
  score_slice<Traits>(p, map, batch, query, sight.first + begin, count, shared, ring, stages, orders);
  let_next_kernel_start();
  cluster_sync();
  bool const is_rank = lane < blocks;
  uint32_t low = __reduce_min_sync(kAll, is_rank ? *of_rank(&shared.low, lane) : UINT32_MAX);
  uint32_t high = __reduce_max_sync(kAll, is_rank ? *of_rank(&shared.high, lane) : 0);

  int const wanted = static_cast<int>(min(p.topk, int64_t{INT32_MAX}));
  constexpr int kOwn = kStepBins / kStepThreads;
  // Finds the bin with the wanted-th best, where `above` are better than all bins: then shared.bin, above and
  // size. Returns how many there are in the bins.
  auto const find_bin = [&](uint32_t* bins, int above) {
    int local[kOwn] = {}, sum = 0, total;  // from the best bin on
    int const best = kStepBins - 1 - thread * kOwn;
#pragma unroll
    for (int r = 0; r < kMostStepBlocks; ++r) {
      if (r >= blocks) continue;
#pragma unroll
      for (int i = 0; i < kOwn; i += 4) {
        uint4 const x = *of_rank(reinterpret_cast<uint4*>(bins + best - 3 - i), r);
        local[i] += x.w;
        local[i + 1] += x.z;
        local[i + 2] += x.y;
        local[i + 3] += x.x;
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += local[i];
    int before = above + step_scan(sum, shared.sums, &total);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (before < wanted && before + local[i] >= wanted) {
        shared.bin = best - i;
        shared.above = before;
        shared.size = local[i];
      }
      before += local[i];
    }
    __syncthreads();
    return total;
  };

  // In the end what is above `floor` is selected, and of those that equal it the first `equals`. First by
  // bins of equal width; few are in the bin of the topk-th best, as a rule.
  uint32_t floor = 0;
  int equals = 0;
  float const least = portable::score_of(low), width = portable::score_of(high) - least;
  float const inverse = kStepBins / width;
  auto const bin_of = [&](uint32_t order) {
    return min(static_cast<int>((portable::score_of(order) - least) * inverse), kStepBins - 1);
  };
  bool const is_even = low < high && width < INFINITY && inverse < INFINITY;
  bool done = low > high;  // all are NaN
  if (is_even) {
    for (int i = thread; i < count; i += kStepThreads) {
      if (orders[i] != 0) atomicAdd(shared.bins[0] + bin_of(orders[i]), 1u);
    }
    cluster_sync();
    int const total = find_bin(shared.bins[0], 0);
    done = total <= wanted;
    if (!done && shared.size <= kFinalists) {
      int const bin = static_cast<int>(shared.bin);
      for (int i = thread; i < count; i += kStepThreads) {
        uint32_t const x = orders[i];
        if (x != 0 && bin_of(x) == bin) shared.finalists[atomicAdd(&shared.finalist_count, 1)] = x;
      }
      cluster_sync();
      // A warp copies a block's; their order does not matter.
      int const own = is_rank ? *of_rank(&shared.finalist_count, lane) : 0;
      int const from = __reduce_add_sync(kAll, lane < warp ? own : 0), copied = __shfl_sync(kAll, own, warp);
      for (int i = lane; i < copied; i += 32)
        shared.all_finalists[from + i] = *of_rank(&shared.finalists[i], warp);
      __syncthreads();
      int const size = shared.size, need = wanted - shared.above;
      if (thread < size) {
        uint32_t const x = shared.all_finalists[thread];
        int greater = 0, equal = 0;
        for (int i = 0; i < size; ++i) {
          greater += shared.all_finalists[i] > x;
          equal += shared.all_finalists[i] == x;
        }
        if (greater < need && greater + equal >= need) {  // several, which say the same
          shared.floor = x;
          shared.equals = need - greater;
        }
      }
      __syncthreads();
      floor = shared.floor;
      equals = shared.equals;
      done = true;
    } else if (!done) {
      for (int i = thread; i < kStepBins; i += kStepThreads) shared.bins[1][i] = 0;
    }
  }
  // Else by the bits of their orders: the topk-th best is in [low, high], `above` are better than high.
  int above = 0;
  for (int round = is_even ? 1 : 0; !done; ++round) {
    uint32_t* const bins = shared.bins[round % 2];
    int const shift = max(0, 21 - __clz(high - low));
    __syncthreads();
    for (int i = thread; i < count; i += kStepThreads) {
      uint32_t const x = orders[i];
      if (x - low <= high - low) atomicAdd(bins + ((x - low) >> shift), 1u);
    }
    cluster_sync();
    for (int i = thread; i < kStepBins; i += kStepThreads) shared.bins[(round + 1) % 2][i] = 0;
    int const total = find_bin(bins, above);
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

  // A warp has 1 / kStepWarps of the block's keys.
  int const part = ((count + kStepWarps - 1) / kStepWarps + 31) / 32 * 32;
  int const from = min(warp * part, count), to = min(from + part, count);
  int better = 0, equal = 0;
  for (int i = from + lane; i < to; i += 32) {
    better += orders[i] > floor;
    equal += orders[i] == floor;
  }
  better = __reduce_add_sync(kAll, better);
  equal = __reduce_add_sync(kAll, equal);
  if (lane == 0) shared.better[warp] = better, shared.equal[warp] = equal;
  cluster_sync();
  int before_better = 0, before_equal = 0, all_better = 0, all_equal = 0;
  for (int i = lane; i < blocks * kStepWarps; i += 32) {
    int const b = *of_rank(&shared.better[i % kStepWarps], i / kStepWarps);
    int const e = *of_rank(&shared.equal[i % kStepWarps], i / kStepWarps);
    all_better += b;
    all_equal += e;
    if (i < rank * kStepWarps + warp) before_better += b, before_equal += e;
  }
  before_better = __reduce_add_sync(kAll, before_better);
  before_equal = __reduce_add_sync(kAll, before_equal);
  int const chosen = __reduce_add_sync(kAll, all_better) + min(__reduce_add_sync(kAll, all_equal), equals);
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
