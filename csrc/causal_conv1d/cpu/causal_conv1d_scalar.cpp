#define LT2_ISA scalar
#include "causal_conv1d/cpu/causal_conv1d_kernels.h"
