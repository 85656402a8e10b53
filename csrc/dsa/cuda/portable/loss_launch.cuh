#pragma once

#include "dsa/cuda/portable/loss_gather.cuh"
#include "dsa/cuda/portable/loss_launch.h"

namespace lt2::dsa::portable {

inline LossParts loss_parts(LossParams const& p, float* workspace) {
  LossParts parts{nullptr, nullptr, nullptr, cut_lists(p), nullptr, 0};
  auto const take = [&](int64_t floats) {
    float* const part = workspace + parts.floats;
    parts.floats += ceil_div(floats, 64) * 64;
    return part;
  };
  parts.log_z = take(p.batch * p.tokens);
  parts.mass = take(p.batch * p.tokens);
  parts.rows = take(1);
  if (p.gradients && !p.dense) {
    parts.lists.counts = reinterpret_cast<int32_t*>(take(p.batch * parts.lists.blocks * p.keys));
    parts.lists.starts = reinterpret_cast<int64_t*>(take(2 * p.batch * (p.keys + 1)));
    parts.lists.queries = reinterpret_cast<int32_t*>(take(p.batch * p.tokens * p.topk));
    parts.lists.slots = gather::takes(p);
    if (parts.lists.slots) parts.gradients = take(p.batch * p.tokens * p.topk);
  }
  return parts;
}

template <Dtype kDtype>
Status launch_loss(LossParams const& p, float* loss, float* workspace, void* stream) {
  using T = Element<kDtype>;
  LossParts const parts = loss_parts(p, workspace);
  if constexpr (kDtype != Dtype::kFloat32) {
    if (gather::takes(p)) {
      auto const with_index = [&](auto dim) {
        return p.index_dim == 64 ? gather::launch_loss<T, dim, 64>(p, parts, loss, stream)
                                 : gather::launch_loss<T, dim, 128>(p, parts, loss, stream);
      };
      return p.dim == 64 ? with_index(std::integral_constant<int, 64>{})
                         : with_index(std::integral_constant<int, 128>{});
    }
  }
  auto const grid_of = [&](int64_t columns) {
    return dim3(static_cast<unsigned>(columns), static_cast<unsigned>(std::min<int64_t>(p.batch, 65535)));
  };
  auto const with_lanes = [&](auto lanes) {
    int const shared = static_cast<int>(shared_floats(p, p.query_heads, p.index_heads) * sizeof(float));
    Status status = launch(loss_rows<T, lanes>, grid_of(p.tokens), kThreads, shared, stream, p, parts);
    if (status == kOk) status = launch(mean_kernel<1024>, int64_t{1}, 1024, 0, stream, p, parts, loss);
    if (status != kOk || !p.gradients) return status;
    status = launch(loss_query_gradients<T, lanes>, grid_of(p.tokens), kThreads, shared, stream, p, parts);
    if (status == kOk && !p.dense) status = list_queries(p, parts.lists, stream, nullptr);
    if (status != kOk) return status;
    int const key_shared = static_cast<int>(shared_floats(p, p.key_heads, 1) * sizeof(float));
    return launch(loss_key_gradients<T, lanes>, grid_of(p.keys), kThreads, key_shared, stream, p, parts);
  };
  int64_t const dim = std::max(p.dim, p.index_dim);
  if (dim <= 128) return with_lanes(std::integral_constant<int, 16>{});
  return with_lanes(std::integral_constant<int, 32>{});
}

}  // namespace lt2::dsa::portable
