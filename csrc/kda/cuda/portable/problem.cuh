// Where things are: gdn's sequences, chunks and tokens, and the decays of a token.
#pragma once

#include "gdn/cuda/portable/problem.cuh"
#include "kda/kda.h"

namespace lt2::kda::portable {

using namespace gdn::portable;

inline constexpr float kNoDecay = -200.f;  // e^g is 0 in fp32 from here on

__device__ inline float log_decay(Inputs const& p, int64_t row, int64_t token, int head, int channel) {
  float const g = token_row<float const>(p.g, row, token, head)[channel];
  return p.A_log == nullptr ? g : gate(g, p.A_log[head], p.dt_bias[head * p.key_dim + channel]);
}

// What the phases of the backward pass hand to each other, fp32.
struct Workspace : gdn::portable::Workspace {
  float* carried;  // [B, T, HV, K]: terms of dg that belong to all later tokens of the chunk
};

}  // namespace lt2::kda::portable
