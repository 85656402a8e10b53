#include "dsa/cuda/portable/loss_launch.cuh"

namespace lt2::dsa::portable {

template Status launch_loss<Dtype::kFloat16>(LossForwardParams const&, void*, int const*);
template Status launch_loss_backward<Dtype::kFloat16>(LossBackwardParams const&, float*, void*, int const*);

}  // namespace lt2::dsa::portable
