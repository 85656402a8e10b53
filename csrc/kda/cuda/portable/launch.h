// One translation unit per element type.
#pragma once

#include "kda/kda.h"

namespace lt2::kda::portable {

template <Dtype>
Status launch_forward(ForwardParams const& p, void* stream);
template <Dtype>
Status launch_backward(BackwardParams const& p, float* workspace, void* stream);
template <Dtype>
Status launch_step(StepParams const& p, void* stream);

}  // namespace lt2::kda::portable
