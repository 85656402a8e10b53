#define LT2_ISA avx512
#include "gdn/cpu/gdn_kernels.h"
