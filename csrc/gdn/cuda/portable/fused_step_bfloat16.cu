#include "gdn/cuda/portable/fused_step_launch.cuh"

namespace lt2::gdn::portable {

template Status launch_fused_step<Dtype::kBFloat16>(FusedStepParams const&, void*);

}  // namespace lt2::gdn::portable
