// Spreads sequences and heads over threads and picks the instruction set.
#include "common/cpu_isa.h"
#include "gdn/cpu/spread.h"
#include "kda/cpu/kernels.h"

namespace lt2::kda {

using namespace gdn;

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
  int64_t const size = element_bytes(p.dtype), f32 = sizeof(float);
  zero_outside(p, p.dq, p.heads, p.key_dim * size, size);
  zero_outside(p, p.dk, p.heads, p.key_dim * size, size);
  zero_outside(p, p.dv, p.value_heads, p.value_dim * size, size);
  zero_outside(p, p.dg, p.value_heads, p.key_dim * f32, f32);
  zero_outside(p, p.dbeta, p.value_heads, f32, f32);
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

}  // namespace cpu
}  // namespace lt2::kda
