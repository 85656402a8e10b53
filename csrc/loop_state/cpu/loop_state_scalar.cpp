#define LT2_ISA scalar
#include "loop_state/cpu/loop_state_kernels.h"
