#define LT2_ISA avx2
#include "kda/cpu/kda_kernels.h"
