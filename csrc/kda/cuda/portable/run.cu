#include "gdn/cuda/portable/sizes.cuh"
#include "kda/cuda/portable/launch.h"
#include "kda/cuda/portable/problem.cuh"

namespace lt2::kda::portable {

Status supports(Inputs const& p) { return check_sizes(p.heads, p.value_heads, p.key_dim, p.value_dim); }

int64_t forward_workspace(ForwardParams const&) { return 0; }

int64_t backward_workspace(BackwardParams const& p) {
  int64_t const rows = p.batch * p.tokens * p.value_heads;
  int64_t const states = chunk_numbers(p) * p.value_heads * p.key_dim * p.value_dim;
  return 2 * (rows * p.value_dim + states) + 3 * rows * p.key_dim;
}

Status forward(ForwardParams const& p, float*, void* stream){LT2_BY_DTYPE(p.dtype, launch_forward, p, stream)}

Status backward(BackwardParams const& p, float* workspace,
                void* stream){LT2_BY_DTYPE(p.dtype, launch_backward, p, workspace, stream)}

Status step(StepParams const& p, void* stream) {
  LT2_BY_DTYPE(p.dtype, launch_step, p, stream)
}

}  // namespace lt2::kda::portable
