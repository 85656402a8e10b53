// Vectors of fp32 as vectors of twice as many bf16, on processors that have AVX512-BF16.
#pragma once

#include <immintrin.h>

#include "common/cpu/simd.h"

namespace lt2::gdn::LT2_ISA {
namespace {

using namespace ::lt2::LT2_ISA;

inline __m512i round_row(Vec first, Vec second) {
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}

// Two rows of 16 as bf16, interleaved.
inline __m512i interleave(Vec even, Vec odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), round_row(even, odd));
}

// The same, and what rounding lost of them.
struct SplitRows {
  __m512i high, low;
};
inline SplitRows split_interleaved(Vec even, Vec odd) {
  __m512i const rounded = interleave(even, odd);
  VecU const bits = reinterpret_cast<VecU>(rounded);
  Vec const even_rest = even - reinterpret_cast<Vec>(bits << 16);
  Vec const odd_rest = odd - reinterpret_cast<Vec>(bits & 0xffff0000u);
  return {rounded, interleave(even_rest, odd_rest)};
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
