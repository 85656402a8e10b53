#include "dsa/dsa.h"

namespace lt2::dsa::sm90 {

// Never shown: portable kernels are asked next.
static constexpr Status kNotBuilt = "lt2_ext was built without sm_90a";

Status indexer_supports(IndexerParams const&) { return kNotBuilt; }
int64_t indexer_workspace(IndexerParams const&) { return 0; }
Status lightning_indexer(IndexerParams const&, float*, void*) { return kNotBuilt; }

}  // namespace lt2::dsa::sm90
