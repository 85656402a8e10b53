#include "dsa/cuda/portable/loss_launch.cuh"

namespace lt2::dsa::portable {

template Status launch_loss<Dtype::kFloat32>(LossParams const&, float*, float*, void*);

}  // namespace lt2::dsa::portable
