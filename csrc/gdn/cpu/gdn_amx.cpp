#define LT2_ISA amx
#include "gdn/cpu/gdn_kernels.h"
