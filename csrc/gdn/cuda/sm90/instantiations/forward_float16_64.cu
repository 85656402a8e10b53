#include "gdn/cuda/sm90/forward_launch.cuh"

template lt2::Status lt2::gdn::sm90::launch_forward<lt2::Dtype::kFloat16, 64>(ForwardParams const&, float*,
                                                                              void*);
