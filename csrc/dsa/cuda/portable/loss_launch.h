// One translation unit per element type.
#pragma once

#include "dsa/dsa.h"

namespace lt2::dsa::portable {

template <Dtype>
Status launch_loss(LossParams const& p, float* loss, float* workspace, void* stream);

}  // namespace lt2::dsa::portable
