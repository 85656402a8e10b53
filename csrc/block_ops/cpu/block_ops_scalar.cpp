#define LT2_ISA scalar
#include "block_ops/cpu/block_ops_kernels.h"
