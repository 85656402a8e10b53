// Contract of a step of decoding from what projections give: rope_cache() of an index and of attention, and
// lightning_indexer(), in one launch.
#pragma once

#include "block_ops/block_ops.h"
#include "dsa/dsa.h"

namespace lt2::dsa {

// One token of each row. Row b has the keys of slot index.slot_ids[b] of the cache p.k [slots, S, 1, DI],
// which is index.k_cache; without such a slot it has none. p.q are queries that are not rotated yet, index.q;
// rotated they are kept nowhere, so that index.q_out is not written.
struct IndexerStepParams : IndexerParams {
  block_ops::RopeCacheParams index, attention;
};

// Hopper. Only behind a kernel that has waited for all that is older (common/cuda/overlap.cuh) and writes
// none of the caches, angles, places, slots and offsets.
namespace sm90 {
Status indexer_step_supports(IndexerStepParams const& p);
Status indexer_step(IndexerStepParams const& p, void* cuda_stream);
}  // namespace sm90

}  // namespace lt2::dsa
