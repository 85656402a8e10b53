#pragma once

#include "common/cuda/launch.cuh"
#include "gdn/cuda/sm90/forward.cuh"
#include "gdn/cuda/sm90/forward_launch.h"

namespace lt2::gdn::sm90 {

template <class Traits>
Status launch_forward(ForwardParams const& p, Dtype dtype, void* stream) {
  ForwardMaps maps;
  struct {
    CUtensorMap* map;
    TokenMajor tensor;
    int tile_tokens;
  } const tensors[] = {{&maps.q, token_major(p.q, p, p.heads, p.key_dim), kChunk},
                       {&maps.k, token_major(p.k, p, p.heads, p.key_dim), kChunk},
                       {&maps.v, token_major(p.v, p, p.value_heads, p.value_dim), kTileSide},
                       {&maps.o, token_major(p.o, p, p.value_heads, p.value_dim), kTileSide}};
  for (auto const& t : tensors) {
    if (Status const status = make_tensor_map(t.map, t.tensor, dtype, t.tile_tokens); status != kOk) return status;
  }
  int const slice_groups = p.value_dim / (Traits::kSlices * kTileSide);
  return launch(forward_kernel<Traits>, p.sequences * p.value_heads * slice_groups, Traits::kThreads,
                sizeof(typename Traits::Shared), stream, ForwardLaunch{p, p.o, p.final_state, slice_groups},
                maps);
}

template <Dtype kDtype, int kKeyDim>
Status launch_forward(ForwardParams const& p, void* stream) {
  using T = Element<kDtype>;
  if constexpr (kKeyDim <= 128) {
    // Two slices in a block share the preparation of chunks; one in each of twice the blocks is faster while
    // there are multiprocessors to fill.
    constexpr int kMultiprocessors = 132;
    int64_t const pairs = p.sequences * p.value_heads * (p.value_dim / (2 * kTileSide));
    if (p.value_dim % (2 * kTileSide) == 0 && 4 * pairs > 3 * kMultiprocessors) {
      return launch_forward<ForwardTraits<T, kKeyDim, 2>>(p, kDtype, stream);
    }
  }
  return launch_forward<ForwardTraits<T, kKeyDim, 1>>(p, kDtype, stream);
}

}  // namespace lt2::gdn::sm90
