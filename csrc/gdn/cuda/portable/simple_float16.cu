#include "gdn/cuda/portable/simple_launch.cuh"

namespace lt2::gdn::portable {

template Status launch_simple_forward<Dtype::kFloat16>(ForwardParams const&, float*, void*);
template Status launch_simple_backward<Dtype::kFloat16>(BackwardParams const&, float*, void*);

}  // namespace lt2::gdn::portable
