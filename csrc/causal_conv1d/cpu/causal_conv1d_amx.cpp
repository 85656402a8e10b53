#define LT2_ISA amx
#include "causal_conv1d/cpu/causal_conv1d_kernels.h"
