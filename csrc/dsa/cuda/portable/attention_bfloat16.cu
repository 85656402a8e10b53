#include "dsa/cuda/portable/attention_launch.cuh"

namespace lt2::dsa::portable {

template Status launch_attention<Dtype::kBFloat16>(AttentionForwardParams const&, float*, void*, int const*);
template Status launch_attention_backward<Dtype::kBFloat16>(AttentionBackwardParams const&, float*, void*,
                                                            int const*);

}  // namespace lt2::dsa::portable
