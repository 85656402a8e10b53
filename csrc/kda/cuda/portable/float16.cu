#include "kda/cuda/portable/launch.cuh"

namespace lt2::kda::portable {

template Status launch_forward<Dtype::kFloat16>(ForwardParams const&, void*);
template Status launch_backward<Dtype::kFloat16>(BackwardParams const&, float*, void*);
template Status launch_step<Dtype::kFloat16>(StepParams const&, void*);

}  // namespace lt2::kda::portable
