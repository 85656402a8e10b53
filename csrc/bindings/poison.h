// For tests: whether memory of the CPU that an operator asks for is filled with NaN (-1 in integers), and how
// many tensors were. torch.utils.deterministic does so on GPUs.
#pragma once

#include <cstdint>

namespace lt2 {

inline bool poison_memory = false;
inline int64_t poisoned_tensors = 0;

}  // namespace lt2
