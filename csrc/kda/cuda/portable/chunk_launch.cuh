#pragma once

#include <type_traits>

#include "common/cuda/launch.cuh"
#include "kda/cuda/portable/chunk_prepare.cuh"
#include "kda/cuda/portable/chunk_scan.cuh"
#include "kda/cuda/portable/launch.h"

namespace lt2::kda::portable {

inline constexpr int kFewBlocks = 66;  // half of a Hopper's multiprocessors

// f with the smallest number of keys that there are kernels for.
template <class F>
auto with_chunk_keys(int key_dim, F const& f) {
  return key_dim <= 64 ? f(std::integral_constant<int, 64>{}) : f(std::integral_constant<int, 128>{});
}

inline int64_t records(Inputs const& p) { return gdn::portable::chunk_numbers(p) * p.value_heads; }

template <class Record>
int64_t record_floats(Inputs const& p) {
  return records(p) * static_cast<int64_t>(sizeof(Record) / sizeof(float));
}

template <Dtype kDtype>
int64_t chunk_workspace(ForwardParams const& p) {
  return with_chunk_keys(p.key_dim, [&](auto keys) {
    return record_floats<ChunkRecord<Element<kDtype>, decltype(keys)::value>>(p);
  });
}

template <Dtype kDtype>
int64_t chunk_workspace(BackwardParams const& p) {
  return with_chunk_keys(p.key_dim, [&](auto keys) {
    return record_floats<BackwardRecord<Element<kDtype>, decltype(keys)::value>>(p);
  });
}

template <class T, int kKeys, class Record>
Status launch_prepare(Inputs const& p, Record* to, bool whole, void* stream) {
  using Shared = PrepareShared<T, kKeys, Record::kBackward ? 2 : 1>;
  return launch(prepare_chunks<T, kKeys, Record>, records(p), kPrepareThreads<kKeys>,
                static_cast<int>(sizeof(Shared)), stream, p, to, whole);
}

// f(groups, parts, blocks, threads): with few heads two warps share the channels of a state, and more blocks
// its columns.
template <class F>
Status with_groups(Inputs const& p, F const& f) {
  auto const blocks = [&](int groups) {
    return p.sequences * p.value_heads * gdn::portable::ceil_div(p.value_dim, groups * kWarpValues);
  };
  return blocks(4) <= kFewBlocks
             ? f(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{}, blocks(2))
             : f(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{}, blocks(4));
}

template <class T, int kKeys, class Record>
Status launch_scan(Inputs const& p, Strided const& o, float* final_state, Workspace const& w,
                   Record const* from, bool whole, void* stream) {
  return with_groups(p, [&](auto groups, auto parts, int64_t blocks) {
    constexpr int kGroups = decltype(groups)::value, kParts = decltype(parts)::value;
    static_assert(sizeof(ScanShared<T, Record, kGroups, kParts>) <= kChunkSharedBytes);
    return launch(scan_chunks<T, kKeys, Record, kGroups, kParts>, blocks, kGroups * kParts * kWarp,
                  static_cast<int>(sizeof(ScanShared<T, Record, kGroups, kParts>)), stream, p, o, final_state,
                  w, from, whole);
  });
}

template <Dtype kDtype>
Status launch_chunks(ForwardParams const& p, float* workspace, void* stream) {
  using T = Element<kDtype>;
  return with_chunk_keys(p.key_dim, [&](auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    using Record = ChunkRecord<T, kKeys>;
    auto* const to = reinterpret_cast<Record*>(workspace);
    bool const whole = whole_rows(p, p.o);
    Status const prepared = launch_prepare<T, kKeys>(p, to, whole, stream);
    if (prepared != kOk) return prepared;
    return launch_scan<T, kKeys, Record>(p, p.o, p.final_state, Workspace{}, to, whole, stream);
  });
}

template <Dtype kDtype>
Status launch_chunk_scans(BackwardParams const& p, Workspace const& w, float* workspace, void* stream) {
  using T = Element<kDtype>;
  return with_chunk_keys(p.key_dim, [&](auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    using Record = BackwardRecord<T, kKeys>;
    auto* const to = reinterpret_cast<Record*>(workspace);
    bool const whole = whole_rows(p, p.dout);
    Status status = launch_prepare<T, kKeys>(p, to, whole, stream);
    if (status == kOk) status = launch_scan<T, kKeys, Record>(p, Strided{}, nullptr, w, to, whole, stream);
    if (status != kOk) return status;
    return with_groups(p, [&](auto groups, auto parts, int64_t blocks) {
      constexpr int kGroups = decltype(groups)::value, kParts = decltype(parts)::value;
      return launch(scan_chunks_back<T, kKeys, kGroups, kParts>, blocks, kGroups * kParts * kWarp,
                    static_cast<int>(sizeof(ScanShared<T, Record, kGroups, kParts>)), stream, p, w,
                    static_cast<Record const*>(to), whole);
    });
  });
}

}  // namespace lt2::kda::portable
