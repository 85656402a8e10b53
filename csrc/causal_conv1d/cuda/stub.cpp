// There are no CUDA kernels of this family: same symbols, one clear message.
#include "causal_conv1d/causal_conv1d.h"

namespace lt2::causal_conv1d::portable {

static Status const kNotSupported = "not supported on CUDA, only on the CPU";

Status forward(ForwardParams const&, void*) { return kNotSupported; }
Status backward(BackwardParams const&, void*) { return kNotSupported; }
Status step(StepParams const&, void*) { return kNotSupported; }

}  // namespace lt2::causal_conv1d::portable
