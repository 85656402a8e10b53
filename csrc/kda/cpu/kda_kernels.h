// The function table of one instruction set; kda_<isa>.cpp compiles it.
#pragma once

#include "kda/cpu/backward.h"
#include "kda/cpu/forward.h"

namespace lt2::kda::LT2_ISA {

extern Kernels const kKernels;
Kernels const kKernels = {&forward_heads, &forward_workspace, &backward_workspace,
                          &forward,       &backward,          &step};

}  // namespace lt2::kda::LT2_ISA
