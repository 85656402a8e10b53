#pragma once

#include "common/cuda/launch.cuh"
#include "gdn/cuda/portable/tiles.cuh"
#include "kda/cuda/portable/gradients.cuh"
#include "kda/cuda/portable/launch.h"
#include "kda/cuda/portable/scan.cuh"

namespace lt2::kda::portable {

template <Dtype kDtype>
Status launch_forward(ForwardParams const& p, void* stream) {
  return with_tile(p.key_dim, [&](auto tile) {
    using Tile = decltype(tile);
    return launch(forward_scan<Element<kDtype>, Tile, false>,
                  slices<Tile>(p.sequences, p.value_heads, p.value_dim), kScanThreads, 0, stream, Inputs(p),
                  p.o, p.final_state, Workspace{});
  });
}

// Both scans of the backward pass.
template <Dtype kDtype>
Status launch_scans(BackwardParams const& p, Workspace const& w, float* records, void* stream) {
  using T = Element<kDtype>;
  if constexpr (kDtype != Dtype::kFloat32) {
    if (by_chunks(p, p.recurrent)) return launch_chunk_scans<kDtype>(p, w, records, stream);
  }
  return with_tile(p.key_dim, [&](auto tile) {
    using Tile = decltype(tile);
    int64_t const blocks = slices<Tile>(p.sequences, p.value_heads, p.value_dim);
    Status const forward = launch(forward_scan<T, Tile, true>, blocks, kScanThreads, 0, stream, Inputs(p),
                                  Strided{}, static_cast<float*>(nullptr), w);
    return forward != kOk ? forward : launch(reverse_scan<T, Tile>, blocks, kScanThreads, 0, stream, p, w);
  });
}

template <Dtype kDtype>
Status launch_backward(BackwardParams const& p, float* workspace, void* stream) {
  using T = Element<kDtype>;
  int64_t const rows = p.batch * p.tokens * p.value_heads, chunks = chunk_numbers(p);
  int64_t const states = chunks * p.value_heads * p.key_dim * p.value_dim;
  auto const take = [&](int64_t floats) {
    float* const piece = workspace;
    workspace += floats;
    return piece;
  };
  float* const records = workspace;
  if constexpr (kDtype != Dtype::kFloat32) {
    if (by_chunks(p, p.recurrent)) take(chunk_workspace<kDtype>(p));
  }
  Workspace w;
  w.residuals = take(rows * p.value_dim);
  w.dwrites = take(rows * p.value_dim);
  w.states = take(states);
  w.dstates = take(states);
  w.dq = take(rows * p.key_dim);
  w.dk = take(rows * p.key_dim);
  w.carried = take(rows * p.key_dim);

  Status const scans = launch_scans<kDtype>(p, w, records, stream);
  if (scans != kOk) return scans;
  bool by_products = false;
  if constexpr (kDtype == Dtype::kBFloat16) by_products = by_chunks(p, p.recurrent);
  Status const gradients = by_products ? launch_chunk_gradients(p, w, stream)
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
  return with_tile(p.key_dim, [&](auto tile) {
    using Tile = decltype(tile);
    auto const run = [&](auto kernel) {
      return launch(kernel, slices<Tile>(p.batch, p.value_heads, p.value_dim), kScanThreads, 0, stream, p);
    };
    return p.state_dtype == Dtype::kBFloat16 ? run(step_kernel<Element<kDtype>, __nv_bfloat16, Tile>)
                                             : run(step_kernel<Element<kDtype>, float, Tile>);
  });
}

}  // namespace lt2::kda::portable
