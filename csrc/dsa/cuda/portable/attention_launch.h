// One translation unit per element type. With a condition the kernels do nothing where it is zero when they
// run.
#pragma once

#include "dsa/dsa.h"

namespace lt2::dsa::portable {

template <Dtype>
Status launch_attention(AttentionForwardParams const& p, float* workspace, void* stream,
                        int const* condition);
template <Dtype>
Status launch_attention_backward(AttentionBackwardParams const& p, float* workspace, void* stream,
                                 int const* condition);

Status attention_if(AttentionForwardParams const& p, float* workspace, void* stream, int const* condition);
Status attention_backward_if(AttentionBackwardParams const& p, float* workspace, void* stream,
                             int const* condition);

}  // namespace lt2::dsa::portable
