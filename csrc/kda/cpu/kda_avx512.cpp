#define LT2_ISA avx512
#include "kda/cpu/kda_kernels.h"
