// SwiGLU and gated RMSNorm, row by row; backward with partial sums over a range of rows.
#pragma once

#include "block_ops/cpu/kernels.h"
#include "common/cpu/rows.h"

namespace lt2::block_ops::LT2_ISA {
namespace {

using namespace ::lt2::LT2_ISA;

template <class T>
inline T const* row_of(Rows const& x, int64_t row) {
  return static_cast<T const*>(x.data) + row / x.inner * x.outer + row % x.inner * x.stride;
}
template <class T>
inline T* row_of(void* data, int64_t row, int64_t width) {
  return static_cast<T*>(data) + row * width;
}

inline Vec sigmoid(Vec x) { return 1.f / (exp(-x) + 1.f); }

template <class T>
void swiglu_rows(SwigluParams const& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T const *const gate = row_of<T>(p.gate, r), *const up = row_of<T>(p.up, r);
    T* const out = row_of<T>(p.out, r, p.channels);
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec const g = load_some(gate + c, n);
      store_some(out + c, g * sigmoid(g) * load_some(up + c, n), n);
    });
  }
}

// silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x).
template <class T>
void swiglu_backward_rows(SwigluBackwardParams const& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T const *const dout = row_of<T>(p.dout, r), *const gate = row_of<T>(p.gate, r),
                   *const up = row_of<T>(p.up, r);
    T *const dgate = row_of<T>(p.dgate, r, p.channels), *const dup = row_of<T>(p.dup, r, p.channels);
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec const d = load_some(dout + c, n), g = load_some(gate + c, n), s = sigmoid(g);
      store_some(dgate + c, d * load_some(up + c, n) * s * (g * (1.f - s) + 1.f), n);
      store_some(dup + c, d * g * s, n);
    });
  }
}

template <class T>
void gated_norm_rows(GatedNormParams const& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T const *const o = row_of<T>(p.o, r), *const z = row_of<T>(p.z, r);
    T* const out = row_of<T>(p.out, r, p.channels);
    Vec squares{};
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec const x = load_some(o + c, n);
      squares += x * x;
    });
    float const rstd = 1.f / __builtin_sqrtf(sum(squares) / static_cast<float>(p.channels) + p.eps);
    p.rstd[r] = rstd;
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec const gate = load_some(z + c, n);
      store_some(out + c, load_some(o + c, n) * rstd * load_some(p.weight + c, n) * (gate * sigmoid(gate)),
                 n);
    });
  }
}

// With n = dout silu(z) and o^ = o rstd:  do = rstd (w n - o^ mean(o^ w n)), dz = dout o^ w silu'(z).
template <class T>
void gated_norm_backward_rows(GatedNormBackwardParams const& p, int64_t begin, int64_t end, float* partial) {
  float *const dweight = partial, *const dnormed = partial + p.channels;
  __builtin_memset(dweight, 0, p.channels * sizeof(float));
  for (int64_t r = begin; r < end; ++r) {
    T const *const dout = row_of<T>(p.dout, r), *const o = row_of<T>(p.o, r), *const z = row_of<T>(p.z, r);
    T *const d_o = row_of<T>(p.d_o, r, p.channels), *const dz = row_of<T>(p.dz, r, p.channels);
    float const rstd = p.rstd[r];
    Vec dots{};
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec const d = load_some(dout + c, n), gate = load_some(z + c, n), s = sigmoid(gate);
      Vec const weighted = load_some(o + c, n) * load_some(p.weight + c, n), dn = d * gate * s;
      store_some(dz + c, d * weighted * rstd * s * (gate * (1.f - s) + 1.f), n);
      store_some(dnormed + c, dn, n);
      dots += dn * weighted;
    });
    float const mean = sum(dots) * rstd / static_cast<float>(p.channels);
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec const unit = load_some(o + c, n) * rstd, dn = load_some(dnormed + c, n);
      store_some(d_o + c, (dn * load_some(p.weight + c, n) - unit * mean) * rstd, n);
      store_some(dweight + c, load_some(dweight + c, n) + dn * unit, n);
    });
  }
}

}  // namespace
}  // namespace lt2::block_ops::LT2_ISA
