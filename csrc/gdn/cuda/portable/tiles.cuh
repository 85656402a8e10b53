#pragma once

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

}  // namespace lt2::gdn::portable
