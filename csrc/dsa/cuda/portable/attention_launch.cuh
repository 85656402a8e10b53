#pragma once

#include <algorithm>

#include "common/cuda/launch.cuh"
#include "dsa/cuda/portable/attention_backward.cuh"
#include "dsa/cuda/portable/attention_launch.h"

namespace lt2::dsa::portable {

inline constexpr int kMaxHeads = 4;      // of a block
inline constexpr int64_t kMaxDim = 256;  // 32 lanes of 8 elements

// Of a selection: as many parts as it takes to fill a GPU where there are few queries, of at least 64 keys.
inline Cut cut_attention(AttentionParams const& p) {
  int64_t const group = p.query_heads / p.key_heads, head_blocks = ceil_div(group, kMaxHeads);
  int64_t const units = std::max<int64_t>(p.batch * p.tokens * p.key_heads * head_blocks, 1);
  int64_t const splits = std::max<int64_t>(std::min(kBlocks / units, p.topk / 64), 1);
  return {head_blocks, static_cast<int>(splits), ceil_div(p.topk, splits), nullptr};
}

// f(lanes of a row, heads of a block)
template <class F>
Status with_shape(AttentionParams const& p, F const& f) {
  auto const by_heads = [&](auto lanes) {
    if (p.query_heads == p.key_heads) return f(lanes, std::integral_constant<int, 1>{});
    return f(lanes, std::integral_constant<int, kMaxHeads>{});
  };
  int64_t const dim = std::max(p.dim, p.value_dim);
  if (dim <= 64) return by_heads(std::integral_constant<int, 8>{});
  if (dim <= 128) return by_heads(std::integral_constant<int, 16>{});
  return by_heads(std::integral_constant<int, 32>{});
}

template <Dtype kDtype>
Status launch_attention(AttentionForwardParams const& p, float* workspace, void* stream,
                        int const* condition) {
  using T = Element<kDtype>;
  Cut cut = cut_attention(p);
  if (condition != nullptr) {
    cut.splits = 1;
    cut.keys = p.topk;
  }
  cut.partial = workspace;
  int64_t const units = p.batch * p.tokens * p.key_heads * cut.head_blocks * cut.splits;
  Status const parts = with_shape(p, [&](auto lanes, auto heads) {
    return launch(attention_kernel<T, lanes, heads>, grid(units, condition), kThreads, 0, stream, p, cut,
                  units, condition);
  });
  if (parts != kOk || cut.splits == 1) return parts;
  return launch(join_splits<T>, p.batch * p.tokens * p.query_heads, kThreads, 0, stream, p, cut);
}

struct BackwardParts {
  float* delta;
  Lists lists;
  int64_t floats;
};

inline BackwardParts backward_parts(AttentionBackwardParams const& p, float* workspace) {
  BackwardParts parts{nullptr, cut_lists(p), 0};
  auto const take = [&](int64_t floats) {
    float* const part = workspace + parts.floats;
    parts.floats += ceil_div(floats, 64) * 64;
    return part;
  };
  parts.delta = take(p.batch * p.tokens * p.query_heads);
  parts.lists.counts = reinterpret_cast<int32_t*>(take(p.batch * parts.lists.blocks * p.keys));
  parts.lists.starts = reinterpret_cast<int64_t*>(take(2 * p.batch * (p.keys + 1)));
  parts.lists.queries = reinterpret_cast<int32_t*>(take(p.batch * p.tokens * p.topk));
  return parts;
}

template <Dtype kDtype>
Status launch_attention_backward(AttentionBackwardParams const& p, float* workspace, void* stream,
                                 int const* condition) {
  using T = Element<kDtype>;
  BackwardParts const parts = backward_parts(p, workspace);
  if (Status const s = list_queries(p, parts.lists, stream, condition); s != kOk) return s;
  int64_t const heads = p.batch * p.tokens * p.query_heads;
  Status const delta = launch(delta_kernel<T>, grid(ceil_div(heads, kThreads / kWarp), condition), kThreads,
                              0, stream, p, parts.delta, condition);
  if (delta != kOk) return delta;
  return with_shape(p, [&](auto lanes, auto most) {
    constexpr int kHeads = most > 1 ? 2 : 1;
    Cut const cut{ceil_div(p.query_heads / p.key_heads, kHeads), 1, p.topk, nullptr};
    int64_t const units = p.batch * p.tokens * p.key_heads * cut.head_blocks;
    Status const queries = launch(query_gradients<T, lanes, kHeads>, grid(units, condition), kThreads, 0,
                                  stream, p, cut, static_cast<float const*>(parts.delta), units, condition);
    if (queries != kOk) return queries;
    return launch(key_gradients<T, lanes>, grid(p.batch * p.keys * p.key_heads, condition), kThreads, 0,
                  stream, p, parts.lists, static_cast<float const*>(parts.delta), condition);
  });
}

}  // namespace lt2::dsa::portable
