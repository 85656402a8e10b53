#define LT2_ISA amx
#include "dsa/cpu/dsa_kernels.h"
