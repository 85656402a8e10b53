// Vectors of one instruction set. For <family>_<isa>.cpp files only, which define LT2_ISA (a namespace) and
// get their own -m flags. All of it has internal linkage: an inline function compiled with AVX-512 must never
// be merged by the linker with the one of a lesser instruction set. For the same reason: no standard
// containers and no <cmath> here or in kernel bodies (use __builtin_*).
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace lt2::LT2_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON, or whatever the compiler makes of it
#endif

using Bf16 = uint16_t;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(float const* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
  uint32_t const bits = static_cast<uint32_t>(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof(f));
  return f;
}

// 16-bit lanes to 32 bits: one instruction, of which the compiler makes several out of
// __builtin_convertvector.
inline VecU widen_lanes(Bf16 const* p) {
#if defined(__AVX512F__)
  __m256i const lanes = _mm256_loadu_si256(reinterpret_cast<__m256i const*>(p));
  return reinterpret_cast<VecU>(_mm512_maskz_cvtepu16_epi32(0xffff, lanes));  // unmasked, gcc 12 warns
#elif defined(__AVX2__)
  return reinterpret_cast<VecU>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<__m128i const*>(p))));
#else
  VecH h;
  __builtin_memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, VecU);
#endif
}

inline Vec load(Bf16 const* p) { return reinterpret_cast<Vec>(widen_lanes(p) << 16); }

// Round to nearest even; NaN stays NaN.
inline void store(Bf16* p, Vec v) {
  VecU const bits = reinterpret_cast<VecU>(v);
  VecU const rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  VecU const quiet = (bits >> 16) | 0x40u;
  VecH const h = __builtin_convertvector(v == v ? rounded : quiet, VecH);
  __builtin_memcpy(p, &h, sizeof(h));
}
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(Bf16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  *p = static_cast<Bf16>(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}

// Sum over lanes, in halves: ((v0 + v8) + (v4 + v12)) + .. for 16 lanes.
inline float sum(Vec v) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof(v));
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 4; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  for (int i = 0; kLanes > 4 && i < 4; ++i) lanes[i] += lanes[i + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

inline float dot(float const* a, float const* b, int64_t n) {
  Vec acc{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) acc += load(a + i) * load(b + i);
  float s = sum(acc);
  for (; i < n; ++i) s += a[i] * b[i];
  return s;
}

// e^x, relative error below 2e-7; exactly 0 below -87.3, NaN for NaN.
inline Vec exp(Vec x) {
  Vec const lo = splat(-87.33654f), hi = splat(88.72283f);
  Vec const y = x < lo ? lo : (x > hi ? hi : x);
  Vec const magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec const shifted = y * 1.44269504f + magic;
  Vec const n = shifted - magic;
  Vec const r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  VecI const bits = reinterpret_cast<VecI>(p) + (__builtin_convertvector(n == n ? n : Vec{}, VecI) << 23);
  Vec const result = reinterpret_cast<Vec>(bits);
  return x < lo ? Vec{} : (x == x ? result : x);
}

inline float exp(float x) { return exp(splat(x))[0]; }
inline float sigmoid(float x) { return 1.f / (1.f + __builtin_expf(-x)); }
// log(1 + e^x), linear above 20 as in torch.
inline float softplus(float x) { return x > 20.f ? x : __builtin_log1pf(__builtin_expf(x)); }

}  // namespace
}  // namespace lt2::LT2_ISA
