#define LT2_ISA amx
#include "kda/cpu/kda_kernels.h"
