// One translation unit per element type and key size.
#pragma once

#include "common/cuda/sm90/tma.cuh"
#include "gdn/gdn.h"

namespace lt2::gdn::sm90 {

inline cuda::sm90::TokenMajor token_major(Strided const& x, Inputs const& p, int heads, int dim) {
  return {x.data, x.batch, x.token, x.head, p.batch, p.tokens, heads, dim};
}

template <Dtype, int kKeyDim>
Status launch_forward(ForwardParams const& p, float* workspace, void* stream);

}  // namespace lt2::gdn::sm90
