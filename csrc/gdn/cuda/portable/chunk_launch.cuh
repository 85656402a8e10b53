#pragma once

#include "common/cuda/launch.cuh"
#include "gdn/cuda/portable/chunk_forward.cuh"
#include "gdn/cuda/portable/launch.h"
#include "gdn/cuda/portable/sizes.cuh"

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

template <Dtype kDtype>
Status launch_chunks(ForwardParams const& p, float* workspace, void* stream) {
  using T = Element<kDtype>;
  auto* const records = reinterpret_cast<ChunkRecord*>(workspace);
  return with_keys(p.key_dim, [&](auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    bool const whole = whole_pieces(p, p.o);
    Status const prepared = launch(prepare_chunks<T, kKeys>, chunk_numbers<kScanChunk>(p) * p.heads,
                                   kPrepareThreads, 0, stream, Inputs(p), records, whole);
    if (prepared != kOk) return prepared;
    return launch(scan_chunks<T, kKeys>, p.sequences * p.value_heads * ceil_div(p.value_dim, kScanValues),
                  kChunkThreads, static_cast<int>(2 * sizeof(ScanStage<T, kKeys>)), stream, p,
                  static_cast<ChunkRecord const*>(records), whole);
  });
}

}  // namespace lt2::gdn::portable
