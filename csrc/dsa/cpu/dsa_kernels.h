// Function table of one instruction set; dsa_<isa>.cpp compiles it.
#pragma once

#include "dsa/cpu/attention.h"
#if defined(__AMX_BF16__)
#include "dsa/cpu/attention_amx.h"
#endif
#include "dsa/cpu/indexer.h"
#include "dsa/cpu/loss.h"

namespace lt2::dsa::LT2_ISA {

#if defined(__AMX_BF16__)
using Bf16Products = TileProducts;
#else
using Bf16Products = RowProducts<Bf16>;
static bool fits_tiles(AttentionParams const&) { return false; }
#endif

static void attend(AttentionForwardParams const& p, Document const& document, int64_t first, int64_t head,
                   float* workspace) {
  auto const body = p.dtype == Dtype::kFloat32 ? attend_block<float>
                    : fits_tiles(p)            ? attend_block<Bf16, Bf16Products>
                                               : attend_block<Bf16>;
  body(p, document, first, head, workspace);
}

static void attend_backward(AttentionBackwardParams const& p, Document const& document, int64_t first,
                            int64_t head, float* partial, float* workspace) {
  auto const body = p.dtype == Dtype::kFloat32 ? attend_backward_block<float>
                    : fits_tiles(p)            ? attend_backward_block<Bf16, Bf16Products>
                                               : attend_backward_block<Bf16>;
  body(p, document, first, head, partial, workspace);
}

extern Kernels const kKernels;
Kernels const kKernels = {&pack,   &pack_means, &select,       &attend, &attend_backward,
                          &reduce, &loss,       &loss_backward};

}  // namespace lt2::dsa::LT2_ISA
