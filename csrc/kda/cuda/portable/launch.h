// One translation unit per element type.
#pragma once

#include "kda/kda.h"

namespace lt2::kda::portable {

struct Workspace;

// Whether a pass goes by chunks of tokens, else token by token; `values` is o or dO. Then by operands of 2
// bytes; workspaces in floats.
bool by_chunks(Inputs const& p, bool recurrent, Strided const& values);
template <Dtype>
int64_t chunk_workspace(ForwardParams const& p);
template <Dtype>
Status launch_chunks(ForwardParams const& p, float* workspace, void* stream);
template <Dtype>
int64_t chunk_workspace(BackwardParams const& p);
template <Dtype>
Status launch_chunk_scans(BackwardParams const& p, Workspace const& w, float* workspace, void* stream);
Status launch_chunk_gradients(BackwardParams const& p, Workspace const& w, void* stream);  // bf16 only

template <Dtype>
Status launch_forward(ForwardParams const& p, void* stream);
template <Dtype>
Status launch_backward(BackwardParams const& p, float* workspace, void* stream);
template <Dtype>
Status launch_step(StepParams const& p, void* stream);

}  // namespace lt2::kda::portable
