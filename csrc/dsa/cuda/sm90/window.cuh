// Consecutive keys instead of a selection: each query sees the newest topk of its keys. So a tile's keys are
// a range, and where the ranges of its rows begin and end says what their bits would be.
#pragma once

#include "dsa/cuda/sm90/mask.cuh"

namespace lt2::dsa::sm90 {

// Keys or queries [first, end) of a batch row.
struct Range {
  int first, end;
};

__device__ inline Range keys_of(AttentionParams const& p, int64_t row, int64_t token) {
  if (token >= p.tokens) return {0, 0};
  portable::Sight const seen = portable::sight(p, row, token);
  int const end = seen.first + seen.count;
  return {end - static_cast<int>(min(int64_t{seen.count}, p.topk)), end};
}

__device__ inline Range queries_of(AttentionParams const& p, int64_t row, int64_t key) {
  int64_t n = row, begin = 0, queries = p.tokens, first = 0, keys = p.keys;
  if (p.cu_seqlens.data != nullptr) {
    if (p.sequences == 0) return {0, 0};
    n = portable::sequence_of(p.cu_seqlens_k, p.sequences, key, p.keys);
    first = portable::offset_at(p.cu_seqlens_k, n, p.keys);
    keys = portable::offset_at(p.cu_seqlens_k, n + 1, p.keys) - first;
    begin = portable::offset_at(p.cu_seqlens, n, p.tokens);
    queries = portable::offset_at(p.cu_seqlens, n + 1, p.tokens) - begin;
  }
  key -= first;
  if (key < 0 || key >= keys || queries <= 0) return {0, 0};
  int64_t const position =
      p.q_offset == nullptr ? keys - queries : portable::clamp(p.q_offset[n], -queries, keys);
  int64_t const oldest = portable::clamp(key - position, 0, queries);
  int64_t const end =
      key + p.topk >= keys ? queries : portable::clamp(key + p.topk - position, oldest, queries);
  return {static_cast<int>(begin + oldest), static_cast<int>(begin + end)};
}

// The tiles that the ranges of a tile's rows meet, by one warp.
__device__ inline Range tiles_of(Range const* ranges) {
  int first = INT32_MAX, end = 0;
  for (int i = threadIdx.x % kWarp; i < kTile; i += kWarp) {
    Range const own = ranges[i];
    if (own.first >= own.end) continue;
    first = min(first, own.first);
    end = max(end, own.end);
  }
  first = __reduce_min_sync(0xffffffffu, first) / kTile;
  end = (__reduce_max_sync(0xffffffffu, end) + kTile - 1) / kTile;
  return {min(first, end), end};
}

// Word t of the bits of a tile's first `count`.
__device__ __forceinline__ uint32_t first_bits(int count, int t) {
  int const inside = min(max(count, 0), kTile);
  int const bits = inside / 8 * 2 + min(max(inside % 8 - 2 * t, 0), 2);
  return bits < 32 ? (1u << bits) - 1 : 0xffffffffu;
}

// Word t of the bits of a range in a tile.
__device__ __forceinline__ uint32_t bits_of(Range const& range, int tile, int t) {
  return first_bits(range.end - tile * kTile, t) & ~first_bits(range.first - tile * kTile, t);
}

}  // namespace lt2::dsa::sm90
