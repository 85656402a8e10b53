// Spreads rows and heads over threads and picks the instruction set.
#include "block_ops/cpu/kernels.h"
#include "common/cpu/row_ranges.h"
#include "common/cpu_isa.h"

namespace lt2::block_ops {

LT2_DEFINE_KERNELS()

namespace cpu {

void swiglu(SwigluParams const& p, ThreadPool const& pool) {
  pool.ranges(0, p.rows, row_grain(p.channels),
              [&](int64_t begin, int64_t end) { kernels().swiglu(p, begin, end); });
}

void swiglu_backward(SwigluBackwardParams const& p, ThreadPool const& pool) {
  pool.ranges(0, p.rows, row_grain(p.channels),
              [&](int64_t begin, int64_t end) { kernels().swiglu_backward(p, begin, end); });
}

void gated_norm(GatedNormParams const& p, ThreadPool const& pool) {
  pool.ranges(0, p.rows, row_grain(p.channels),
              [&](int64_t begin, int64_t end) { kernels().gated_norm(p, begin, end); });
}

int64_t gated_norm_backward_workspace(GatedNormBackwardParams const& p) {
  return RowRanges(p.rows).count * 2 * p.channels;
}

void gated_norm_backward(GatedNormBackwardParams const& p, float* workspace, ThreadPool const& pool) {
  RowRanges(p.rows).sum(
      p.channels, 2 * p.channels, workspace, pool,
      [&](int64_t begin, int64_t end, float* partial) {
        kernels().gated_norm_backward(p, begin, end, partial);
      },
      [&](int64_t c) -> float& { return p.dweight[c]; });
}

void rope_cache(RopeCacheParams const& p, ThreadPool const& pool) {
  int64_t const heads = p.query_heads + 2 * p.heads;
  pool.ranges(0, p.batch * p.tokens * heads, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      int64_t const token = i / heads, stop = std::min(end, (token + 1) * heads);
      kernels().rope_cache(p, token, static_cast<int>(i - token * heads),
                           static_cast<int>(stop - token * heads));
      i = stop;
    }
  });
}

void linear_step(LinearStepParams const& p, float* workspace, ThreadPool const& pool) {
  if (p.rows == 0) return;
  kernels().linear_step_rows(p, workspace);
  int const parts = p.swiglu ? 1 : p.count;
  int64_t outputs = 0;
  for (int i = 0; i < parts; ++i) outputs += p.parts[i].outputs;
  pool.ranges(0, outputs, row_grain(p.channels), [&](int64_t begin, int64_t end) {
    for (int i = 0; i < parts; ++i) {
      int64_t const n = p.parts[i].outputs, from = std::max<int64_t>(begin, 0), to = std::min(end, n);
      if (from < to) kernels().linear_step(p, workspace, i, static_cast<int>(from), static_cast<int>(to));
      begin -= n;
      end -= n;
    }
  });
}

}  // namespace cpu
}  // namespace lt2::block_ops
