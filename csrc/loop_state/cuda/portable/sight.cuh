// Which keys of the caches the queries of a block see.
#pragma once

#include "loop_state/loop_state.h"

namespace lt2::loop_state::portable {

// What shares keys is a unit: a row, or with indices one token of a row.
__host__ __device__ inline int64_t unit_tokens(DecodeParams const& p) {
  return p.indices == nullptr ? p.tokens : 1;
}
__host__ __device__ inline int64_t unit_count(DecodeParams const& p) {
  return p.batch * p.tokens / unit_tokens(p);
}

// A unit's place in the caches and the keys that its last token sees, 0 where there is nothing to read. Any
// value of lengths, slot_ids and loop_map is safe.
struct Sight {
  int64_t loop, slot, keys;

  __device__ Sight(DecodeParams const& p, int64_t unit) : keys(0) {
    int64_t const per_row = p.tokens / unit_tokens(p), row = unit / per_row;
    slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
    loop = p.loop_map == nullptr ? 0 : p.loop_map[row];
    if (slot < 0 || slot >= p.slots || loop < 0 || loop >= p.loops) return;
    int64_t const length = p.lengths_int64 ? static_cast<int64_t const*>(p.lengths)[row]
                                           : static_cast<int32_t const*>(p.lengths)[row];
    keys = max(int64_t{0}, min(max(length, int64_t{0}), p.capacity) - per_row + unit % per_row + 1);
  }
};

template <class T>
__device__ T const* cached(Cache const& cache, Sight const& sight, int head) {
  return static_cast<T const*>(cache.data) + sight.loop * cache.loop + sight.slot * cache.slot +
         head * cache.head;
}

}  // namespace lt2::loop_state::portable
