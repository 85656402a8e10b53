// One translation unit per element type.
#pragma once

#include "dsa/dsa.h"

namespace lt2::dsa::sm90::indexer {

template <Dtype>
int64_t workspace(IndexerParams const& p);
template <Dtype>
Status run(IndexerParams const& p, float* workspace, void* stream);

}  // namespace lt2::dsa::sm90::indexer
