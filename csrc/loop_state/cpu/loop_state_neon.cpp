#define LT2_ISA neon
#include "loop_state/cpu/loop_state_kernels.h"
