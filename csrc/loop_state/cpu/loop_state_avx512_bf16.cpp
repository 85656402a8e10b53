#define LT2_ISA avx512_bf16
#include "loop_state/cpu/loop_state_kernels.h"
