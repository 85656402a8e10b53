// The function table of one instruction set; gdn_<isa>.cpp compiles it.
#pragma once

#include "gdn/cpu/backward.h"
#include "gdn/cpu/forward.h"
#include "gdn/cpu/norm.h"

namespace lt2::gdn::LT2_ISA {

extern Kernels const kKernels;
Kernels const kKernels = {&forward_heads, &forward_workspace, &backward_workspace, &forward, &backward,
                          &step,          &gated_norm};

}  // namespace lt2::gdn::LT2_ISA
