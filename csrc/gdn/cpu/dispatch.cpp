// Spreads sequences and heads over threads and picks the instruction set.
#include <algorithm>

#include "common/cpu_isa.h"
#include "gdn/cpu/spread.h"

namespace lt2::gdn {

LT2_DEFINE_KERNELS()

namespace cpu {
namespace {

constexpr int64_t kStepGrainFloats = 1 << 14;  // less state than this is not worth another thread

}  // namespace

int64_t forward_workspace(ForwardParams const& p, ThreadPool const& pool) {
  int64_t const heads = p.sequences * p.value_heads;
  int const slices = slice_count(heads, p.value_dim, pool);
  return kernels().forward_workspace(p, slices) * pool.lanes(heads * slices);
}

void forward(ForwardParams const& p, float* workspace, ThreadPool const& pool) {
  int64_t const heads = p.sequences * p.value_heads, size = element_bytes(p.dtype);
  int const slices = slice_count(heads, p.value_dim, pool);
  int64_t const lane_floats = kernels().forward_workspace(p, slices);
  zero_outside(p, p.o, p.value_heads, p.value_dim * size, size);
  pool.items(heads * slices, [&](int64_t item, int lane) {
    ValueSlice const slice = value_slice(p.value_dim, static_cast<int>(item % slices), slices);
    if (slice.begin == slice.end) return;
    int64_t const head = item / slices;
    kernels().forward(p, head / p.value_heads, static_cast<int>(head % p.value_heads), slice,
                      workspace + lane * lane_floats);
  });
}

int64_t backward_workspace(BackwardParams const& p, ThreadPool const& pool) {
  return kernels().backward_workspace(p, longest_sequence(p)) * pool.lanes(p.sequences * p.heads);
}

void backward(BackwardParams const& p, float* workspace, ThreadPool const& pool) {
  int64_t const size = element_bytes(p.dtype);
  zero_outside(p, p.dq, p.heads, p.key_dim * size, size);
  zero_outside(p, p.dk, p.heads, p.key_dim * size, size);
  zero_outside(p, p.dv, p.value_heads, p.value_dim * size, size);
  zero_outside(p, p.dg, p.value_heads, sizeof(float), sizeof(float));
  zero_outside(p, p.dbeta, p.value_heads, sizeof(float), sizeof(float));
  int64_t const lane_floats = kernels().backward_workspace(p, longest_sequence(p));
  pool.items(p.sequences * p.heads, [&](int64_t item, int lane) {
    kernels().backward(p, item / p.heads, static_cast<int>(item % p.heads), workspace + lane * lane_floats);
  });
}

// Equal items in fixed ranges: from step to step a head's state stays in the cache of one core.
void step(StepParams const& p, ThreadPool const& pool) {
  int64_t const heads = p.batch * p.value_heads;
  int const slices = slice_count(heads, p.value_dim, pool);
  int64_t const item_floats = std::max<int64_t>(1, static_cast<int64_t>(p.key_dim) * p.value_dim / slices);
  pool.ranges(0, heads * slices, 1 + kStepGrainFloats / item_floats, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      ValueSlice const slice = value_slice(p.value_dim, static_cast<int>(item % slices), slices);
      if (slice.begin == slice.end) continue;
      int64_t const head = item / slices;
      kernels().step(p, head / p.value_heads, static_cast<int>(head % p.value_heads), slice);
    }
  });
}

int64_t fused_step_workspace(FusedStepParams const& p) {
  int64_t const values = int64_t{p.step.value_heads} * p.step.value_dim;
  return p.step.batch * p.step.tokens * (p.conv.channels + values);
}

// The operators one after the other; nothing between them is rounded.
void fused_step(FusedStepParams const& p, float* workspace, ThreadPool const& pool) {
  int64_t const tokens = p.step.tokens, channels = p.conv.channels;
  int64_t const K = p.step.key_dim, V = p.step.value_dim, keys = p.step.heads * K,
                values = p.step.value_heads * V;
  causal_conv1d::StepParams conv = p.conv;
  conv.y = {workspace, tokens * channels, channels};
  conv.y_float32 = true;
  causal_conv1d::cpu::step(conv, pool);

  StepParams step = p.step;
  step.dtype = Dtype::kFloat32;
  step.q = {workspace, tokens * channels, channels, K};
  step.k = {workspace + keys, tokens * channels, channels, K};
  step.v = {workspace + 2 * keys, tokens * channels, channels, V};
  step.o = {workspace + p.step.batch * tokens * channels, tokens * values, values, V};
  cpu::step(step, pool);
  pool.items(p.step.batch * p.step.value_heads, [&](int64_t item, int) {
    kernels().gated_norm(p, step.o, item / p.step.value_heads, static_cast<int>(item % p.step.value_heads));
  });
}

}  // namespace cpu
}  // namespace lt2::gdn
