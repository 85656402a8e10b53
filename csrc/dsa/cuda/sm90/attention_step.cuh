// Attention of few queries over their selections. A cluster of blocks has a query and up to 16 heads of a key
// head; each warp takes 16 of the selected keys at a time, heads on the rows of its products, with a softmax
// of its own and copies of the next keys under way. What warps and blocks have is joined over distributed
// shared memory: one launch.
#pragma once

#include <cstdint>

#include "common/cuda/cluster.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/overlap.cuh"
#include "dsa/cuda/portable/rows.cuh"

namespace lt2::dsa::sm90::step {

using namespace cuda;

inline constexpr int kWarps = 4, kThreads = kWarps * kWarp, kHeads = 16, kKeys = 16, kStages = 3;
inline constexpr int kMostBlocks = 8;  // of a cluster

template <int kDim>
struct Shared {
  static constexpr int kRowBytes = 2 * kDim;
  union {
    // [K, V]; 16-byte chunk c of row r is at chunk c ^ (r % 8)
    alignas(16) char rows[kWarps][kStages][2][kKeys * kRowBytes];
    float parts[kWarps][kHeads][kDim];
  };
  float tops[kWarps][kHeads], sums[kWarps][kHeads];
  float joined[kHeads][kDim], top[kHeads], sum[kHeads];  // of the block
};

__device__ __forceinline__ float finite_or_zero(float x) { return x == -INFINITY ? 0.f : x; }

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads)
    step_kernel(__grid_constant__ AttentionForwardParams const p, int blocks, int head_blocks) {
  using Memory = Shared<kDim>;
  constexpr int kChunks = kDim / 8, kRows = kWarp / kChunks;  // 16 bytes each; rows of one copy by a warp
  extern __shared__ __align__(128) char bytes[];
  auto& shared = *reinterpret_cast<Memory*>(bytes);
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
      char* const to = shared.rows[warp][stage][which];
      T const* const from = (which == 0 ? k : v) + lane % kChunks * 8;
      int64_t const token_stride = which == 0 ? p.k.token : p.v.token;
#pragma unroll 4
      for (int i = 0; i < kKeys / kRows; ++i) {
        int const r = i * kRows + lane / kChunks, number = __shfl_sync(0xffffffffu, key, r);
        copy_16(to + r * Memory::kRowBytes + ((lane % kChunks ^ (r % 8)) << 4),
                from + max(number, 0) * token_stride, number >= 0);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    return __ballot_sync(0xffffffffu, key >= 0);
  };
  int ahead[kStages + 1];
  unsigned present[kStages];
#pragma unroll
  for (int i = 0; i <= kStages; ++i) ahead[i] = key_of(i);
#pragma unroll
  for (int i = 0; i < kStages; ++i) present[i] = load(i, ahead[i]);
  int next = ahead[kStages];

  // Rows lane / 4 and + 8 are heads.
  uint32_t q[kDim / 16][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const h = lane / 4 + 8 * half;
    auto const* const from = portable::row_of<T const>(p.q, row, token, first_head + h) + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        q[j][half + 2 * c] = h < heads ? *reinterpret_cast<uint32_t const*>(from + 16 * j + 8 * c) : 0;
      }
    }
  }
  float o[kChunks][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
  float const scale = p.scale * portable::kLog2E;

  auto const attend = [&](int stage, unsigned present) {
    char const* const keys = shared.rows[warp][stage][0];
    char const* const values = shared.rows[warp][stage][1];
    auto const address = [&](char const* rows, int r, int chunk) {
      return shared_address(rows + r * Memory::kRowBytes + ((chunk ^ (r % 8)) << 4));
    };
    float s[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < kDim / 32; ++j) {
        uint32_t b[4];
        load_matrices(b, address(keys, 8 * n + lane % 8, 4 * j + lane / 8));
        mma<T>(s[n], q[2 * j], b[0], b[1]);
        mma<T>(s[n], q[2 * j + 1], b[2], b[3]);
      }
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
    uint32_t const a[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]), pack<T>(s[1][0], s[1][1]),
                           pack<T>(s[1][2], s[1][3])};
#pragma unroll
    for (int c = 0; c < kChunks; c += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, address(values, lane % 16, c + lane / 16));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[c + i][e] *= decay[e / 2];
        mma<T>(o[c + i], a, b[2 * i], b[2 * i + 1]);
      }
    }
  };
  int stage = 0;
#pragma unroll 1
  for (int64_t i = 0; own + i * stride < steps; ++i) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
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
