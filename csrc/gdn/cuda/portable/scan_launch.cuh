// Launches of the scans, for any Column<Tile> of scan.cuh.
#pragma once

#include "common/cuda/launch.cuh"
#include "gdn/cuda/portable/scan.cuh"

namespace lt2::gdn::portable {

// f with the smallest tile that holds key_dim rows.
template <class F>
Status with_tile(int key_dim, F const& f) {
  if (key_dim <= 32) return f(Tile<1, 32>{});
  if (key_dim <= 64) return f(Tile<2, 32>{});
  if (key_dim <= 96) return f(Tile<4, 24>{});
  if (key_dim <= 128) return f(Tile<4, 32>{});
  if (key_dim <= 192) return f(Tile<8, 24>{});
  return f(Tile<8, 32>{});
}

template <template <class> class Column, class T>
Status scan_forward(ForwardParams const& p, void* stream) {
  return with_tile(p.key_dim, [&](auto tile) {
    using Tile = decltype(tile);
    return launch(forward_scan<T, Column<Tile>, false>, slices<Tile>(p.sequences, p.value_heads, p.value_dim),
                  kScanThreads, 0, stream, Inputs(p), p.o, p.final_state, Workspace{});
  });
}

// Both scans of the backward pass.
template <template <class> class Column, class T>
Status scan_backward(BackwardParams const& p, Workspace const& w, void* stream) {
  return with_tile(p.key_dim, [&](auto tile) {
    using Tile = decltype(tile);
    int64_t const blocks = slices<Tile>(p.sequences, p.value_heads, p.value_dim);
    Status const forward = launch(forward_scan<T, Column<Tile>, true>, blocks, kScanThreads, 0, stream,
                                  Inputs(p), Strided{}, static_cast<float*>(nullptr), w);
    if (forward != kOk) return forward;
    return launch(reverse_scan<T, Column<Tile>>, blocks, kScanThreads, 0, stream, p, w);
  });
}

template <template <class> class Column, class T, class Params>
Status scan_step(Params const& p, void* stream) {
  return with_tile(p.key_dim, [&](auto tile) {
    using Tile = decltype(tile);
    auto const run = [&](auto kernel) {
      return launch(kernel, slices<Tile>(p.batch, p.value_heads, p.value_dim), kScanThreads, 0, stream, p);
    };
    return p.state_dtype == Dtype::kBFloat16 ? run(step_kernel<T, __nv_bfloat16, Column<Tile>, Params>)
                                             : run(step_kernel<T, float, Column<Tile>, Params>);
  });
}

}  // namespace lt2::gdn::portable
