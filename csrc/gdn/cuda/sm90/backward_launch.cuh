#pragma once

#include "common/cuda/launch.cuh"
#include "gdn/cuda/sm90/backward_gradients.cuh"
#include "gdn/cuda/sm90/backward_launch.h"
#include "gdn/cuda/sm90/backward_prepare.cuh"
#include "gdn/cuda/sm90/backward_scan.cuh"
#include "gdn/cuda/sm90/forward_launch.h"

namespace lt2::gdn::sm90 {

template <Dtype kDtype, int kKeyDim>
Status launch_backward(BackwardParams const& p, float* workspace, void* stream) {
  using namespace backward_pass;
  using T = Element<kDtype>;
  BackwardMaps maps;
  struct {
    CUtensorMap* map;
    TokenMajor tensor;
  } const tensors[] = {{&maps.q, token_major(p.q, p, p.heads, p.key_dim)},
                       {&maps.k, token_major(p.k, p, p.heads, p.key_dim)},
                       {&maps.v, token_major(p.v, p, p.value_heads, p.value_dim)},
                       {&maps.dout, token_major(p.dout, p, p.value_heads, p.value_dim)},
                       {&maps.dv, token_major(p.dv, p, p.value_heads, p.value_dim)}};
  for (auto const& t : tensors) {
    if (Status const status = make_tensor_map(t.map, t.tensor, kDtype, kTileSide); status != kOk)
      return status;
  }
  int64_t bytes;
  BackwardWorkspace const w = backward_layout<T>(p, reinterpret_cast<char*>(workspace), &bytes);
  int64_t const numbers = portable::chunk_numbers(p), chunks = numbers * p.value_heads;

  using Prepare = PrepareTraits<T, kKeyDim>;
  if (Status const status = launch(prepare_kernel<Prepare>, chunks, Prepare::kThreads, Prepare::kSharedBytes,
                                   stream, Inputs(p), maps, w);
      status != kOk) {
    return status;
  }
  auto const scan = [&](auto traits) {
    using Traits = decltype(traits);
    int const groups = p.value_dim / (Traits::kSlices * kTileSide);
    return launch(scan_kernel<Traits>, 2 * p.sequences * p.value_heads * groups, Traits::kThreads,
                  Traits::kSharedBytes, stream, ScanLaunch{p, w, groups}, maps);
  };
  // A block of two slices loads keys and matrices once for both; one slice in each of twice the blocks is
  // faster while there are multiprocessors to fill.
  int64_t const slices = 2 * p.sequences * p.value_heads * (p.value_dim / kTileSide);
  bool const pairs = p.value_dim % (2 * kTileSide) == 0 && slices > kMultiprocessors;
  if (Status const status = pairs ? scan(ScanTraits<T, kKeyDim, 2>{}) : scan(ScanTraits<T, kKeyDim, 1>{});
      status != kOk) {
    return status;
  }
  using Gradients = GradientTraits<T, kKeyDim>;
  int64_t const items = numbers * p.heads;
  return launch(gradient_kernel<Gradients>, items < kMultiprocessors ? items : kMultiprocessors,
                Gradients::kThreads, Gradients::kSharedBytes, stream, GradientLaunch{p, w, numbers}, maps);
}

}  // namespace lt2::gdn::sm90
