// How a recurrence is spread over threads, for the dispatch.cpp of a family.
#pragma once

#include <algorithm>
#include <cstring>

#include "gdn/cpu/kernels.h"

namespace lt2::gdn {

constexpr int kSliceMultiple = 32;  // the kernels' panel width

// Value columns are independent: with fewer heads than threads, they are split too.
inline int slice_count(int64_t items, int value_dim, ThreadPool const& pool) {
  int64_t const wanted = items == 0 ? 1 : (pool.num_threads + items - 1) / items;
  int64_t const most = (value_dim + kSliceMultiple - 1) / kSliceMultiple;
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1)));
}

inline ValueSlice value_slice(int value_dim, int index, int count) {
  int const panels = (value_dim + kSliceMultiple - 1) / kSliceMultiple;
  int const width = (panels + count - 1) / count * kSliceMultiple;
  return {std::min(index * width, value_dim), std::min((index + 1) * width, value_dim)};
}

inline int64_t longest_sequence(Inputs const& p) {
  int64_t longest = 0;
  for (int64_t n = 0; n < p.sequences; ++n) longest = std::max(longest, sequence_span(p, n).length());
  return longest;
}

// Rows of x that belong to no sequence (before the first, after the last) are zero.
inline void zero_outside(Inputs const& p, Strided const& x, int heads, int64_t row_bytes,
                         int64_t element_bytes) {
  if (p.cu_seqlens == nullptr || x.data == nullptr) return;
  int64_t const first = p.sequences == 0 ? 0 : cu_seqlen(p, 0);
  int64_t const last = p.sequences == 0 ? 0 : cu_seqlen(p, p.sequences);
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (t >= first && t < last) continue;
    for (int h = 0; h < heads; ++h) {
      std::memset(static_cast<char*>(x.data) + (t * x.token + h * x.head) * element_bytes, 0, row_bytes);
    }
  }
}

inline int64_t element_bytes(Dtype t) { return t == Dtype::kFloat32 ? 4 : 2; }

}  // namespace lt2::gdn
