// What one instruction set provides: the work of one item, for dispatch.cpp to spread over threads.
#pragma once

#include "loop_state/loop_state.h"

namespace lt2::loop_state {

// Keys [split * kSplitKeys, + kSplitKeys) of one row and key head are one item of decode.
constexpr int64_t kSplitKeys = 2048;

struct Kernels {
  // Rows [begin, end). partial: this range's part of drho [D], with the norm also of dweight: [2, D].
  void (*residual)(ResidualParams const& p, int64_t begin, int64_t end);
  void (*residual_backward)(ResidualBackwardParams const& p, int64_t begin, int64_t end, float* partial);
  void (*residual_norm)(ResidualNormParams const& p, int64_t begin, int64_t end);
  void (*residual_norm_backward)(ResidualNormBackwardParams const& p, int64_t begin, int64_t end,
                                 float* partial);

  int64_t (*decode_workspace)(DecodeParams const& p);  // floats of one lane
  int64_t (*decode_partial)(DecodeParams const& p);    // floats that one item leaves for merge
  void (*decode)(DecodeParams const& p, int64_t row, int head, int64_t split, float* workspace,
                 float* partial);
  // One row and key head: partials of all splits, partial_stride floats apart.
  void (*merge)(DecodeParams const& p, int64_t row, int head, float const* partials, int64_t partial_stride,
                int64_t splits);
};

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys of a row, 0 where there is nothing to read. Any value of lengths, slot_ids and loop_map is safe.
static inline int64_t key_count(DecodeParams const& p, int64_t row) {
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
  int64_t const loop = p.loop_map == nullptr ? 0 : p.loop_map[row];
  if (slot < 0 || slot >= p.slots || loop < 0 || loop >= p.loops) return 0;
  int64_t const length = p.lengths_int64 ? static_cast<int64_t const*>(p.lengths)[row]
                                         : static_cast<int32_t const*>(p.lengths)[row];
  return max(0, min(length, p.capacity));
}

}  // namespace lt2::loop_state
