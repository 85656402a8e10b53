#include "gdn/cuda/portable/chunk_forward.cuh"
#include "gdn/cuda/portable/launch.h"
#include "gdn/cuda/portable/simple_launch.h"
#include "gdn/cuda/portable/sizes.cuh"

namespace lt2::gdn::portable {
namespace {

// Whether the forward pass goes by chunks: else token by token.
bool by_chunks(ForwardParams const& p) { return !p.recurrent && p.dtype != Dtype::kFloat32; }

template <class Params>
bool simple(Params const& p) {
  return !p.recurrent && simple_supports(p);
}

}  // namespace

Status supports(Inputs const& p) { return check_sizes(p.heads, p.value_heads, p.key_dim, p.value_dim); }

int64_t forward_workspace(ForwardParams const& p) {
  if (simple(p)) return simple_plan_floats(p, 1);
  if (!by_chunks(p)) return 0;
  return chunk_numbers<kScanChunk>(p) * p.value_heads *
         static_cast<int64_t>(sizeof(ChunkRecord) / sizeof(float));
}

int64_t backward_workspace(BackwardParams const& p) {
  if (simple(p)) return simple_backward_floats(p);
  return workspace_floats(p);
}

Status forward(ForwardParams const& p, float* workspace, void* stream) {
  if (simple(p)) {
    return p.dtype == Dtype::kFloat16 ? launch_simple_forward<Dtype::kFloat16>(p, workspace, stream)
                                      : launch_simple_forward<Dtype::kBFloat16>(p, workspace, stream);
  }
  if (by_chunks(p)) {
    return p.dtype == Dtype::kFloat16 ? launch_chunks<Dtype::kFloat16>(p, workspace, stream)
                                      : launch_chunks<Dtype::kBFloat16>(p, workspace, stream);
  }
  LT2_BY_DTYPE(p.dtype, launch_forward, p, stream)
}

Status backward(BackwardParams const& p, float* workspace, void* stream) {
  if (simple(p)) {
    return p.dtype == Dtype::kFloat16 ? launch_simple_backward<Dtype::kFloat16>(p, workspace, stream)
                                      : launch_simple_backward<Dtype::kBFloat16>(p, workspace, stream);
  }
  LT2_BY_DTYPE(p.dtype, launch_backward, p, workspace, stream)
}

Status step(StepParams const& p, void* stream) {
  if (Status const sizes = check_sizes(p.heads, p.value_heads, p.key_dim, p.value_dim); sizes != kOk)
    return sizes;
  if (p.tokens < 1 || p.tokens > kMaxStepTokens) return "the CUDA kernels take steps of 1..8 tokens";
  LT2_BY_DTYPE(p.dtype, launch_step, p, stream)
}

}  // namespace lt2::gdn::portable
