// Built instead of portable/ when there is no nvcc: same symbols, one clear message.
#include "block_ops/block_ops.h"

namespace lt2::block_ops::portable {

static Status const kNotBuilt = "lt2_ext was built without CUDA kernels (no nvcc at build time)";

Status gated_norm_supports(Shape const&) { return kNotBuilt; }
int64_t gated_norm_backward_workspace(GatedNormBackwardParams const&) { return 0; }
Status swiglu(SwigluParams const&, void*) { return kNotBuilt; }
Status swiglu_backward(SwigluBackwardParams const&, void*) { return kNotBuilt; }
Status gated_norm(GatedNormParams const&, void*) { return kNotBuilt; }
Status gated_norm_backward(GatedNormBackwardParams const&, float*, void*) { return kNotBuilt; }
Status rope_cache(RopeCacheParams const&, void*) { return kNotBuilt; }
Status linear_step_supports(LinearStepParams const&) { return kNotBuilt; }
Status linear_step(LinearStepParams const&, void*) { return kNotBuilt; }

}  // namespace lt2::block_ops::portable
