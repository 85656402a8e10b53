#define LT2_ISA avx512_bf16
#include "block_ops/cpu/block_ops_kernels.h"
