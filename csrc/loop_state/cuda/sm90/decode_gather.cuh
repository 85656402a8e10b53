// Attention of new tokens to the cached keys that their lists name, in one launch. A cluster of blocks has a
// token and up to 16 query heads of a key head. A warp takes parts of kPartKeys entries of the list, with a
// softmax of its own, heads on the rows of its products, and copies of the next keys under way, also of its
// next part. What it has of a part goes to the blocks that write it, which join all parts: in one order,
// whatever the number of blocks, so that a row has the same bits in any batch.
#pragma once

#include <cstdint>

#include "common/cuda/cluster.cuh"
#include "common/cuda/overlap.cuh"
#include "dsa/cuda/sm90/key_tile.cuh"
#include "loop_state/cuda/portable/sight.cuh"

namespace lt2::loop_state::sm90 {

using namespace cuda;
using namespace cuda::sm90;

inline constexpr int kGatherWarps = 4, kGatherThreads = kGatherWarps * kWarp, kGatherHeads = 16;
inline constexpr int kMostBlocks = 8;  // of a cluster
inline constexpr int kPartKeys = 64, kTileKeys = 16, kPartTiles = kPartKeys / kTileKeys;
inline constexpr int kStages = 3;     // tiles on their way to a warp
inline constexpr int kSums = 8;       // lanes that add up an output
inline constexpr int kShareSkew = 4;  // floats after a part: lanes that add it up meet no bank twice

struct GatherCut {
  int parts, blocks, heads;  // of a list; of a cluster; of a key head
  int column_bits, share;    // outputs of a head that a block writes, 2^column_bits; of all heads
};

template <int kDim, bool kCluster>
struct GatherShared {
  using Tile = dsa::portable::RowTile<kDim, kCluster>;
  alignas(16) char rows[kGatherWarps][kStages][2][Tile::kBytes];  // of K, V
  Barrier full[kGatherWarps][kStages], joining;
  // then of all parts float2 [parts, heads], top and sum, and float [parts, share + kShareSkew]
};

// kCluster: of more than one block. Then the copy engine copies rows, else all lanes together.
template <class T, int kDim, bool kCluster>
__global__ void __launch_bounds__(kGatherThreads, 3)
    gather_kernel(__grid_constant__ DecodeParams const p, __grid_constant__ GatherCut const cut) {
  using Shared = GatherShared<kDim, kCluster>;
  using Tile = typename Shared::Tile;
  constexpr int kChunks = kDim / 8;
  extern __shared__ __align__(128) char bytes[];
  auto& shared = *reinterpret_cast<Shared*>(bytes);
  auto* const totals = reinterpret_cast<float2*>(&shared + 1);
  auto* const arrived = reinterpret_cast<float*>(totals + cut.parts * cut.heads);
  int const thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  int const rank = kCluster ? cluster_rank() : 0, stride = cut.share + kShareSkew;
  if constexpr (kCluster) {
    if (lane == 0) {
      for (int i = 0; i < kStages; ++i) shared.full[warp][i].init(1);
      if (warp == 0) {
        shared.joining.init(1);
        shared.joining.arrive_expecting(cut.parts * (cut.share * sizeof(float) + cut.heads * sizeof(float2)));
      }
      fence_barrier_init();
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  int64_t const unit = blockIdx.x / cut.blocks, query = unit / p.heads;
  int const head = static_cast<int>(unit % p.heads), heads = cut.heads;
  portable::Sight const sight(p, query);
  int32_t const* const list = p.indices + query * p.topk;
  T const* const k = portable::cached<T>(p.k, sight, head);
  T const* const v = portable::cached<T>(p.v, sight, head);

  // Tile i of this warp is tile i % kPartTiles of its part i / kPartTiles.
  int const own = rank * kGatherWarps + warp, apart = cut.blocks * kGatherWarps;
  int const tiles = own < cut.parts ? ((cut.parts - own - 1) / apart + 1) * kPartTiles : 0;
  auto const key_of = [&](int i) {
    int64_t const at = int64_t{own + i / kPartTiles * apart} * kPartKeys + i % kPartTiles * kTileKeys + lane;
    int const key = i < tiles && lane < kTileKeys && at < p.topk ? list[at] : -1;
    return key < sight.keys ? key : -1;
  };
  auto const load = [&](int stage, int key) {
    return dsa::sm90::load_key_tile<kCluster, Tile>(shared.rows[warp][stage], shared.full[warp][stage], k,
                                                    p.k.token, v, p.v.token, key, lane);
  };
  int ahead[kStages + 1];
  unsigned present[kStages];
#pragma unroll
  for (int i = 0; i <= kStages; ++i) ahead[i] = key_of(i);
#pragma unroll
  for (int i = 0; i < kStages; ++i) present[i] = !kCluster || i < tiles ? load(i, ahead[i]) : 0;
  int next = ahead[kStages];

  uint32_t q[kDim / 16][4];  // rows are heads
  Tile::load_fragments(q, static_cast<T const*>(p.q) + (query * p.query_heads + int64_t{head} * heads) * kDim,
                       kDim, heads, lane);
  dsa::sm90::RunningSoftmax<T, Tile> softmax;
  float const scale = p.scale * dsa::portable::kLog2E;
  auto const deliver = [&](auto* to, auto const& x, int block) {
    if constexpr (kCluster) {
      send(to, x, shared.joining, block);
    } else {
      *to = x;
    }
  };
  // The sums of a part go where it is joined, by way of a stage whose rows are read, and are zero again.
  auto const finish = [&](int part, int stage) {
    auto* const staged = reinterpret_cast<float2*>(shared.rows[warp][stage]);
    static_assert(sizeof(shared.rows[0][0]) >= kGatherHeads * kDim * sizeof(float));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const h = lane / 4 + 8 * half;
      softmax.close(half);
      if (h < heads) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          staged[(h * kChunks + c) * 4 + lane % 4] = {softmax.o[c][2 * half], softmax.o[c][2 * half + 1]};
        for (int r = lane % 4; r < cut.blocks; r += 4)
          deliver(totals + part * heads + h, float2{softmax.top[half], softmax.sum[half]}, r);
      }
    }
    softmax = {};
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < heads * kDim / 2; i += kWarp) {
      int const h = 2 * i / kDim, d = 2 * i % kDim, block = d >> cut.column_bits;
      float* const to = arrived + part * stride + (h << cut.column_bits) + d - (block << cut.column_bits);
      deliver(reinterpret_cast<float2*>(to), staged[i], block);
    }
    if constexpr (kCluster) fence_async_shared();
  };
  if constexpr (kCluster) cluster_wait();  // all blocks have barriers
  int stage = 0;
  [[maybe_unused]] uint32_t parity = 0;
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    if constexpr (kCluster) {
      shared.full[warp][stage].wait(parity);
    } else {
      dsa::portable::wait_copies_but<kStages - 1>();
    }
    __syncwarp();
    softmax.add(q, shared.rows[warp][stage], present[0], scale, lane);
    __syncwarp();
    if (i % kPartTiles == kPartTiles - 1) {
      finish(own + i / kPartTiles * apart, stage);
      __syncwarp();
    }
#pragma unroll
    for (int j = 1; j < kStages; ++j) present[j - 1] = present[j];
    if (!kCluster || i + kStages < tiles) present[kStages - 1] = load(stage, next);
    next = key_of(i + kStages + 1);
    stage = stage + 1 < kStages ? stage + 1 : 0;
    parity ^= stage == 0;
  }
  wait_copies();

  if constexpr (kCluster) {
    shared.joining.wait(0);
  } else {
    __syncthreads();
  }
  auto const over_lanes = [](float x, auto const& both) {
#pragma unroll
    for (int d = 1; d < kSums; d *= 2) x = both(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
  };
  auto const add = [](float x, float y) { return x + y; };
  T* const out = static_cast<T*>(p.o) + (query * p.query_heads + int64_t{head} * heads) * kDim +
                 (rank << cut.column_bits);
#pragma unroll 1
  for (int first = 0; first < cut.share; first += kGatherThreads / kSums) {
    int const e = first + thread / kSums, i = min(e, cut.share - 1), h = i >> cut.column_bits;
    float highest = -INFINITY, total = 0.f, value = 0.f;
    for (int part = thread % kSums; part < cut.parts; part += kSums)
      highest = fmaxf(highest, totals[part * heads + h].x);
    float const base =
        finite_or_zero(over_lanes(highest, [](float x, float y) { return fmaxf(x, y); })) * scale;
#pragma unroll 4
    for (int part = thread % kSums; part < cut.parts; part += kSums) {
      float2 const x = totals[part * heads + h];
      float const weight = exp2f(x.x * scale - base);
      total = fmaf(weight, x.y, total);
      value = fmaf(weight, arrived[part * stride + i], value);
    }
    total = over_lanes(total, add);
    value = over_lanes(value, add);
    if (e < cut.share && thread % kSums == 0)
      out[h * kDim + e - (h << cut.column_bits)] = from_float<T>(total == 0.f ? 0.f : value / total);
  }
}

}  // namespace lt2::loop_state::sm90
