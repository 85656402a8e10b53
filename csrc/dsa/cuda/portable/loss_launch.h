// One translation unit per element type.
#pragma once

#include "dsa/dsa.h"

namespace lt2::dsa::portable {

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

}  // namespace lt2::dsa::portable
