// y = x W^T for a few rows x: some rows of W at a time with all rows of x.
#pragma once

#include "block_ops/cpu/rows.h"

namespace lt2::block_ops::LT2_ISA {
namespace {

// x, normalised if wanted, in float32.
template <class T>
void linear_step_rows(LinearStepParams const& p, float* to) {
  for (int m = 0; m < p.rows; ++m, to += p.channels) {
    T const* const x = static_cast<T const*>(p.x) + static_cast<int64_t>(m) * p.channels;
    Vec squares{};
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec const v = load_some(x + c, n);
      store_some(to + c, v, n);
      squares += v * v;
    });
    if (p.norm_weight == nullptr) continue;
    float const rstd = 1.f / __builtin_sqrtf(sum(squares) / static_cast<float>(p.channels) + p.eps);
    auto const scale = [&](auto const* weight) {
      for_each_vec(p.channels, [&](int64_t c, int n) {
        store_some(to + c, load_some(to + c, n) * rstd * load_some(weight + c, n), n);
      });
    };
    p.float_norm_weight ? scale(static_cast<float const*>(p.norm_weight))
                        : scale(static_cast<T const*>(p.norm_weight));
  }
}

constexpr int kWeightRows = 4;

typedef float Quad __attribute__((vector_size(16)));

// Four sums of every fourth lane.
inline Quad quarter(Vec v) {
  Quad parts[kLanes / 4];
  __builtin_memcpy(parts, &v, sizeof(v));
  for (int i = 1; i < kLanes / 4; ++i) parts[0] += parts[i];
  return parts[0];
}

// y[r][m] = x_m . w[r] for kRows rows x.
template <int kRows, class T>
inline void dots(T const* const (&w)[kWeightRows], float const* x, int64_t channels,
                 float (&y)[kWeightRows][kRows]) {
  Vec acc[kWeightRows][kRows] = {};
  for_each_vec(channels, [&](int64_t c, int n) __attribute__((always_inline)) {
    Vec weight[kWeightRows];
#pragma GCC unroll 4
    for (int r = 0; r < kWeightRows; ++r) weight[r] = load_some(w[r] + c, n);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      Vec const v = load_some(x + m * channels + c, n);
#pragma GCC unroll 4
      for (int r = 0; r < kWeightRows; ++r) acc[r][m] += weight[r] * v;
    }
  });
  for (int m = 0; m < kRows; ++m) {
    Quad quads[kWeightRows];
    for (int r = 0; r < kWeightRows; ++r) quads[r] = quarter(acc[r][m]);
    for (int r = 0; r < kWeightRows; ++r) {
      y[r][m] = (quads[r][0] + quads[r][2]) + (quads[r][1] + quads[r][3]);
    }
  }
}

// Outputs [begin, end) of part `i`, of kRows rows from `first` on; of SwiGLU of parts 0 and 1.
template <int kRows, class T>
void linear_outputs(LinearStepParams const& p, float const* x, int i, int begin, int end, int first) {
  LinearStepParams::Part const& part = p.parts[i];
  int const step = p.swiglu ? kWeightRows / 2 : kWeightRows;
  auto const row = [&](int from, int n) {
    return static_cast<T const*>(p.parts[from].weight) +
           static_cast<int64_t>(n < end ? n : end - 1) * p.channels;
  };
  for (int n = begin; n < end; n += step) {
    float y[kWeightRows][kRows];
    T const* w[kWeightRows];
    for (int r = 0; r < kWeightRows; ++r) w[r] = row(p.swiglu ? r / step : i, n + r % step);
    dots<kRows>(w, x + static_cast<int64_t>(first) * p.channels, p.channels, y);
    for (int r = 0; r < step && n + r < end; ++r) {
      for (int m = 0; m < kRows; ++m) {
        int64_t const at = static_cast<int64_t>(first + m) * part.outputs + n + r;
        float out = y[r][m];
        if (p.swiglu) out *= ::lt2::LT2_ISA::sigmoid(out) * y[step + r][m];
        if (p.residual != nullptr) out += to_float(static_cast<T const*>(p.residual)[at]);
        if (part.float_out) {
          static_cast<float*>(part.out)[at] = out;
        } else {
          store_one(static_cast<T*>(part.out) + at, out);
        }
      }
    }
  }
}

template <class T>
void linear_step_outputs(LinearStepParams const& p, float const* x, int i, int begin, int end) {
  int m = 0;
  for (; m + 4 <= p.rows; m += 4) linear_outputs<4, T>(p, x, i, begin, end, m);
  if (m + 2 <= p.rows) linear_outputs<2, T>(p, x, i, begin, end, m), m += 2;
  if (m < p.rows) linear_outputs<1, T>(p, x, i, begin, end, m);
}

}  // namespace
}  // namespace lt2::block_ops::LT2_ISA
