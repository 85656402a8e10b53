#pragma once

#include "gdn/cuda/portable/gradients.cuh"
#include "gdn/cuda/portable/launch.h"
#include "gdn/cuda/portable/scan_launch.cuh"
#include "gdn/cuda/portable/sizes.cuh"

namespace lt2::gdn::portable {

template <Dtype kDtype>
Status launch_forward(ForwardParams const& p, void* stream) {
  return scan_forward<Column, Element<kDtype>>(p, stream);
}

template <Dtype kDtype>
Status launch_backward(BackwardParams const& p, float* workspace, void* stream) {
  using T = Element<kDtype>;
  int64_t const chunks = chunk_numbers(p);
  Workspace const w = take_workspace(p, workspace);
  Status const scans = scan_backward<Column, T>(p, w, stream);
  if (scans != kOk) return scans;
  Status const gradients = launch(chunk_gradients<T>, chunks * p.value_heads, kGradientThreads,
                                  static_cast<int>(sizeof(GradientShared)), stream, p, w);
  if (gradients != kOk) return gradients;
  Status const heads = launch(gather_heads<T>, chunks * p.heads, kGradientThreads, 0, stream, p, w);
  if (heads != kOk || p.A_log == nullptr) return heads;
  return launch(gate_gradients, p.sequences * p.value_heads, kGradientThreads, 0, stream, p);
}

template <Dtype kDtype>
Status launch_step(StepParams const& p, void* stream) {
  return scan_step<Column, Element<kDtype>>(p, stream);
}

}  // namespace lt2::gdn::portable
