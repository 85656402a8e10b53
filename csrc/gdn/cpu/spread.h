// How a recurrence is spread over threads, for the dispatch.cpp of a family.
#pragma once

#include <algorithm>
#include <cstring>

#include "gdn/cpu/kernels.h"

namespace lt2::gdn {

constexpr int kSliceMultiple = 32;             // the kernels' panel width
constexpr int64_t kStepGrainFloats = 1 << 14;  // less state than this is not worth another thread

// Value columns are independent: with fewer heads than threads, they are split too.
inline int slice_count(int64_t items, int value_dim, ThreadPool const& pool) {
  int64_t const wanted = items == 0 ? 1 : (pool.num_threads + items - 1) / items;
  int64_t const most = (value_dim + kSliceMultiple - 1) / kSliceMultiple;
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1)));
}

// Heads of an item: the most that the kernel wants with which it takes no longer than head by head.
template <class Kernels>
int forward_heads(Kernels const& kernels, ForwardParams const& p, ThreadPool const& pool) {
  auto const longest = [&](int heads) {  // heads that one thread has; packed sequences are of any length
    int64_t const groups = (p.value_heads + heads - 1) / heads * (p.cu_seqlens == nullptr ? p.sequences : 1);
    return (groups + pool.num_threads - 1) / pool.num_threads * heads;
  };
  int heads = std::clamp(kernels.forward_heads(p), 1, std::max(1, p.value_heads));
  while (longest(heads) > longest(1)) --heads;
  return heads;
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

// `kernels` is the function table of a family, whose entries take these items.
template <class Kernels>
int64_t spread_forward_workspace(Kernels const& kernels, ForwardParams const& p, ThreadPool const& pool) {
  int const heads = forward_heads(kernels, p, pool);
  int64_t const groups = p.sequences * ((p.value_heads + heads - 1) / heads);
  int const slices = slice_count(p.sequences * p.value_heads, p.value_dim, pool);
  return kernels.forward_workspace(p, heads, slices) * pool.lanes(groups * slices);
}

template <class Kernels>
void spread_forward(Kernels const& kernels, ForwardParams const& p, float* workspace,
                    ThreadPool const& pool) {
  int64_t const size = element_bytes(p.dtype);
  int const heads = forward_heads(kernels, p, pool), per_sequence = (p.value_heads + heads - 1) / heads;
  int64_t const groups = p.sequences * per_sequence;
  int const slices = slice_count(p.sequences * p.value_heads, p.value_dim, pool);
  int64_t const lane_floats = kernels.forward_workspace(p, heads, slices);
  zero_outside(p, p.o, p.value_heads, p.value_dim * size, size);
  pool.items(groups * slices, [&](int64_t item, int lane) {
    ValueSlice const slice = value_slice(p.value_dim, static_cast<int>(item % slices), slices);
    if (slice.begin == slice.end) return;
    int64_t const group = item / slices;
    int const begin = static_cast<int>(group % per_sequence) * heads;
    kernels.forward(p, group / per_sequence, {begin, std::min(begin + heads, p.value_heads)}, slice,
                    workspace + lane * lane_floats);
  });
}

template <class Kernels>
int64_t spread_backward_workspace(Kernels const& kernels, BackwardParams const& p, ThreadPool const& pool) {
  return kernels.backward_workspace(p, longest_sequence(p)) * pool.lanes(p.sequences * p.heads);
}

// A decay has `decay_dim` numbers.
template <class Kernels>
void spread_backward(Kernels const& kernels, BackwardParams const& p, int64_t decay_dim, float* workspace,
                     ThreadPool const& pool) {
  int64_t const size = element_bytes(p.dtype), f32 = sizeof(float);
  zero_outside(p, p.dq, p.heads, p.key_dim * size, size);
  zero_outside(p, p.dk, p.heads, p.key_dim * size, size);
  zero_outside(p, p.dv, p.value_heads, p.value_dim * size, size);
  zero_outside(p, p.dg, p.value_heads, decay_dim * f32, f32);
  zero_outside(p, p.dbeta, p.value_heads, f32, f32);
  int64_t const lane_floats = kernels.backward_workspace(p, longest_sequence(p));
  pool.items(p.sequences * p.heads, [&](int64_t item, int lane) {
    kernels.backward(p, item / p.heads, static_cast<int>(item % p.heads), workspace + lane * lane_floats);
  });
}

// Equal items in fixed ranges: from step to step a head's state stays in the cache of one core.
template <class Kernels, class StepParams>
void spread_step(Kernels const& kernels, StepParams const& p, ThreadPool const& pool) {
  int64_t const heads = p.batch * p.value_heads;
  int const slices = slice_count(heads, p.value_dim, pool);
  int64_t const item_floats = std::max<int64_t>(1, static_cast<int64_t>(p.key_dim) * p.value_dim / slices);
  pool.ranges(0, heads * slices, 1 + kStepGrainFloats / item_floats, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      ValueSlice const slice = value_slice(p.value_dim, static_cast<int>(item % slices), slices);
      if (slice.begin == slice.end) continue;
      int64_t const head = item / slices;
      kernels.step(p, head / p.value_heads, static_cast<int>(head % p.value_heads), slice);
    }
  });
}

}  // namespace lt2::gdn
