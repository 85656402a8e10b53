// Spreads sequences and heads over threads and picks the instruction set.
#include "common/cpu_isa.h"
#include "gdn/cpu/spread.h"
#include "kda/cpu/kernels.h"

namespace lt2::kda {

using namespace gdn;

LT2_DEFINE_KERNELS()

namespace cpu {

int64_t forward_workspace(ForwardParams const& p, ThreadPool const& pool) {
  return spread_forward_workspace(kernels(), p, pool);
}
void forward(ForwardParams const& p, float* workspace, ThreadPool const& pool) {
  spread_forward(kernels(), p, workspace, pool);
}
int64_t backward_workspace(BackwardParams const& p, ThreadPool const& pool) {
  return spread_backward_workspace(kernels(), p, pool);
}
void backward(BackwardParams const& p, float* workspace, ThreadPool const& pool) {
  spread_backward(kernels(), p, p.key_dim, workspace, pool);
}
void step(StepParams const& p, ThreadPool const& pool) { spread_step(kernels(), p, pool); }

}  // namespace cpu
}  // namespace lt2::kda
