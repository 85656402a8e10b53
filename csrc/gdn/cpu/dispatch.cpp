// Spreads sequences and heads over threads and picks the instruction set.
#include <algorithm>

#include "common/cpu_isa.h"
#include "gdn/cpu/spread.h"

namespace lt2::gdn {

LT2_DEFINE_KERNELS()

namespace cpu {
int64_t forward_workspace(ForwardParams const& p, ThreadPool const& pool) {
  return spread_forward_workspace(kernels(), p, pool);
}
void forward(ForwardParams const& p, float* workspace, ThreadPool const& pool) {
  spread_forward(kernels(), p, workspace, pool);
}
int64_t backward_workspace(BackwardParams const& p, ThreadPool const& pool) {
  return spread_backward_workspace(kernels(), p, pool);
}
void backward(BackwardParams const& p, float* workspace, ThreadPool const& pool) {
  spread_backward(kernels(), p, 1, workspace, pool);
}
void step(StepParams const& p, ThreadPool const& pool) { spread_step(kernels(), p, pool); }

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
