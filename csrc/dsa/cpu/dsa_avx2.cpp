#define LT2_ISA avx2
#include "dsa/cpu/dsa_kernels.h"
