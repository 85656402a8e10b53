// Activations of vectors; see simd.h for who may include this.
#pragma once

#include "common/cpu/simd.h"

namespace lt2::LT2_ISA {
namespace {
inline Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }
// max(x, 0) + log1p(u), u = e^{-|x|}, by log1p(u) = 2 atanh(u / (2 + u)): relative error below 3e-7.
inline Vec softplus(Vec x) {
  Vec const zero{}, u = exp(x < zero ? x : -x), s = u / (u + 2.f), s2 = s * s;
  Vec p = splat(1.f / 15.f);
  p = p * s2 + 1.f / 13.f;
  p = p * s2 + 1.f / 11.f;
  p = p * s2 + 1.f / 9.f;
  p = p * s2 + 1.f / 7.f;
  p = p * s2 + 1.f / 5.f;
  p = p * s2 + 1.f / 3.f;
  p = p * s2 + 1.f;
  return x > splat(20.f) ? x : (x > zero ? x : zero) + 2.f * s * p;
}

}  // namespace
}  // namespace lt2::LT2_ISA
