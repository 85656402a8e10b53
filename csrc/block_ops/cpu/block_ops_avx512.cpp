#define LT2_ISA avx512
#include "block_ops/cpu/block_ops_kernels.h"
