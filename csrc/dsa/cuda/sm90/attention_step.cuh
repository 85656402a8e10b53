// Attention of few queries over their selections. A cluster of blocks has a query and up to 16 heads of a key
// head; each warp takes 16 of the selected keys at a time, heads on the rows of its products, with a softmax
// of its own and copies of the next keys under way. What warps have is joined in their block, what blocks
// have is sent to those that write it: one launch. In clusters rows are copied by the copy engine, a lane a
// row; where all multiprocessors have enough to do, by all lanes together.
#pragma once

#include <cstdint>

#include "common/cuda/cluster.cuh"
#include "common/cuda/overlap.cuh"
#include "dsa/cuda/sm90/key_tile.cuh"

namespace lt2::dsa::sm90::step {

using namespace cuda;
using namespace cuda::sm90;

inline constexpr int kWarps = 4, kThreads = kWarps * kWarp, kHeads = 16, kKeys = 16;
inline constexpr int kMostBlocks = 8;  // of a cluster

template <int kDim, int kStages, bool kCluster>
struct Shared {
  union {
    alignas(16) char rows[kWarps][kStages][2][portable::RowTile<kDim, kCluster>::kBytes];  // of K, V
    float parts[kWarps][kHeads][kDim];
  };
  float2 totals[kWarps][kHeads];           // top, sum
  float2 all_totals[kMostBlocks][kHeads];  // of blocks
  Barrier full[kWarps][kStages], joining;
  // then where kCluster the parts of outputs of all blocks, [blocks, heads kDim / blocks]
};

// kCluster: of more than one block.
template <class T, int kDim, int kStages, bool kCluster>
__global__ void __launch_bounds__(kThreads, kStages == 2 ? 3 : 2)
    step_kernel(__grid_constant__ AttentionForwardParams const p, int blocks, int head_blocks) {
  using Tile = portable::RowTile<kDim, kCluster>;
  constexpr int kChunks = kDim / 8;
  extern __shared__ __align__(128) char bytes[];
  auto& shared = *reinterpret_cast<Shared<kDim, kStages, kCluster>*>(bytes);
  int const thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  int const rank = kCluster ? cluster_rank() : 0;
  if constexpr (kCluster) {
    if (lane == 0) {
      for (int i = 0; i < kStages; ++i) shared.full[warp][i].init(1);
      if (warp == 0) shared.joining.init(1);
      fence_barrier_init();
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }
  wait_for_previous_kernel();
  int64_t unit = blockIdx.x / blocks;
  int64_t const group = p.query_heads / p.key_heads, begin_head = unit % head_blocks * kHeads;
  unit /= head_blocks;
  int64_t const key_head = unit % p.key_heads, query = unit / p.key_heads;
  int64_t const row = query / p.tokens, token = query % p.tokens, first_head = key_head * group + begin_head;
  int const heads = static_cast<int>(min(group - begin_head, int64_t{kHeads}));
  portable::Sight const seen = portable::sight(p, row, token);
  int32_t const* const indices = portable::indices_of(p, query);
  auto const* const k = portable::row_of<T const>(p.k, row, 0, key_head);
  auto const* const v = portable::row_of<T const>(p.v, row, 0, key_head);

  // Step i of this warp has keys [16 at(i), + 16) of the selection.
  int const steps = static_cast<int>(portable::ceil_div(p.topk, kKeys)), stride = blocks * kWarps;
  int const own = rank * kWarps + warp;
  auto const key_of = [&](int i) {
    return portable::selected_key(p, indices, seen,
                                  lane < kKeys ? int64_t{own + i * stride} * kKeys + lane : p.topk);
  };
  auto const load = [&](int stage, int key) {
    return load_key_tile<kCluster, Tile>(shared.rows[warp][stage], shared.full[warp][stage], k, p.k.token, v,
                                         p.v.token, key, lane);
  };
  int ahead[kStages + 1];
  unsigned present[kStages];
#pragma unroll
  for (int i = 0; i <= kStages; ++i) ahead[i] = key_of(i);
#pragma unroll
  for (int i = 0; i < kStages; ++i)
    present[i] = own + i * stride < steps || !kCluster ? load(i, ahead[i]) : 0;
  int next = ahead[kStages];

  uint32_t q[kDim / 16][4];  // rows are heads
  Tile::load_fragments(q, portable::row_of<T const>(p.q, row, token, first_head), p.q.head, heads, lane);
  RunningSoftmax<T, Tile> softmax;
  float const scale = p.scale * portable::kLog2E;
  int stage = 0;
  [[maybe_unused]] uint32_t parity = 0;
#pragma unroll 1
  for (int i = 0; own + i * stride < steps; ++i) {
    if constexpr (kCluster) {
      shared.full[warp][stage].wait(parity);
    } else {
      portable::wait_copies_but<kStages - 1>();
    }
    __syncwarp();
    softmax.add(q, shared.rows[warp][stage], present[0], scale, lane);
    __syncwarp();
#pragma unroll
    for (int j = 1; j < kStages; ++j) present[j - 1] = present[j];
    if (!kCluster || own + (i + kStages) * stride < steps) present[kStages - 1] = load(stage, next);
    next = key_of(i + kStages + 1);
    stage = stage + 1 < kStages ? stage + 1 : 0;
    parity ^= stage == 0;
  }
  wait_copies();
  __syncthreads();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const h = lane / 4 + 8 * half;
    softmax.close(half);
    if (h >= heads) continue;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      *reinterpret_cast<float2*>(&shared.parts[warp][h][8 * c + 2 * (lane % 4)]) = {
          softmax.o[c][2 * half], softmax.o[c][2 * half + 1]};
    }
    if (lane % 4 == 0) shared.totals[warp][h] = {softmax.top[half], softmax.sum[half]};
  }
  __syncthreads();
  // Out of `count` parts: the value, top and sum.
  auto const join = [&](int count, auto const& part_total, auto const& part) {
    float highest = -INFINITY, total = 0.f, value = 0.f;
#pragma unroll 4
    for (int i = 0; i < count; ++i) highest = fmaxf(highest, part_total(i).x);
    float const base = finite_or_zero(highest) * scale;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      float2 const x = part_total(i);
      float const weight = exp2f(x.x * scale - base);
      total += weight * x.y;
      value += weight * part(i);
    }
    return float3{value, highest, total};
  };
  auto const join_warps = [&](int h, int d) {
    return join(
        kWarps, [&](int w) { return shared.totals[w][h]; }, [&](int w) { return shared.parts[w][h][d]; });
  };
  auto const write = [&](int e, float3 x) {
    int const h = e / kDim, d = e % kDim;
    portable::row_of<T>(p.o, row, token, first_head + h)[d] = from_float<T>(x.z == 0.f ? 0.f : x.x / x.z);
    if (d == 0) p.lse[query * p.query_heads + first_head + h] = x.y * p.scale + logf(x.z);
  };
  if constexpr (!kCluster) {
    for (int e = thread; e < heads * kDim; e += kThreads) write(e, join_warps(e / kDim, e % kDim));
    return;
  }
  // Each block has its share of the outputs' elements, and is sent what the others have of them.
  auto* const arrived = reinterpret_cast<float*>(&shared + 1);
  int const share = heads * kDim / blocks;
  if (thread == 0) shared.joining.arrive_expecting(blocks * (share * sizeof(float) + heads * sizeof(float2)));
  cluster_wait();  // all blocks have barriers
  for (int e = thread; e < heads * kDim; e += kThreads)
    send(arrived + rank * share + e % share, join_warps(e / kDim, e % kDim).x, shared.joining, e / share);
  if (thread < heads * blocks) {
    float3 const x = join_warps(thread / blocks, 0);
    send(&shared.all_totals[rank][thread / blocks], float2{x.y, x.z}, shared.joining, thread % blocks);
  }
  shared.joining.wait(0);
  for (int i = thread; i < share; i += kThreads) {
    int const e = rank * share + i;
    write(e, join(
                 blocks, [&](int r) { return shared.all_totals[r][e / kDim]; },
                 [&](int r) { return arrived[r * share + i]; }));
  }
}

}  // namespace lt2::dsa::sm90::step
