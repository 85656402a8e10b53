// Built instead of portable/ when there is no nvcc: same symbols, one clear message.
#include "loop_state/loop_state.h"

namespace lt2::loop_state::portable {

static Status const kNotBuilt = "lt2_ext was built without CUDA kernels (no nvcc at build time)";

Status supports(DecodeParams const&) { return kNotBuilt; }
Status supports(Shape const&) { return kNotBuilt; }
int64_t decode_workspace(DecodeParams const&) { return 0; }
int64_t residual_backward_workspace(ResidualBackwardParams const&) { return 0; }
int64_t residual_norm_backward_workspace(ResidualNormBackwardParams const&) { return 0; }
int64_t copy_workspace(CopyParams const&) { return 0; }
Status residual(ResidualParams const&, void*) { return kNotBuilt; }
Status residual_backward(ResidualBackwardParams const&, float*, void*) { return kNotBuilt; }
Status residual_norm(ResidualNormParams const&, void*) { return kNotBuilt; }
Status residual_norm_backward(ResidualNormBackwardParams const&, float*, void*) { return kNotBuilt; }
Status decode(DecodeParams const&, float*, void*) { return kNotBuilt; }
Status zero(ZeroParams const&, void*) { return kNotBuilt; }
Status copy(CopyParams const&, char*, void*) { return kNotBuilt; }

}  // namespace lt2::loop_state::portable
