#include "dsa/dsa.h"

namespace lt2::dsa::portable {

static constexpr Status kNotBuilt = "lt2_ext was built without CUDA kernels (no nvcc at build time)";

Status indexer_supports(IndexerParams const&) { return kNotBuilt; }
int64_t indexer_workspace(IndexerParams const&) { return 0; }
Status lightning_indexer(IndexerParams const&, float*, void*) { return kNotBuilt; }

}  // namespace lt2::dsa::portable
