#include "gdn/gdn.h"

namespace lt2::gdn::sm90 {

// Never shown: portable kernels are asked next.
static constexpr Status kNotBuilt = "lt2_ext was built without sm_90a";

Status supports(ForwardParams const&) { return kNotBuilt; }
int64_t forward_workspace(ForwardParams const&) { return 0; }
Status forward(ForwardParams const&, float*, void*) { return kNotBuilt; }
Status supports_backward(BackwardParams const&) { return kNotBuilt; }
int64_t backward_workspace(BackwardParams const&) { return 0; }
Status backward(BackwardParams const&, float*, void*) { return kNotBuilt; }
Status step_supports(StepParams const&) { return kNotBuilt; }
Status step(StepParams const&, void*) { return kNotBuilt; }

}  // namespace lt2::gdn::sm90
