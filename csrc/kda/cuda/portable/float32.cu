#include "kda/cuda/portable/launch.cuh"

namespace lt2::kda::portable {

template Status launch_forward<Dtype::kFloat32>(ForwardParams const&, void*);
template Status launch_backward<Dtype::kFloat32>(BackwardParams const&, float*, void*);
template Status launch_step<Dtype::kFloat32>(StepParams const&, void*);

}  // namespace lt2::kda::portable
