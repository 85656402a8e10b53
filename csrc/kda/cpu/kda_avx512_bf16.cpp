#define LT2_ISA avx512_bf16
#include "kda/cpu/kda_kernels.h"
