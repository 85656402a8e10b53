#include "kda/kda.h"

namespace lt2::kda {

static constexpr Status kNotBuilt = "lt2_ext was built without CUDA kernels (no nvcc at build time)";

namespace portable {
Status supports(Inputs const&) { return kNotBuilt; }
int64_t backward_workspace(BackwardParams const&) { return 0; }
int64_t forward_workspace(ForwardParams const&) { return 0; }
Status forward(ForwardParams const&, float*, void*) { return kNotBuilt; }
Status backward(BackwardParams const&, float*, void*) { return kNotBuilt; }
Status step(StepParams const&, void*) { return kNotBuilt; }
}  // namespace portable

}  // namespace lt2::kda
