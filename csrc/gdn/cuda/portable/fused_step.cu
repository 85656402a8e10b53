#include "gdn/cuda/portable/fused_step_launch.h"
#include "gdn/cuda/portable/fused_step_tiles.cuh"

namespace lt2::gdn::portable {

Status fused_step_supports(FusedStepParams const& p) {
  if (Status const rule = check_state(p.step); rule != kOk) return rule;
  return with_tile(p.step, [&](auto tile) -> Status {
    using Tile = decltype(tile);
    FusedSizes const sizes = fused_sizes(p.step, Tile::kColumns);
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (sizes.shared_bytes<float, Tile>(p.conv.width) > most) {
      return "the fused CUDA step needs more shared memory than this GPU has: fewer value heads per key head";
    }
    return kOk;
  });
}

Status fused_step(FusedStepParams const& p, void* stream) {
  switch (p.step.dtype) {
    case Dtype::kBFloat16:
      return launch_fused_step<Dtype::kBFloat16>(p, stream);
    case Dtype::kFloat16:
      return launch_fused_step<Dtype::kFloat16>(p, stream);
    default:
      return launch_fused_step<Dtype::kFloat32>(p, stream);
  }
}

}  // namespace lt2::gdn::portable
