// One translation unit per element type.
#pragma once

#include "dsa/cuda/portable/loss_launch.h"
#include "dsa/cuda/sm90/loss_gradients.cuh"

namespace lt2::dsa::sm90 {

inline TokenMajor index_queries(LossParams const& p, Heads const& x) {
  return {x.data, x.batch, x.token, x.head, p.batch, p.tokens, p.index_heads, p.index_dim};
}
inline TokenMajor index_keys(LossParams const& p) {
  Heads const& x = p.index_k;
  return {x.data, x.batch, x.token, 0, p.batch, p.keys, 1, p.index_dim};
}

template <Dtype>
Status launch_sums(PairLaunch const& a, void* stream);
template <Dtype>
Status launch_gradients(PairLaunch const& pairs, SlopeLaunch const& slopes, int64_t band, void* stream);

}  // namespace lt2::dsa::sm90
