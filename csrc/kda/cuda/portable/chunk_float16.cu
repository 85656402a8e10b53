#include "kda/cuda/portable/chunk_launch.cuh"

namespace lt2::kda::portable {

template int64_t chunk_workspace<Dtype::kFloat16>(ForwardParams const&);
template int64_t chunk_workspace<Dtype::kFloat16>(BackwardParams const&);
template Status launch_chunks<Dtype::kFloat16>(ForwardParams const&, float*, void*);
template Status launch_chunk_scans<Dtype::kFloat16>(BackwardParams const&, Workspace const&, float*, void*);

}  // namespace lt2::kda::portable
