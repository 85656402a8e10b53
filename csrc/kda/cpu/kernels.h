// What one instruction set provides: the work of one item, for dispatch.cpp to spread over threads.
#pragma once

#include "gdn/cpu/kernels.h"
#include "kda/kda.h"

namespace lt2::kda {

using gdn::Heads;
using gdn::ValueSlice;

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
};

}  // namespace lt2::kda
