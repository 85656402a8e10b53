#define LT2_ISA scalar
#include "kda/cpu/kda_kernels.h"
