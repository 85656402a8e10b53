#define LT2_ISA avx512
#include "dsa/cpu/dsa_kernels.h"
