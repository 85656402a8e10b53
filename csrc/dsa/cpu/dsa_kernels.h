// Function table of one instruction set; dsa_<isa>.cpp compiles it.
#pragma once

#include "dsa/cpu/attention.h"
#if defined(__AMX_BF16__)
#include "dsa/cpu/attention_dense_amx.h"
#endif
#include "dsa/cpu/indexer.h"
#include "dsa/cpu/loss.h"

namespace lt2::dsa::LT2_ISA {

#if defined(__AMX_BF16__)
using Bf16Products = AmxProducts;
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

template <class Params>
static auto loss_body(Params const& p) {
  using Rows = RowProducts<Bf16>;
  using Tiles = Bf16Products;
  bool const tiles = fits_tiles(p), index_tiles = fits_tiles(index_operands(p));
  return p.dtype == Dtype::kFloat32 ? loss_block<float, RowProducts<float>, RowProducts<float>, Params>
         : tiles && index_tiles     ? loss_block<Bf16, Tiles, Tiles, Params>
         : tiles                    ? loss_block<Bf16, Tiles, Rows, Params>
         : index_tiles              ? loss_block<Bf16, Rows, Tiles, Params>
                                    : loss_block<Bf16, Rows, Rows, Params>;
}

static void loss(LossForwardParams const& p, Document const& document, int64_t first, float* workspace) {
  loss_body(p)(p, document, first, nullptr, workspace);
}

static void loss_backward(LossBackwardParams const& p, Document const& document, int64_t first,
                          float* partial, float* workspace) {
  loss_body(p)(p, document, first, partial, workspace);
}

extern Kernels const kKernels;
Kernels const kKernels = {&pack,   &pack_means, &select,       &attend, &attend_backward,
                          &reduce, &loss,       &loss_backward};

}  // namespace lt2::dsa::LT2_ISA
