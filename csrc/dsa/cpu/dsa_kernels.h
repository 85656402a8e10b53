// Function table of one instruction set; dsa_<isa>.cpp compiles it.
#pragma once

#include "dsa/cpu/indexer.h"

namespace lt2::dsa::LT2_ISA {

extern Kernels const kKernels;
Kernels const kKernels = {&pack, &select};

}  // namespace lt2::dsa::LT2_ISA
