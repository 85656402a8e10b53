#pragma once

#include "dsa/cuda/portable/loss_gather.cuh"
#include "dsa/cuda/portable/loss_launch.h"

namespace lt2::dsa::portable {

inline LossParts loss_parts(LossBackwardParams const& p, float* workspace) {
  LossParts parts{cut_lists(p), nullptr, 0};
  if (p.dense) return parts;
  auto const take = [&](int64_t floats) {
    float* const part = workspace + parts.floats;
    parts.floats += ceil_div(floats, 64) * 64;
    return part;
  };
  parts.lists.counts = reinterpret_cast<int32_t*>(take(p.batch * parts.lists.blocks * p.keys));
  parts.lists.starts = reinterpret_cast<int64_t*>(take(2 * p.batch * (p.keys + 1)));
  parts.lists.queries = reinterpret_cast<int32_t*>(take(p.batch * p.tokens * p.topk));
  parts.lists.slots = gather::takes(p);
  if (parts.lists.slots) parts.gradients = take(p.batch * p.tokens * p.topk);
  return parts;
}

// f(lanes of a group)
template <class F>
Status with_lanes(LossParams const& p, F const& f) {
  return std::max(p.dim, p.index_dim) <= 128 ? f(std::integral_constant<int, 16>{})
                                             : f(std::integral_constant<int, 32>{});
}

template <Dtype kDtype>
Status launch_loss(LossForwardParams const& p, void* stream, int const* condition) {
  using T = Element<kDtype>;
  if constexpr (kDtype != Dtype::kFloat32) {
    if (gather::takes(p)) {
      return with_dims(p, [&](auto dim, auto index_dim) {
        return gather::launch_rows<T, dim, index_dim>(p, nullptr, stream, condition);
      });
    }
  }
  int const shared = static_cast<int>(shared_floats(p, p.query_heads, p.index_heads) * sizeof(float));
  return with_lanes(p, [&](auto lanes) {
    return launch(loss_rows<T, lanes>, grid(p.batch * p.tokens, condition), kThreads, shared, stream, p,
                  condition);
  });
}

template <Dtype kDtype>
Status launch_loss_backward(LossBackwardParams const& p, float* workspace, void* stream,
                            int const* condition) {
  using T = Element<kDtype>;
  LossParts const parts = loss_parts(p, workspace);
  if constexpr (kDtype != Dtype::kFloat32) {
    if (gather::takes(p)) {
      return with_dims(p, [&](auto dim, auto index_dim) {
        return gather::launch_gradients<T, dim, index_dim>(p, parts, stream, condition);
      });
    }
  }
  int const shared = static_cast<int>(shared_floats(p, p.query_heads, p.index_heads) * sizeof(float));
  int const key_shared = static_cast<int>(shared_floats(p, p.key_heads, 1) * sizeof(float));
  return with_lanes(p, [&](auto lanes) {
    Status status = launch(loss_query_gradients<T, lanes>, grid(p.batch * p.tokens, condition), kThreads,
                           shared, stream, p, condition);
    if (status == kOk && !p.dense) status = list_queries(p, parts.lists, stream, condition);
    if (status != kOk) return status;
    return launch(loss_key_gradients<T, lanes>, grid(p.batch * p.keys, condition), kThreads, key_shared,
                  stream, p, parts, condition);
  });
}

}  // namespace lt2::dsa::portable
