// One translation unit per element type.
#pragma once

#include "kda/kda.h"

namespace lt2::kda::portable {

// By chunks of tokens, operands of 2 bytes only; floats of workspace.
template <Dtype>
int64_t chunk_workspace(ForwardParams const& p);
template <Dtype>
Status launch_chunks(ForwardParams const& p, float* workspace, void* stream);

template <Dtype>
Status launch_forward(ForwardParams const& p, void* stream);
template <Dtype>
Status launch_backward(BackwardParams const& p, float* workspace, void* stream);
template <Dtype>
Status launch_step(StepParams const& p, void* stream);

}  // namespace lt2::kda::portable
