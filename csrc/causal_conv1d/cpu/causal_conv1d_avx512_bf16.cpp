#define LT2_ISA avx512_bf16
#include "causal_conv1d/cpu/causal_conv1d_kernels.h"
