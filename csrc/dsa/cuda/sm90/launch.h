// One translation unit per element type.
#pragma once

#include "dsa/dsa.h"

namespace lt2::dsa::sm90 {

template <Dtype>
int64_t workspace(IndexerParams const& p);
template <Dtype>
Status launch_indexer(IndexerParams const& p, float* workspace, void* stream);

}  // namespace lt2::dsa::sm90
