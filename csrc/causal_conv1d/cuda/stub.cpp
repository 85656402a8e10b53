#include "causal_conv1d/causal_conv1d.h"

namespace lt2::causal_conv1d::portable {

static constexpr Status kNotBuilt = "lt2_ext was built without CUDA kernels (no nvcc at build time)";

int64_t backward_workspace(BackwardParams const&) { return 0; }
Status forward(ForwardParams const&, void*) { return kNotBuilt; }
Status backward(BackwardParams const&, float*, void*) { return kNotBuilt; }
Status step(StepParams const&, void*) { return kNotBuilt; }

}  // namespace lt2::causal_conv1d::portable
