#define LT2_ISA scalar
#include "gdn/cpu/gdn_kernels.h"
