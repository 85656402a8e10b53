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
  BackwardWorkspace const w = backward_layout(p, reinterpret_cast<char*>(workspace), &bytes);
  int64_t const numbers = portable::chunk_numbers(p), chunks = numbers * p.value_heads;
  auto const work = [&](int64_t slice_groups, int64_t first_block) {
    return BackwardLaunch{p, w, static_cast<int>(slice_groups), static_cast<int>(numbers),
                          static_cast<unsigned>(first_block)};
  };

  using Prepare = PrepareTraits<T, kKeyDim>;
  if (Status const status = launch(prepare_kernel<Prepare>, chunks, Prepare::kThreads, Prepare::kSharedBytes,
                                   stream, Inputs(p), maps, w);
      status != kOk) {
    return status;
  }
  using Gradients = GradientTraits<T, kKeyDim, false>;
  int64_t const items = numbers * p.heads,
                gradient_blocks = items < kMultiprocessors ? items : kMultiprocessors;
  int64_t const slices = 2 * p.sequences * p.value_heads * (p.value_dim / kTileSide);
  if (slices <= kMultiprocessors) {
    // One slice a block, all of them at once: a chain that leaves room for the gradients to follow.
    using Scan = ScanTraits<T, kKeyDim, 1>;
    using Following = GradientTraits<T, kKeyDim, true>;
    constexpr int kBytes =
        Scan::kSharedBytes > Following::kSharedBytes ? Scan::kSharedBytes : Following::kSharedBytes;
    return launch(followed_scan_kernel<Scan, Following>, slices + gradient_blocks, Following::kThreads,
                  kBytes, stream, work(p.value_dim / kTileSide, slices), maps);
  }
  auto const scan = [&](auto traits) {
    using Traits = decltype(traits);
    int const groups = p.value_dim / (Traits::kSlices * kTileSide);
    return launch(scan_kernel<Traits>, slices / Traits::kSlices, Traits::kThreads, Traits::kSharedBytes,
                  stream, work(groups, 0), maps);
  };
  // Two slices in a block load keys and matrices once for both.
  bool const pairs = p.value_dim % (2 * kTileSide) == 0;
  if (Status const status = pairs ? scan(ScanTraits<T, kKeyDim, 2>{}) : scan(ScanTraits<T, kKeyDim, 1>{});
      status != kOk) {
    return status;
  }
  return launch(gradient_kernel<Gradients>, gradient_blocks, Gradients::kThreads, Gradients::kSharedBytes,
                stream, work(0, 0), maps);
}

}  // namespace lt2::gdn::sm90
