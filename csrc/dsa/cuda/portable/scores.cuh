// Scores of a tile of queries and a tile of keys in fp32, written to memory for select.cuh.
#pragma once

#include "common/cuda/element.cuh"
#include "dsa/cuda/portable/score_rows.h"
#include "dsa/cuda/portable/sequences.cuh"

namespace lt2::dsa::portable {

using namespace cuda;

// A block has the scores of kTileQueries queries (of one batch row) and kTileKeys keys. It takes the products
// of kRows (query, head) pairs at a time: all heads, padded to a power of two `head_rows`, of as many queries
// as fit; more than kRows heads in turns.
inline constexpr int kTileQueries = 32, kTileKeys = 256, kRows = 32, kScoreThreads = 128;
inline constexpr int kSlice = 64;  // of DI, in shared memory
inline constexpr int kKeyStride = kTileKeys + 4;

struct ScoreShared {
  float keys[kSlice][kKeyStride];
  float queries[kSlice][kRows];
  float weights[kRows];
  Sight sights[kTileQueries];
};

// 4 elements; `aligned`: they are one vector.
template <class T>
__device__ inline float4 load4(T const* x, bool aligned) {
  if constexpr (sizeof(T) == 4) {
    if (aligned) return *reinterpret_cast<float4 const*>(x);
  } else if (aligned) {
    uint2 const bits = *reinterpret_cast<uint2 const*>(x);
    T pairs[4];
    memcpy(pairs, &bits, sizeof(bits));
    return {to_float(pairs[0]), to_float(pairs[1]), to_float(pairs[2]), to_float(pairs[3])};
  }
  return {to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
}

// Elements [0, slice) of kTileKeys keys; zeros after the first `count`.
template <class T>
__device__ void load_keys(ScoreShared& shared, T const* keys, int64_t stride, int count, int slice,
                          bool aligned) {
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 4
  for (int i = warp; i < (kTileKeys / 8) * (kSlice / 16); i += kScoreThreads / 32) {
    int const key = i % (kTileKeys / 8) * 8 + lane / 4, d = i / (kTileKeys / 8) * 16 + lane % 4 * 4;
    if (d >= slice) continue;
    float4 const x = key < count ? load4(keys + key * stride + d, aligned) : float4{};
    shared.keys[d][key] = x.x;
    shared.keys[d + 1][key] = x.y;
    shared.keys[d + 2][key] = x.z;
    shared.keys[d + 3][key] = x.w;
  }
}

template <class T>
__global__ void __launch_bounds__(kScoreThreads, 3)
    score_tile(IndexerParams p, ScoreRows rows, int head_rows, bool aligned) {
  extern __shared__ __align__(16) unsigned char bytes[];
  ScoreShared& shared = *reinterpret_cast<ScoreShared*>(bytes);
  int const thread = threadIdx.x, lane = thread % 32;
  int64_t const tile = rows.first_tile + blockIdx.y, row = tile / rows.row_tiles;
  int64_t const query = tile % rows.row_tiles * rows.tile_rows;
  int const queries = static_cast<int>(min(int64_t{rows.tile_rows}, p.tokens - query));
  int64_t const first_key = int64_t{blockIdx.x} * kTileKeys;
  int const keys = static_cast<int>(min(int64_t{kTileKeys}, p.keys - first_key));

  bool seen = false;
  if (thread < queries) {
    Sight const s = sight(p, row, query + thread);
    shared.sights[thread] = s;
    seen = s.first < first_key + keys && int64_t{s.first} + s.count > first_key;
  }
  if (!__syncthreads_or(seen)) return;

  auto const* const q = static_cast<T const*>(p.q.data) + row * p.q.batch + query * p.q.token;
  auto const* const k = static_cast<T const*>(p.k.data) + row * p.k.batch + first_key * p.k.token;
  auto const* const w = static_cast<float const*>(p.weights.data);
  int const group_queries = kRows / head_rows, dim = static_cast<int>(p.dim),
            heads = static_cast<int>(p.heads);
  bool const resident = dim <= kSlice;
  if (resident) load_keys(shared, k, p.k.token, keys, dim, aligned);

  // This thread's rows are low .. low + 3 and low + 16 .. low + 19, its keys 8 from column on.
  int const low = lane % 4 * 4, column = thread / 4 * 8;
  for (int begin = 0; begin < queries; begin += group_queries) {
    float total[8] = {};
    for (int head = 0; head < heads; head += kRows) {
      float acc[8][8] = {};
      for (int d = 0; d < dim; d += kSlice) {
        int const slice = min(kSlice, dim - d);
        __syncthreads();
        if (!resident) load_keys(shared, k + d, p.k.token, keys, slice, aligned);
        for (int i = thread; i < kRows * kSlice; i += kScoreThreads) {
          int const r = i / kSlice, e = i % kSlice, t = begin + r / head_rows, h = head + r % head_rows;
          bool const valid = t < queries && h < heads && e < slice;
          shared.queries[e][r] = valid ? to_float(q[t * p.q.token + h * p.q.head + d + e]) : 0.f;
        }
        if (thread < kRows) {
          int const t = begin + thread / head_rows, h = head + thread % head_rows;
          shared.weights[thread] =
              t >= queries || h >= heads ? 0.f
              : w == nullptr ? 1.f
                             : w[row * p.weights.batch + (query + t) * p.weights.token + h * p.weights.head];
        }
        __syncthreads();
#pragma unroll 4
        for (int e = 0; e < slice; ++e) {
          float a[8], b[8];
          *reinterpret_cast<float4*>(a) = *reinterpret_cast<float4 const*>(&shared.queries[e][low]);
          *reinterpret_cast<float4*>(a + 4) = *reinterpret_cast<float4 const*>(&shared.queries[e][low + 16]);
          *reinterpret_cast<float4*>(b) = *reinterpret_cast<float4 const*>(&shared.keys[e][column]);
          *reinterpret_cast<float4*>(b + 4) = *reinterpret_cast<float4 const*>(&shared.keys[e][column + 4]);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int c = 0; c < 8; ++c) acc[i][c] = fmaf(a[i], b[c], acc[i][c]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int const r = low + i % 4 + i / 4 * 16;
        bool const valid = head + r % head_rows < heads;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float x = acc[i][c] * p.scale;
          if (p.relu && x < 0.f) x = 0.f;  // NaN stays
          acc[i][c] = valid ? x * shared.weights[r] : 0.f;
        }
      }
      // Of each group of head_rows rows the first gets the sum.
#pragma unroll
      for (int c = 0; c < 8; ++c) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          if (head_rows >= 2) {
            acc[i][c] += acc[i + 1][c];
            acc[i + 2][c] += acc[i + 3][c];
          }
          if (head_rows >= 4) acc[i][c] += acc[i + 2][c];
          if (head_rows >= 8) acc[i][c] += __shfl_xor_sync(0xffffffffu, acc[i][c], 1);
          if (head_rows >= 16) acc[i][c] += __shfl_xor_sync(0xffffffffu, acc[i][c], 2);
        }
        if (head_rows >= 32) acc[0][c] += acc[4][c];
      }
      if (heads > kRows) {
#pragma unroll
        for (int c = 0; c < 8; ++c) acc[0][c] = total[c] += acc[0][c];
      }
      if (head + kRows < heads) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int const r = low + i % 4 + i / 4 * 16, t = begin + r / head_rows;
        if (r % head_rows != 0 || t >= queries) continue;
        Sight const s = shared.sights[t];
        int64_t const at = first_key + column - s.first;
        float* const out = rows.scores + (int64_t{blockIdx.y} * rows.tile_rows + t) * rows.stride;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (at + c >= 0 && at + c < s.count) out[at + c] = acc[i][c];
        }
      }
    }
  }
}

}  // namespace lt2::dsa::portable
