#pragma once

namespace lt2 {

// Element type of an operand that a kernel accepts in more than one type.
enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

}  // namespace lt2
