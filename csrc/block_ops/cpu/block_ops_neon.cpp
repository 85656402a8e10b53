#define LT2_ISA neon
#include "block_ops/cpu/block_ops_kernels.h"
