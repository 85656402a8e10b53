// Attention of few queries over their selections. A cluster of blocks has a query and up to 16 heads of a key
// head; each warp takes 16 of the selected keys at a time, heads on the rows of its products, with a softmax
// of its own and copies of the next keys under way. What warps and blocks have is joined over distributed
// shared memory: one launch.
#pragma once

#include <cstdint>

#include "common/cuda/cluster.cuh"
#include "common/cuda/overlap.cuh"
#include "dsa/cuda/portable/gather.cuh"

namespace lt2::dsa::sm90::step {

using namespace cuda;

inline constexpr int kWarps = 4, kThreads = kWarps * kWarp, kHeads = 16, kKeys = 16;
inline constexpr int kMostBlocks = 8;  // of a cluster

template <int kDim, int kStages>
struct Shared {
  union {
    alignas(16) char rows[kWarps][kStages][2][portable::RowTile<kDim>::kBytes];  // of K, V
    float parts[kWarps][kHeads][kDim];
  };
  float tops[kWarps][kHeads], sums[kWarps][kHeads];
  float joined[kHeads][kDim], top[kHeads], sum[kHeads];  // of the block
};

__device__ __forceinline__ float finite_or_zero(float x) { return x == -INFINITY ? 0.f : x; }

template <class T, int kDim, int kStages>
__global__ void __launch_bounds__(kThreads)
    step_kernel(__grid_constant__ AttentionForwardParams const p, int blocks, int head_blocks) {
  using Tile = portable::RowTile<kDim>;
  constexpr int kChunks = kDim / 8;
  extern __shared__ __align__(128) char bytes[];
  auto& shared = *reinterpret_cast<Shared<kDim, kStages>*>(bytes);
  wait_for_previous_kernel();
  int const thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, rank = cluster_rank();
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
  int64_t const steps = portable::ceil_div(p.topk, kKeys), stride = int64_t{blocks} * kWarps;
  int64_t const own = rank * kWarps + warp;
  auto const key_of = [&](int64_t i) {
    return portable::selected_key(p, indices, seen,
                                  lane < kKeys ? (own + i * stride) * kKeys + lane : p.topk);
  };
  // Returns which keys there are.
  auto const load = [&](int stage, int key) {
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      Tile::copy(shared.rows[warp][stage][which], which == 0 ? k : v, which == 0 ? p.k.token : p.v.token, key,
                 lane);
    }
    portable::commit_copies();
    return __ballot_sync(0xffffffffu, key >= 0);
  };
  int ahead[kStages + 1];
  unsigned present[kStages];
#pragma unroll
  for (int i = 0; i <= kStages; ++i) ahead[i] = key_of(i);
#pragma unroll
  for (int i = 0; i < kStages; ++i) present[i] = load(i, ahead[i]);
  int next = ahead[kStages];

  uint32_t q[kDim / 16][4];  // rows are heads
  Tile::load_fragments(q, portable::row_of<T const>(p.q, row, token, first_head), p.q.head, heads, lane);
  float o[kChunks][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
  float const scale = p.scale * portable::kLog2E;

  auto const attend = [&](int stage, unsigned present) {
    float s[2][4] = {};
    Tile::template multiply<T>(s, q, shared.rows[warp][stage][0], lane);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!(present >> (8 * n + 2 * (lane % 4) + e % 2) & 1)) s[n][e] = -INFINITY;
      }
    }
    float decay[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest =
          fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      highest = fmaxf(highest, top[half]);
      float const base = finite_or_zero(highest) * scale;
      decay[half] = exp2f(top[half] * scale - base);
      top[half] = highest;
      sum[half] *= decay[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * half + e];
          x = exp2f(x * scale - base);
          sum[half] += x;
        }
      }
    }
    uint32_t a[4];
    portable::pack_fragments<T>(a, s);
    Tile::template accumulate<T>(o, a, shared.rows[warp][stage][1], lane, [&](float (&x)[4]) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] *= decay[e / 2];
    });
  };
  int stage = 0;
#pragma unroll 1
  for (int64_t i = 0; own + i * stride < steps; ++i) {
    portable::wait_copies_but<kStages - 1>();
    __syncwarp();
    attend(stage, present[0]);
    __syncwarp();
#pragma unroll
    for (int j = 1; j < kStages; ++j) present[j - 1] = present[j];
    present[kStages - 1] = load(stage, next);
    next = key_of(i + kStages + 1);
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
  wait_copies();
  __syncthreads();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const h = lane / 4 + 8 * half;
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    if (h >= heads) continue;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      *reinterpret_cast<float2*>(&shared.parts[warp][h][8 * c + 2 * (lane % 4)]) = {o[c][2 * half],
                                                                                    o[c][2 * half + 1]};
    }
    if (lane % 4 == 0) shared.tops[warp][h] = top[half], shared.sums[warp][h] = sum[half];
  }
  __syncthreads();
  // f(value, top, sum) of element d of head h, out of `count` parts.
  auto const join = [&](int count, auto const& part_top, auto const& part_sum, auto const& part,
                        auto const& f) {
    float highest = -INFINITY, total = 0.f, value = 0.f;
#pragma unroll 8
    for (int i = 0; i < count; ++i) highest = fmaxf(highest, part_top(i));
    float const base = finite_or_zero(highest) * scale;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      float const weight = exp2f(part_top(i) * scale - base);
      total += weight * part_sum(i);
      value += weight * part(i);
    }
    f(value, highest, total);
  };
  for (int e = thread; e < heads * kDim; e += kThreads) {
    int const h = e / kDim, d = e % kDim;
    join(
        kWarps, [&](int w) { return shared.tops[w][h]; }, [&](int w) { return shared.sums[w][h]; },
        [&](int w) { return shared.parts[w][h][d]; },
        [&](float value, float highest, float total) {
          shared.joined[h][d] = value;
          if (d == 0) shared.top[h] = highest, shared.sum[h] = total;
        });
  }
  cluster_sync();
  for (int e = rank * kThreads + thread; e < heads * kDim; e += blocks * kThreads) {
    int const h = e / kDim, d = e % kDim;
    join(
        blocks, [&](int r) { return *of_rank(&shared.top[h], r); },
        [&](int r) { return *of_rank(&shared.sum[h], r); },
        [&](int r) { return *of_rank(&shared.joined[h][d], r); },
        [&](float value, float highest, float total) {
          portable::row_of<T>(p.o, row, token, first_head + h)[d] =
              from_float<T>(total == 0.f ? 0.f : value / total);
          if (d == 0) p.lse[query * p.query_heads + first_head + h] = highest * p.scale + logf(total);
        });
  }
  cluster_sync();
}

}  // namespace lt2::dsa::sm90::step
