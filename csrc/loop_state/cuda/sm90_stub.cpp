#include "loop_state/loop_state.h"

namespace lt2::loop_state::sm90 {

// Never shown: portable kernels are asked next.
Status supports(DecodeParams const&) { return "lt2_ext was built without sm_90a"; }
Status decode(DecodeParams const&, void*) { return supports({}); }

}  // namespace lt2::loop_state::sm90
