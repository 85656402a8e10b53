#define LT2_ISA amx
#include "block_ops/cpu/block_ops_kernels.h"
