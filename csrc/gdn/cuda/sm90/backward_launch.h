// One translation unit per element type and key size.
#pragma once

#include "gdn/gdn.h"

namespace lt2::gdn::sm90 {

// p.dg is left as the gradient of the log decay, whatever the gate.
template <Dtype, int kKeyDim>
Status launch_backward(BackwardParams const& p, float* workspace, void* stream);

}  // namespace lt2::gdn::sm90
