#include "common/cuda/launch.cuh"
#include "kda/cuda/portable/chunk_gradients.cuh"
#include "kda/cuda/portable/launch.h"

namespace lt2::kda::portable {

Status launch_chunk_gradients(BackwardParams const& p, Workspace const& w, void* stream) {
  return launch(chunk_gradients_bf16, gdn::portable::chunk_numbers(p) * p.value_heads, kGradientThreads,
                static_cast<int>(sizeof(ChunkGradientShared)), stream, p, w, whole_rows(p, p.dout));
}

}  // namespace lt2::kda::portable
