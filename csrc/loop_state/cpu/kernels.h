// What one instruction set provides: the work of one item, for dispatch.cpp to spread over threads.
#pragma once

#include "loop_state/loop_state.h"

namespace lt2::loop_state {

// Keys (or entries of a list) [split * kSplitKeys, + kSplitKeys) of one unit and key head are one item of
// decode. A unit is what shares keys: a row, or with indices one token of a row.
constexpr int64_t kSplitKeys = 256;

struct Kernels {
  // Rows [begin, end). partial: this range's part of drho [D]; with the norm of dweight [D], then of drho if
  // there is a rho.
  void (*residual)(ResidualParams const& p, int64_t begin, int64_t end);
  void (*residual_backward)(ResidualBackwardParams const& p, int64_t begin, int64_t end, float* partial);
  void (*residual_norm)(ResidualNormParams const& p, int64_t begin, int64_t end);
  void (*residual_norm_backward)(ResidualNormBackwardParams const& p, int64_t begin, int64_t end,
                                 float* partial);

  int64_t (*decode_workspace)(DecodeParams const& p);  // floats of one lane
  int64_t (*decode_partial)(DecodeParams const& p);    // floats that one item leaves for merge
  void (*decode)(DecodeParams const& p, int64_t unit, int head, int64_t split, float* workspace,
                 float* partial);
  // One unit and key head: partials of all splits, partial_stride floats apart.
  void (*merge)(DecodeParams const& p, int64_t unit, int head, float const* partials, int64_t partial_stride,
                int64_t splits);
};

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t unit_tokens(DecodeParams const& p) { return p.indices == nullptr ? p.tokens : 1; }
static inline int64_t unit_count(DecodeParams const& p) { return p.batch * p.tokens / unit_tokens(p); }

// A unit's place in the caches and the keys that its last token sees, 0 where there is nothing to read. Any
// value of lengths, slot_ids and loop_map is safe.
struct Sight {
  int64_t loop, slot, keys;

  Sight(DecodeParams const& p, int64_t unit) : keys(0) {
    int64_t const per_row = p.tokens / unit_tokens(p), row = unit / per_row;
    slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
    loop = p.loop_map == nullptr ? 0 : p.loop_map[row];
    if (slot < 0 || slot >= p.slots || loop < 0 || loop >= p.loops) return;
    int64_t const length = p.lengths_int64 ? static_cast<int64_t const*>(p.lengths)[row]
                                           : static_cast<int32_t const*>(p.lengths)[row];
    keys = max(0, max(0, min(length, p.capacity)) - per_row + unit % per_row + 1);
  }
};

}  // namespace lt2::loop_state
