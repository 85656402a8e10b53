#define LT2_ISA avx512_bf16
#include "gdn/cpu/gdn_kernels.h"
