// out = h + rho h_in, and RMSNorm of the result, row by row; backward with partial sums over a range of rows.
#pragma once

#include "common/cpu/rows.h"
#include "loop_state/cpu/kernels.h"

namespace lt2::loop_state::LT2_ISA {
namespace {

using namespace ::lt2::LT2_ISA;

template <class T>
inline T const* row_of(void const* data, int64_t row, int64_t width) {
  return static_cast<T const*>(data) + row * width;
}
template <class T>
inline T* row_of(void* data, int64_t row, int64_t width) {
  return static_cast<T*>(data) + row * width;
}

template <class T>
void residual_rows(ResidualParams const& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T const* const h = row_of<T>(p.h, r, p.channels);
    T const* const h_in = row_of<T>(p.h_in, r, p.channels);
    T* const out = row_of<T>(p.out, r, p.channels);
    for_each_vec(p.channels, [&](int64_t c, int n) {
      store_some(out + c, load_some(h + c, n) + load_some(p.rho + c, n) * load_some(h_in + c, n), n);
    });
  }
}

template <class T>
void residual_backward_rows(ResidualBackwardParams const& p, int64_t begin, int64_t end, float* drho) {
  __builtin_memset(drho, 0, p.channels * sizeof(float));
  for (int64_t r = begin; r < end; ++r) {
    T const* const dout = row_of<T>(p.dout, r, p.channels);
    T const* const h_in = row_of<T>(p.h_in, r, p.channels);
    T* const dh_in = row_of<T>(p.dh_in, r, p.channels);
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec const d = load_some(dout + c, n);
      store_some(dh_in + c, d * load_some(p.rho + c, n), n);
      store_some(drho + c, load_some(drho + c, n) + d * load_some(h_in + c, n), n);
    });
  }
}

template <class T, bool kGated>
void residual_norm_range(ResidualNormParams const& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T const* const h = row_of<T>(p.h, r, p.channels);
    T const* const h_in = row_of<T>(p.h_in, r, p.channels);
    T *const out = row_of<T>(p.out, r, p.channels), *const normed = row_of<T>(p.normed, r, p.channels);
    Vec squares{};
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec added = load_some(h_in + c, n);
      if constexpr (kGated) added *= load_some(p.rho + c, n);
      store_some(out + c, load_some(h + c, n) + added, n);
      Vec const rounded = load_some(out + c, n);
      squares += rounded * rounded;
    });
    float const rstd = 1.f / __builtin_sqrtf(sum(squares) / static_cast<float>(p.channels) + p.eps);
    p.rstd[r] = rstd;
    for_each_vec(p.channels, [&](int64_t c, int n) {
      store_some(normed + c, load_some(out + c, n) * rstd * load_some(p.weight + c, n), n);
    });
  }
}

// x^ = h_out rstd:  dh = dh_out + rstd (w dnormed - x^ mean(x^ w dnormed)).
template <class T, bool kGated>
void residual_norm_backward_range(ResidualNormBackwardParams const& p, int64_t begin, int64_t end,
                                  float* partial) {
  float *const dweight = partial, *const drho = partial + p.channels;
  __builtin_memset(partial, 0, (kGated ? 2 : 1) * p.channels * sizeof(float));
  for (int64_t r = begin; r < end; ++r) {
    T const* const dh_out = row_of<T>(p.dh_out, r, p.channels);
    T const* const dnormed = row_of<T>(p.dnormed, r, p.channels);
    T const* const h_out = row_of<T>(p.h_out, r, p.channels);
    T const* const h_in = row_of<T>(p.h_in, r, p.channels);
    T *const dh = row_of<T>(p.dh, r, p.channels), *const dh_in = row_of<T>(p.dh_in, r, p.channels);
    float const rstd = p.rstd[r];
    Vec dots{};
    for_each_vec(p.channels, [&](int64_t c, int n) {
      dots += load_some(dnormed + c, n) * load_some(p.weight + c, n) * load_some(h_out + c, n);
    });
    float const mean = sum(dots) * rstd / static_cast<float>(p.channels);
    for_each_vec(p.channels, [&](int64_t c, int n) {
      Vec const unit = load_some(h_out + c, n) * rstd, dn = load_some(dnormed + c, n);
      Vec const d = load_some(dh_out + c, n) + (dn * load_some(p.weight + c, n) - unit * mean) * rstd;
      store_some(dh + c, d, n);
      if constexpr (kGated) {
        store_some(dh_in + c, d * load_some(p.rho + c, n), n);
        store_some(drho + c, load_some(drho + c, n) + d * load_some(h_in + c, n), n);
      }
      store_some(dweight + c, load_some(dweight + c, n) + dn * unit, n);
    });
  }
}

template <class T>
void residual_norm_rows(ResidualNormParams const& p, int64_t begin, int64_t end) {
  (p.rho == nullptr ? residual_norm_range<T, false> : residual_norm_range<T, true>)(p, begin, end);
}

template <class T>
void residual_norm_backward_rows(ResidualNormBackwardParams const& p, int64_t begin, int64_t end,
                                 float* partial) {
  (p.rho == nullptr ? residual_norm_backward_range<T, false>
                    : residual_norm_backward_range<T, true>)(p, begin, end, partial);
}

}  // namespace
}  // namespace lt2::loop_state::LT2_ISA
