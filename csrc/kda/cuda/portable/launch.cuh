#pragma once

#include "gdn/cuda/portable/scan_launch.cuh"
#include "gdn/cuda/portable/sizes.cuh"
#include "kda/cuda/portable/gradients.cuh"
#include "kda/cuda/portable/launch.h"
#include "kda/cuda/portable/scan.cuh"

namespace lt2::kda::portable {

template <Dtype kDtype>
Status launch_forward(ForwardParams const& p, void* stream) {
  return scan_forward<Column, Element<kDtype>>(p, stream);
}

template <Dtype kDtype>
Status launch_backward(BackwardParams const& p, float* workspace, void* stream) {
  using T = Element<kDtype>;
  int64_t const chunks = chunk_numbers(p);
  float* const records = workspace;
  bool chunked = false;
  if constexpr (kDtype != Dtype::kFloat32) {
    chunked = by_chunks(p, p.recurrent);
    if (chunked) workspace += chunk_workspace<kDtype>(p);
  }
  Workspace w{take_workspace(p, workspace)};
  w.carried = workspace + workspace_floats(p);

  Status scans = kOk;
  if constexpr (kDtype != Dtype::kFloat32) {
    if (chunked) scans = launch_chunk_scans<kDtype>(p, w, records, stream);
  }
  if (!chunked) scans = scan_backward<Column, T>(p, w, stream);
  if (scans != kOk) return scans;
  Status const gradients = chunked && kDtype == Dtype::kBFloat16
                               ? launch_chunk_gradients(p, w, stream)
                               : launch(chunk_gradients<T>, chunks * p.value_heads, kGradientThreads,
                                        static_cast<int>(sizeof(GradientShared)), stream, p, w);
  if (gradients != kOk) return gradients;
  Status const heads =
      launch(gather_heads<T>, chunks * p.heads, kGradientThreads, 0, stream, p, gdn::portable::Workspace(w));
  if (heads != kOk || p.A_log == nullptr) return heads;
  return launch(gate_gradients, p.sequences * p.value_heads, kGateThreads, 0, stream, p);
}

template <Dtype kDtype>
Status launch_step(StepParams const& p, void* stream) {
  return scan_step<Column, Element<kDtype>>(p, stream);
}

}  // namespace lt2::kda::portable
