#include "gdn/cuda/portable/chunk_launch.cuh"

namespace lt2::gdn::portable {

template Status launch_chunks<Dtype::kFloat16>(ForwardParams const&, float*, void*);

}  // namespace lt2::gdn::portable
