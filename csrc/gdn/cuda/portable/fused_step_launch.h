// One translation unit per element type.
#pragma once

#include "gdn/gdn.h"

namespace lt2::gdn::portable {

template <Dtype>
Status launch_fused_step(FusedStepParams const& p, void* stream);

}  // namespace lt2::gdn::portable
