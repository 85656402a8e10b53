#define LT2_ISA avx2
#include "block_ops/cpu/block_ops_kernels.h"
