#include "gdn/cuda/sm90/backward_launch.cuh"

template lt2::Status lt2::gdn::sm90::launch_backward<lt2::Dtype::kFloat16, 128>(BackwardParams const&, float*,
                                                                                void*);
