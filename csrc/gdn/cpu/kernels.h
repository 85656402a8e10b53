// What one instruction set provides: the work of one item, for dispatch.cpp to spread over threads.
#pragma once

#include <unistd.h>

#include "gdn/gdn.h"

namespace lt2::gdn {

// Part of a forward or step item: value columns [begin, end).
struct ValueSlice {
  int begin, end;
};

// Value heads of a forward item, which walk the tokens together.
struct Heads {
  int begin, end;
};

struct Kernels {
  // Of how many heads an item should be at most.
  int (*forward_heads)(ForwardParams const& p);
  int64_t (*forward_workspace)(ForwardParams const& p, int heads, int slices);
  int64_t (*backward_workspace)(BackwardParams const& p, int64_t longest);
  // One sequence.
  void (*forward)(ForwardParams const& p, int64_t sequence, Heads heads, ValueSlice slice, float* workspace);
  // One sequence and query/key head, with all its value heads.
  void (*backward)(BackwardParams const& p, int64_t sequence, int head, float* workspace);
  // One batch row and value head.
  void (*step)(StepParams const& p, int64_t row, int value_head, ValueSlice slice);
  // The same: p.step.o out of x, fp32, the output of a step.
  void (*gated_norm)(FusedStepParams const& p, Strided const& x, int64_t row, int value_head);
};

// Heads whose states take half of a core's second-level cache: rows of so many heads are side by side.
static inline int heads_in_cache(Inputs const& p) {
  int64_t const state = static_cast<int64_t>(p.key_dim) * p.value_dim * static_cast<int64_t>(sizeof(float));
  return state == 0 ? 1 : static_cast<int>(sysconf(_SC_LEVEL2_CACHE_SIZE) / 2 / state);
}

// Tokens [begin, end) of batch row `row` are one sequence.
struct Span {
  int64_t row, begin, end;
  int64_t length() const { return end - begin; }
};

static inline int64_t cu_seqlen(Inputs const& p, int64_t i) {
  return p.cu_seqlens_int64 ? static_cast<int64_t const*>(p.cu_seqlens)[i]
                            : static_cast<int32_t const*>(p.cu_seqlens)[i];
}

static inline Span sequence_span(Inputs const& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.tokens};
  return {0, cu_seqlen(p, n), cu_seqlen(p, n + 1)};
}

}  // namespace lt2::gdn
