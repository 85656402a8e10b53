#include "common/cpu_isa.h"

#include <cstdlib>
#include <string_view>

namespace lt2 {
namespace {

CpuIsa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuIsa::kAvx512Bf16;
  if (avx512) return CpuIsa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::kAvx2;
  return CpuIsa::kScalar;
#elif defined(__aarch64__)
  return CpuIsa::kNeon;
#else
  return CpuIsa::kScalar;
#endif
}

CpuIsa detect_with_cap() {
  CpuIsa const best = detect();
  char const* const env = std::getenv("LT2_CPU_ISA");
  if (env == nullptr) return best;
  CpuIsa chosen = best;
#define LT2_LOWER_TO(isa, id) \
  if (std::string_view(env) == #isa && CpuIsa::id < best) chosen = CpuIsa::id;
  LT2_FOR_EACH_ISA(LT2_LOWER_TO)
#undef LT2_LOWER_TO
  return chosen;
}

}  // namespace

CpuIsa cpu_isa() {
  static CpuIsa const isa = detect_with_cap();
  return isa;
}

char const* name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kScalar:
      return "scalar";
    case CpuIsa::kNeon:
      return "neon";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

}  // namespace lt2
