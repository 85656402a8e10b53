#define LT2_ISA avx2
#include "gdn/cpu/gdn_kernels.h"
