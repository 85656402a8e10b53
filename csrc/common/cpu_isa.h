#pragma once

namespace lt2 {

// In ascending order of preference. A build contains those of its processor family (LT2_FOR_EACH_ISA).
enum class CpuIsa { kScalar, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Best instruction set of this machine, lowered (never raised) by
// LT2_CPU_ISA=scalar|avx2|avx512|avx512_bf16|amx.
CpuIsa cpu_isa();
char const* name(CpuIsa isa);

}  // namespace lt2

#if defined(LT2_HAS_AMX)
#define LT2_AMX(X) X(amx, kAmx)
#else
#define LT2_AMX(X)
#endif
#if defined(__x86_64__)
#define LT2_FOR_EACH_ISA(X) \
  X(scalar, kScalar) X(avx2, kAvx2) X(avx512, kAvx512) X(avx512_bf16, kAvx512Bf16) LT2_AMX(X)
#elif defined(__aarch64__)
#define LT2_FOR_EACH_ISA(X) X(neon, kNeon)
#else
#define LT2_FOR_EACH_ISA(X) X(scalar, kScalar)
#endif

// Defines `Kernels const& kernels()` in a family's namespace: the function table of the running instruction
// set, out of the tables that its per-ISA translation units define as <isa>::kKernels.
#define LT2_DECLARE_ISA_KERNELS(isa, id) \
  namespace isa {                        \
  extern Kernels const kKernels;         \
  }
#define LT2_CASE_ISA_KERNELS(isa, id) \
  case CpuIsa::id:                    \
    return isa::kKernels;
#define LT2_DEFINE_KERNELS()                 \
  LT2_FOR_EACH_ISA(LT2_DECLARE_ISA_KERNELS)  \
  static Kernels const& kernels() {          \
    switch (cpu_isa()) {                     \
      LT2_FOR_EACH_ISA(LT2_CASE_ISA_KERNELS) \
      default:                               \
        __builtin_unreachable();             \
    }                                        \
  }
