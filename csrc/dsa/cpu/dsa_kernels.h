// Function table of one instruction set; dsa_<isa>.cpp compiles it.
#pragma once

#include "dsa/cpu/attention.h"
#if defined(__AMX_BF16__)
#include "dsa/cpu/attention_amx.h"
#endif
#include "dsa/cpu/indexer.h"
#include "dsa/cpu/loss.h"

namespace lt2::dsa::LT2_ISA {

static void attend(AttentionForwardParams const& p, Document const& document, int64_t first, int64_t head,
                   float* workspace) {
#if defined(__AMX_BF16__)
  if (p.dtype == Dtype::kBFloat16 && fits_tiles(p))
    return attend_block_tiles(p, document, first, head, workspace);
#endif
  (p.dtype == Dtype::kBFloat16 ? attend_block<Bf16> : attend_block<float>)(p, document, first, head,
                                                                           workspace);
}

extern Kernels const kKernels;
Kernels const kKernels = {&pack, &pack_means, &select, &attend, &attend_backward, &reduce, &loss};

}  // namespace lt2::dsa::LT2_ISA
