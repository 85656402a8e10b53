#pragma once

#include <cstdlib>
#include <type_traits>

#include "common/cuda/launch.cuh"
#include "kda/cuda/portable/chunk_prepare.cuh"
#include "kda/cuda/portable/chunk_scan.cuh"
#include "kda/cuda/portable/launch.h"

namespace lt2::kda::portable {

inline constexpr int kFewBlocks = 66;  // half of a Hopper's multiprocessors

template <Dtype kDtype, int kKeys>
using RecordOf = ChunkRecord<Element<kDtype>, kKeys>;

// f with the smallest number of keys that there are kernels for.
template <class F>
auto with_chunk_keys(int key_dim, F const& f) {
  return key_dim <= 64 ? f(std::integral_constant<int, 64>{}) : f(std::integral_constant<int, 128>{});
}

template <Dtype kDtype>
int64_t chunk_workspace(ForwardParams const& p) {
  return with_chunk_keys(p.key_dim, [&](auto keys) {
    return gdn::portable::chunk_numbers(p) * p.value_heads *
           static_cast<int64_t>(sizeof(RecordOf<kDtype, decltype(keys)::value>) / sizeof(float));
  });
}

template <Dtype kDtype, int kKeys, int kGroups, int kParts>
Status launch_scan(ForwardParams const& p, RecordOf<kDtype, kKeys> const* records, void* stream) {
  using T = Element<kDtype>;
  int64_t const slices = gdn::portable::ceil_div(p.value_dim, kGroups * kWarpValues);
  return launch(scan_chunks<T, kKeys, kGroups, kParts>, p.sequences * p.value_heads * slices,
                kGroups * kParts * kWarp, static_cast<int>(sizeof(ScanShared<T, kKeys, kGroups, kParts>)),
                stream, p, records);
}

template <Dtype kDtype>
Status launch_chunks(ForwardParams const& p, float* workspace, void* stream) {
  using T = Element<kDtype>;
  return with_chunk_keys(p.key_dim, [&](auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    auto* const records = reinterpret_cast<ChunkRecord<T, kKeys>*>(workspace);
    Status const prepared = launch(prepare_chunks<T, kKeys>, gdn::portable::chunk_numbers(p) * p.value_heads,
                                   kPrepareThreads<kKeys>, static_cast<int>(sizeof(PrepareShared<T, kKeys>)),
                                   stream, Inputs(p), records);
    if (prepared != kOk) return prepared;
    // With few heads two warps share the channels of a state, and more blocks its columns.
    bool few = p.sequences * p.value_heads * gdn::portable::ceil_div(p.value_dim, 64) <= kFewBlocks;
    if (char const* e = getenv("LT2_FEW")) few = *e == '1';
    return few ? launch_scan<kDtype, kKeys, 2, 2>(p, records, stream)
               : launch_scan<kDtype, kKeys, 4, 1>(p, records, stream);
  });
}

}  // namespace lt2::kda::portable
