#define LT2_ISA amx
#include "loop_state/cpu/loop_state_kernels.h"
