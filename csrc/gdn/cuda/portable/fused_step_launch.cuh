#pragma once

#include "gdn/cuda/portable/fused_step_launch.h"
#include "gdn/cuda/portable/fused_step_tiles.cuh"

namespace lt2::gdn::portable {

template <Dtype kDtype>
Status launch_fused_step(FusedStepParams const& p, void* stream) {
  using T = Element<kDtype>;
  return with_tile(p.step, [&](auto tile) {
    using Tile = decltype(tile);
    FusedSizes const sizes = fused_sizes(p.step, Tile::kColumns);
    dim3 const grid(sizes.blocks, p.step.heads, static_cast<unsigned>(p.step.batch));
    auto const kernel = is_plain<T>(p, sizes) ? fused_kernel<T, Tile, true> : fused_kernel<T, Tile, false>;
    return launch_overlapped(kernel, grid, Tile::kThreads, sizes.shared_bytes<T, Tile>(p.conv.width),
                             sizes.blocks, stream, p, sizes);
  });
}

}  // namespace lt2::gdn::portable
