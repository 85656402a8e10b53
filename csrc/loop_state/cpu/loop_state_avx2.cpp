#define LT2_ISA avx2
#include "loop_state/cpu/loop_state_kernels.h"
