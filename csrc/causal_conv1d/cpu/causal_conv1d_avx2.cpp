#define LT2_ISA avx2
#include "causal_conv1d/cpu/causal_conv1d_kernels.h"
