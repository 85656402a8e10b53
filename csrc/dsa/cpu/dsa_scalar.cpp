#define LT2_ISA scalar
#include "dsa/cpu/dsa_kernels.h"
