// The decode step of a block in one operator: for one token a call costs as much as its kernels. Errors are
// those of the operators that it is made of.
#include <algorithm>
#include <cmath>

#include "bindings/steps.h"

namespace lt2 {
namespace {

void check_count(char const* op, char const* name, std::vector<Tensor> const& weights, size_t want) {
  STD_TORCH_CHECK(weights.size() == want, op, ": ", name, " must be ", want, " tensors, got ",
                  weights.size());
}

Tensor after(Tensor const& o, Tensor const& h, std::vector<Tensor> const& rest, double eps) {
  return mlp_step(o, h, rest[0], rest[1], rest[2], rest[3], rest[4], eps);
}

Tensor gdn_block_step_(Tensor const& h, Tensor const& state, Tensor const& conv_state,
                       Tensor const& norm_weight, std::vector<Tensor> const& projections,
                       Tensor const& conv_weight, Tensor const& A_log, Tensor const& dt_bias,
                       Tensor const& head_norm_weight, std::vector<Tensor> const& rest,
                       OptionalTensor const& slots, double eps) {
  constexpr char const* op = "lt2::gdn_block_step_";
  check_count(op, "projections", projections, 4);
  check_count(op, "rest", rest, 5);
  LT2_CHECK_DIM(op, state, 4);
  auto const x = linear_step(h, projections, norm_weight, {}, eps, false, true, 0);
  double const scale = 1. / std::sqrt(static_cast<double>(std::max<int64_t>(1, state.size(2))));
  Tensor const o = gdn_fused_step(state, conv_state, x[0], x[1], x[2], x[3], conv_weight, {}, A_log, dt_bias,
                                  head_norm_weight, slots, scale, eps, true, false, false, true);
  return after(o, h, rest, eps);
}

Tensor attention_block_step_(Tensor const& h, Tensor const& k_cache, Tensor const& v_cache,
                             OptionalTensor const& index_cache, Tensor const& norm_weight,
                             std::vector<Tensor> const& projections, Tensor const& cos, Tensor const& sin,
                             Tensor const& places, Tensor const& lengths,
                             std::vector<Tensor> const& index_where, std::vector<Tensor> const& rest,
                             OptionalTensor const& slots, int64_t topk, double index_scale, double eps) {
  constexpr char const* op = "lt2::attention_block_step_";
  bool const selects = index_cache.has_value();
  check_count(op, "projections", projections, selects ? 6 : 3);
  check_count(op, "index_where", index_where, selects ? 3 : 0);
  check_count(op, "rest", rest, 5);
  LT2_CHECK_DIM(op, h, 3);
  LT2_CHECK_DIM(op, k_cache, 4);
  LT2_CHECK_DIM(op, v_cache, 4);
  int64_t const B = h.size(0), t = h.size(1), D = k_cache.size(3), DV = v_cache.size(3);
  auto const x = linear_step(h, projections, norm_weight, {}, eps, false, true, selects ? 1 : 0);
  auto const heads = [&](Tensor const& rows, int64_t dim) {
    return torch::stable::view(rows, {B, t, -1, dim});
  };
  STD_TORCH_CHECK(D > 0 && DV > 0 && x[0].size(2) % D == 0 && x[1].size(2) % D == 0 && x[2].size(2) % DV == 0,
                  op, ": projections must give heads of D = ", D, " and DV = ", DV);
  RopeOperands const qkv = rope_operands(k_cache, v_cache, heads(x[0], D), heads(x[1], D), heads(x[2], DV),
                                         cos, sin, places, slots);
  OptionalTensor indices;
  if (selects) {
    Tensor const& cache = *index_cache;
    LT2_CHECK_DIM(op, cache, 3);
    int64_t const DI = cache.size(2);
    STD_TORCH_CHECK(DI > 0 && x[3].size(2) % DI == 0 && x[4].size(2) == DI, op,
                    ": projections must give heads of the index and a key of DI = ", DI);
    Tensor keys = torch::stable::unsqueeze(cache, 2), k = heads(x[4], DI);
    auto const none = [](Tensor& of) { return torch::stable::narrow(of, 3, 0, 0); };
    RopeOperands const index = rope_operands(keys, none(keys), heads(x[3], DI), k, none(k), index_where[0],
                                             index_where[1], places, slots);
    indices = select_step(index, qkv, cache, x[5], index_where[2], slots, topk, index_scale);
  } else {
    run_rope(qkv);
  }
  double const scale = 1. / std::sqrt(static_cast<double>(D));
  Tensor const o = loop_decode_attention(qkv.q_out, k_cache, v_cache, lengths, slots, indices, {}, scale);
  return after(torch::stable::view(o, {B, t, -1}), h, rest, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) {
  m.impl("gdn_block_step_", TORCH_BOX(&gdn_block_step_));
  m.impl("attention_block_step_", TORCH_BOX(&attention_block_step_));
}
STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) {
  m.impl("gdn_block_step_", TORCH_BOX(&gdn_block_step_));
  m.impl("attention_block_step_", TORCH_BOX(&attention_block_step_));
}

}  // namespace lt2
