#include "dsa/dsa.h"
#include "dsa/indexer_step.h"

namespace lt2::dsa::sm90 {

// Never shown: portable kernels are asked next.
static constexpr Status kNotBuilt = "lt2_ext was built without sm_90a";

Status indexer_supports(IndexerParams const&) { return kNotBuilt; }
int64_t indexer_workspace(IndexerParams const&) { return 0; }
Status lightning_indexer(IndexerParams const&, float*, void*) { return kNotBuilt; }
Status indexer_step_supports(IndexerStepParams const&) { return kNotBuilt; }
Status indexer_step(IndexerStepParams const&, void*) { return kNotBuilt; }

Status attention_supports(AttentionParams const&) { return kNotBuilt; }
int64_t attention_workspace(AttentionForwardParams const&) { return 0; }
Status attention(AttentionForwardParams const&, float*, void*) { return kNotBuilt; }
Status attention_backward_supports(AttentionBackwardParams const&) { return kNotBuilt; }
int64_t attention_backward_workspace(AttentionBackwardParams const&) { return 0; }
Status attention_backward(AttentionBackwardParams const&, float*, void*) { return kNotBuilt; }

Status loss_supports(LossParams const&) { return kNotBuilt; }
int64_t loss_workspace(LossForwardParams const&) { return 0; }
Status indexer_loss(LossForwardParams const&, float*, void*) { return kNotBuilt; }
int64_t loss_backward_workspace(LossBackwardParams const&) { return 0; }
Status indexer_loss_backward(LossBackwardParams const&, float*, void*) { return kNotBuilt; }

}  // namespace lt2::dsa::sm90
