// Which keys a query sees.
#pragma once

#include <cuda_runtime.h>

#include "dsa/dsa.h"

namespace lt2::dsa::portable {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Keys [first, first + count) of the query's batch row; indices count from `first`.
struct Sight {
  int first, count;
};

__device__ inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return min(max(x, low), high); }

__device__ inline int64_t offset_at(Offsets const& offsets, int64_t n, int64_t limit) {
  int64_t const offset = offsets.int64 ? static_cast<int64_t const*>(offsets.data)[n]
                                       : static_cast<int32_t const*>(offsets.data)[n];
  return clamp(offset, 0, limit);
}

// The last of the sequences that begin up to `token`.
__device__ inline int64_t sequence_of(Offsets const& offsets, int64_t sequences, int64_t token,
                                      int64_t limit) {
  int64_t n = 0, end = sequences;
  while (end - n > 1) {
    int64_t const middle = (n + end) / 2;
    (offset_at(offsets, middle, limit) <= token ? n : end) = middle;
  }
  return n;
}

__device__ inline Sight sight(Sequences const& p, int64_t row, int64_t token) {
  int64_t n = row, begin = 0, queries = p.tokens, first = 0, keys = p.keys;
  if (p.cu_seqlens.data != nullptr) {
    if (p.sequences == 0) return {0, 0};
    n = sequence_of(p.cu_seqlens, p.sequences, token, p.tokens);
    begin = offset_at(p.cu_seqlens, n, p.tokens);
    queries = offset_at(p.cu_seqlens, n + 1, p.tokens) - begin;
    if (token < begin || token >= begin + queries) return {0, 0};
    first = offset_at(p.cu_seqlens_k, n, p.keys);
    keys = max(offset_at(p.cu_seqlens_k, n + 1, p.keys) - first, int64_t{0});
  }
  int64_t const position = p.q_offset == nullptr ? keys - queries : clamp(p.q_offset[n], -queries, keys);
  return {static_cast<int>(first), static_cast<int>(clamp(position + token - begin + 1, 0, keys))};
}

}  // namespace lt2::dsa::portable
