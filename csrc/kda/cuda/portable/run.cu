#include "gdn/cuda/portable/sizes.cuh"
#include "kda/cuda/portable/launch.h"
#include "kda/cuda/portable/problem.cuh"

namespace lt2::kda::portable {

static constexpr int kMaxChunkKeys = 128, kFewTokens = 16;

// Of the current device, for one block.
static int shared_bytes() {
  int device = 0, bytes = 0;
  bool const known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return known ? bytes : 0;
}

bool by_chunks(Inputs const& p, bool recurrent) {
  return shared_bytes() >= kChunkSharedBytes && !recurrent && p.dtype != Dtype::kFloat32 &&
         p.key_dim <= kMaxChunkKeys && p.key_dim % 8 == 0 && p.value_dim % 8 == 0 && p.tokens > kFewTokens;
}

bool whole_rows(Inputs const& p, Strided const& values) {
  return gdn::portable::whole_pieces(p, values) && reinterpret_cast<uintptr_t>(p.g.data) % 8 == 0 &&
         p.g.batch % 2 == 0 && p.g.token % 2 == 0 && p.g.head % 2 == 0;
}

template <class Params>
static int64_t workspace_of_chunks(Params const& p) {
  if (!by_chunks(p, p.recurrent)) return 0;
  return p.dtype == Dtype::kFloat16 ? chunk_workspace<Dtype::kFloat16>(p)
                                    : chunk_workspace<Dtype::kBFloat16>(p);
}

Status supports(Inputs const& p) { return check_sizes(p.heads, p.value_heads, p.key_dim, p.value_dim); }

int64_t forward_workspace(ForwardParams const& p) { return workspace_of_chunks(p); }

int64_t backward_workspace(BackwardParams const& p) {
  return workspace_of_chunks(p) + workspace_floats(p) + p.batch * p.tokens * p.value_heads * p.key_dim;
}

Status forward(ForwardParams const& p, float* workspace, void* stream) {
  if (by_chunks(p, p.recurrent)) {
    return p.dtype == Dtype::kFloat16 ? launch_chunks<Dtype::kFloat16>(p, workspace, stream)
                                      : launch_chunks<Dtype::kBFloat16>(p, workspace, stream);
  }
  LT2_BY_DTYPE(p.dtype, launch_forward, p, stream)
}

Status backward(BackwardParams const& p, float* workspace,
                void* stream){LT2_BY_DTYPE(p.dtype, launch_backward, p, workspace, stream)}

Status step(StepParams const& p, void* stream) {
  LT2_BY_DTYPE(p.dtype, launch_step, p, stream)
}

}  // namespace lt2::kda::portable
