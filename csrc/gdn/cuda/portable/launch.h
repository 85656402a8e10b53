// One translation unit per element type.
#pragma once

#include "gdn/gdn.h"

namespace lt2::gdn::portable {

template <Dtype>
Status launch_forward(ForwardParams const& p, void* stream);
// bf16 and fp16.
template <Dtype>
Status launch_chunks(ForwardParams const& p, float* workspace, void* stream);
template <Dtype>
Status launch_backward(BackwardParams const& p, float* workspace, void* stream);
template <Dtype>
Status launch_step(StepParams const& p, void* stream);

}  // namespace lt2::gdn::portable
