#define LT2_ISA neon
#include "dsa/cpu/dsa_kernels.h"
