#define LT2_ISA neon
#include "kda/cpu/kda_kernels.h"
