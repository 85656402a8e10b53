// Operators of a decode step, which are also the parts of others: see library.cpp for what they take.
#pragma once

#include <vector>

#include "bindings/tensor.h"
#include "block_ops/block_ops.h"

namespace lt2 {

std::vector<Tensor> linear_step(Tensor const& x, std::vector<Tensor> const& weights,
                                OptionalTensor const& norm_weight, OptionalTensor const& residual, double eps,
                                bool swiglu, bool settled, int64_t floats);
Tensor mlp_step(Tensor const& o, Tensor const& residual, Tensor const& output, Tensor const& norm_weight,
                Tensor const& gate, Tensor const& up, Tensor const& down, double eps);
// gdn_decode_fused_. settled: the kernel before writes nothing but qkv, z, a and b.
Tensor gdn_fused_step(Tensor const& state, Tensor const& conv_state, Tensor const& qkv, Tensor const& z,
                      Tensor const& a, Tensor const& b, Tensor const& conv_weight,
                      OptionalTensor const& conv_bias, Tensor const& A_log, Tensor const& dt_bias,
                      Tensor const& norm_weight, OptionalTensor const& slots, double scale, double eps,
                      bool use_qk_l2norm, bool allow_neg_eigval, bool state_v_first, bool settled);
// What a call of rope_cache_ is of, checked, with the tensor that it returns.
struct RopeOperands {
  Tensor q, k, v, q_out;
  block_ops::RopeCacheParams p;
};
RopeOperands rope_operands(Tensor const& k_cache, Tensor const& v_cache, Tensor const& q, Tensor const& k,
                           Tensor const& v, Tensor const& cos, Tensor const& sin, Tensor const& places,
                           OptionalTensor const& slots);
void run_rope(RopeOperands const& x);
// rope_cache_ of an index and of attention, then lightning_indexer of what the index's cache [slots, S, DI]
// has in the rows' slots: indices. What is `settled` for gdn_fused_step is here as well.
Tensor select_step(RopeOperands const& index, RopeOperands const& attention, Tensor const& index_cache,
                   Tensor const& weights, Tensor const& offsets, OptionalTensor const& slots, int64_t topk,
                   double scale);
Tensor rope_cache_(Tensor const& k_cache, Tensor const& v_cache, Tensor const& q, Tensor const& k,
                   Tensor const& v, Tensor const& cos, Tensor const& sin, Tensor const& places,
                   OptionalTensor const& slots);
Tensor loop_decode_attention(Tensor const& q, Tensor const& k_cache, Tensor const& v_cache,
                             Tensor const& lengths, OptionalTensor const& slots,
                             OptionalTensor const& indices, OptionalTensor const& loop_map, double scale);

}  // namespace lt2
