#include "dsa/cuda/sm90/launch.cuh"

namespace lt2::dsa::sm90 {

template int64_t workspace<Dtype::kFloat16>(IndexerParams const&);
template Status launch_indexer<Dtype::kFloat16>(IndexerParams const&, float*, void*);

}  // namespace lt2::dsa::sm90
