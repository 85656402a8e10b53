// One translation unit per element type.
#pragma once

#include "kda/kda.h"

namespace lt2::kda::portable {

struct Workspace;

inline constexpr int kChunkSharedBytes = 227 << 10;  // what blocks of the kernels by chunks may take

// Whether a pass goes by chunks of tokens, else token by token; then of operands of 2 bytes. Workspaces in
// floats.
bool by_chunks(Inputs const& p, bool recurrent);
// Whether q, k, v and `values`, which is o or dO, are made of aligned pieces of 16 bytes, and g of 8.
bool whole_rows(Inputs const& p, Strided const& values);
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
