// Rows whose length is no multiple of a vector. See simd.h for who may include this.
#pragma once

#include "common/cpu/simd.h"

namespace lt2::LT2_ISA {
namespace {

template <class T>
inline Vec load_some(T const* p, int n) {
  if (n == kLanes) return load(p);
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_some(T* p, Vec v, int n) {
  if (n == kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  __builtin_memcpy(p, padded, n * sizeof(T));
}

// f(c, n) for each vector of n channels [c, c + n).
template <class F>
inline void for_each_vec(int64_t channels, F const& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(c, kLanes);
  if (c < channels) f(c, static_cast<int>(channels - c));
}

}  // namespace
}  // namespace lt2::LT2_ISA
