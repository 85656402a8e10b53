// What one instruction set provides: the work of one item, for dispatch.cpp to spread over threads.
#pragma once

#include "causal_conv1d/causal_conv1d.h"

namespace lt2::causal_conv1d {

// Tokens [begin, end) of the sequence [first, last) in batch row `row`. Every sequence has at least one
// chunk, also an empty one; all chunks but the last of a sequence hold kChunkTokens.
struct Chunk {
  int64_t sequence, row, first, last, begin, end;
};

constexpr int kChunkTokens = 128;
constexpr int kBlockChannels = 64;  // channels [channel, channel + kBlockChannels) are one item

struct Kernels {
  void (*forward)(ForwardParams const& p, Chunk const& chunk, int64_t channel);
  // Also writes this chunk's part of dweight and dbias to partial [W + 1, D].
  void (*backward)(BackwardParams const& p, Chunk const& chunk, int64_t channel, float* partial);
  // dweight and dbias of a channel block out of partials [chunks, W + 1, D], added in order.
  void (*reduce)(BackwardParams const& p, float const* partials, int64_t chunks, int64_t channel);
  void (*step)(StepParams const& p, int64_t row, int64_t channel);
};

}  // namespace lt2::causal_conv1d
