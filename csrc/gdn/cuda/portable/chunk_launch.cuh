#pragma once

#include <cstdlib>

#include "common/cuda/launch.cuh"
#include "gdn/cuda/portable/chunk_forward.cuh"
#include "gdn/cuda/portable/launch.h"

namespace lt2::gdn::portable {

// f with the smallest number of keys that there are kernels for.
template <class F>
Status with_keys(int key_dim, F const& f) {
  if (key_dim <= 32) return f(std::integral_constant<int, 32>{});
  if (key_dim <= 64) return f(std::integral_constant<int, 64>{});
  if (key_dim <= 96) return f(std::integral_constant<int, 96>{});
  if (key_dim <= 128) return f(std::integral_constant<int, 128>{});
  if (key_dim <= 192) return f(std::integral_constant<int, 192>{});
  return f(std::integral_constant<int, 256>{});
}

// Warps of a block: fewer where blocks are fewer than multiprocessors.
inline int scan_warps(ForwardParams const& p) {
  if (char const* e = std::getenv("LT2_EXP_WARPS")) return std::atoi(e);
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  int warps = kMaxScanWarps;
  while (warps > 1 &&
         p.sequences * p.value_heads * ceil_div(p.value_dim, warps * kWarpValues) < multiprocessors) {
    warps /= 2;
  }
  return warps;
}

template <Dtype kDtype>
Status launch_chunks(ForwardParams const& p, float* workspace, void* stream) {
  using T = Element<kDtype>;
  auto* const records = reinterpret_cast<ChunkRecord*>(workspace);
  return with_keys(p.key_dim, [&](auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    Status const prepared = launch(prepare_chunks<T, kKeys>, chunk_numbers<kScanChunk>(p) * p.heads,
                                   kPrepareThreads, 0, stream, Inputs(p), records);
    if (prepared != kOk) return prepared;
    int const warps = scan_warps(p);
    int64_t const slices = ceil_div(p.value_dim, warps * kWarpValues);
    return launch(scan_chunks<T, kKeys>, p.sequences * p.value_heads * slices, warps * kWarp,
                  static_cast<int>(2 * sizeof(ScanStage<T, kKeys>)), stream, p,
                  static_cast<ChunkRecord const*>(records));
  });
}

}  // namespace lt2::gdn::portable
