// Linear attention with a scalar decay by chunks, for operands of 2 bytes: one translation unit per type.
#pragma once

#include "gdn/cuda/portable/simple_tile.cuh"

namespace lt2::gdn::portable {

// Whether there are kernels for p.
bool simple_supports(Inputs const& p);

// How sequences are cut so that there are blocks for all multiprocessors, and the floats that it takes for
// each direction.
SegmentPlan simple_plan(Inputs const& p, int directions, float* workspace);
int64_t simple_plan_floats(Inputs const& p, int directions);

// Floats of a state, in the type of the operands, at every chunk.
int64_t simple_edge_floats(Inputs const& p);
int64_t simple_backward_floats(BackwardParams const& p);

template <Dtype>
Status launch_simple_forward(ForwardParams const& p, float* workspace, void* stream);
template <Dtype>
Status launch_simple_backward(BackwardParams const& p, float* workspace, void* stream);

}  // namespace lt2::gdn::portable
