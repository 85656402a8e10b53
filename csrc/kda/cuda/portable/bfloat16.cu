#include "kda/cuda/portable/launch.cuh"

namespace lt2::kda::portable {

template Status launch_forward<Dtype::kBFloat16>(ForwardParams const&, void*);
template Status launch_backward<Dtype::kBFloat16>(BackwardParams const&, float*, void*);
template Status launch_step<Dtype::kBFloat16>(StepParams const&, void*);

}  // namespace lt2::kda::portable
