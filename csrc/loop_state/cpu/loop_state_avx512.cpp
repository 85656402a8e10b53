#define LT2_ISA avx512
#include "loop_state/cpu/loop_state_kernels.h"
