#define LT2_ISA neon
#include "gdn/cpu/gdn_kernels.h"
