#include "gdn/gdn.h"

namespace lt2::gdn::sm90 {

// Never shown: portable kernels are asked next.
Status supports(ForwardParams const&) { return "lt2_ext was built without sm_90a"; }
Status forward(ForwardParams const& p, void*) { return supports(p); }

}  // namespace lt2::gdn::sm90
