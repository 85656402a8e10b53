// What the two ways of decode attention share on the host.
#pragma once

#include "loop_state/loop_state.h"

namespace lt2::loop_state::portable {

// Tensor cores and copies of 16 bytes: parts of the keys of a unit side by side, then joined.
bool split_supports(DecodeParams const& p);
int64_t split_workspace(DecodeParams const& p);
Status split_decode(DecodeParams const& p, float* workspace, void* stream);

}  // namespace lt2::loop_state::portable
