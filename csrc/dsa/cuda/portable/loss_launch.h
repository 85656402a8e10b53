// One translation unit per element type.
#pragma once

#include <type_traits>

#include "dsa/dsa.h"

namespace lt2::dsa {

// f(D, DI) as constants, where both are 64 or 128.
template <class F>
Status with_dims(LossParams const& p, F const& f) {
  auto const with_index = [&](auto dim) {
    return p.index_dim == 64 ? f(dim, std::integral_constant<int, 64>{})
                             : f(dim, std::integral_constant<int, 128>{});
  };
  return p.dim == 64 ? with_index(std::integral_constant<int, 64>{})
                     : with_index(std::integral_constant<int, 128>{});
}

namespace portable {

template <Dtype>
Status launch_loss(LossForwardParams const& p, void* stream, int const* condition);
template <Dtype>
Status launch_loss_backward(LossBackwardParams const& p, float* workspace, void* stream,
                            int const* condition);

// For sm90: what indexer_loss() and indexer_loss_backward() compute, but where `condition` is zero; the
// former without the mean.
Status loss_rows_if(LossForwardParams const& p, void* stream, int const* condition);
Status loss_mean(LossForwardParams const& p, void* stream);
Status loss_backward_if(LossBackwardParams const& p, float* workspace, void* stream, int const* condition);

}  // namespace portable
}  // namespace lt2::dsa
