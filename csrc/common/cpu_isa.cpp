#include "common/cpu_isa.h"

#include <cstdlib>
#include <string_view>

#if defined(LT2_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lt2 {
namespace {

#if defined(LT2_HAS_AMX)
// The processor has tiles of bf16, and Linux lets this process use them: it has to be asked, once.
bool amx_allowed() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  bool const found =
      __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBf16) != 0 && (d & kAmxTile) != 0;
  return found && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

CpuIsa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool const bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(LT2_HAS_AMX)
  if (bf16 && amx_allowed()) return CpuIsa::kAmx;
#endif
  if (bf16) return CpuIsa::kAvx512Bf16;
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
    case CpuIsa::kAmx:
      return "amx";
  }
  return "unknown";
}

}  // namespace lt2
