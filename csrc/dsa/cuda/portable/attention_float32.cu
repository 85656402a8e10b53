#include "dsa/cuda/portable/attention_launch.cuh"

namespace lt2::dsa::portable {

template Status launch_attention<Dtype::kFloat32>(AttentionForwardParams const&, float*, void*, int const*);
template Status launch_attention_backward<Dtype::kFloat32>(AttentionBackwardParams const&, float*, void*,
                                                           int const*);

}  // namespace lt2::dsa::portable
