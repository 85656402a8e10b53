#define LT2_ISA avx512_bf16
#include "dsa/cpu/dsa_kernels.h"
