#include "dsa/cuda/sm90/indexer_launch.cuh"

namespace lt2::dsa::sm90::indexer {

template int64_t workspace<Dtype::kBFloat16>(IndexerParams const&);
template Status run<Dtype::kBFloat16>(IndexerParams const&, float*, void*);

}  // namespace lt2::dsa::sm90::indexer
