#include "dsa/cuda/sm90/loss_launch.cuh"

namespace lt2::dsa::sm90 {

template Status launch_sums<Dtype::kBFloat16>(PairLaunch const&, void*);
template Status launch_gradients<Dtype::kBFloat16>(PairLaunch const&, SlopeLaunch const&, int64_t, void*);

}  // namespace lt2::dsa::sm90
