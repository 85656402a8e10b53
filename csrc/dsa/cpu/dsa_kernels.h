// Function table of one instruction set; dsa_<isa>.cpp compiles it.
#pragma once

#include "dsa/cpu/attention.h"
#include "dsa/cpu/indexer.h"
#include "dsa/cpu/loss.h"

namespace lt2::dsa::LT2_ISA {

extern Kernels const kKernels;
Kernels const kKernels = {&pack, &pack_means, &select, &attend, &attend_backward, &reduce, &loss};

}  // namespace lt2::dsa::LT2_ISA
