// Every op schema of the package, in one place. Implementations register themselves in <family>.cpp;
// defaults, documentation, fakes and autograd are in lt2_ext/ops/<family>.py.
#include <torch/csrc/stable/library.h>

#define LT2_GDN_INPUTS                                                                                  \
  "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? A_log, Tensor? dt_bias, "             \
  "Tensor? initial_state, Tensor? cu_seqlens, float scale, bool use_qk_l2norm, bool use_beta_sigmoid, " \
  "bool allow_neg_eigval, bool state_v_first, bool delta"

STABLE_TORCH_LIBRARY(lt2, m) {
  m.def("gdn_fwd(" LT2_GDN_INPUTS
        ", bool output_final_state, bool recurrent) -> (Tensor o, Tensor final_state)");
  m.def("gdn_bwd(Tensor dout, Tensor? dfinal_state, " LT2_GDN_INPUTS
        ", bool recurrent) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dA_log, "
        "Tensor ddt_bias, "
        "Tensor dinitial_state)");
  m.def(
      "gdn_step_(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? a, Tensor? b, Tensor? A_log, "
      "Tensor? dt_bias, Tensor? slots, float scale, bool use_qk_l2norm, bool use_beta_sigmoid, "
      "bool allow_neg_eigval, bool state_v_first, bool delta) -> Tensor");
  m.def(
      "gdn_decode_fused_(Tensor(a!) state, Tensor(b!) conv_state, Tensor qkv, Tensor z, Tensor a, Tensor b, "
      "Tensor conv_weight, Tensor? conv_bias, Tensor A_log, Tensor dt_bias, Tensor norm_weight, "
      "Tensor? slots, float scale, float eps, bool use_qk_l2norm, bool allow_neg_eigval, "
      "bool state_v_first) -> Tensor");

  m.def("kda_fwd(" LT2_GDN_INPUTS
        ", bool output_final_state, bool recurrent) -> (Tensor o, Tensor final_state)");
  m.def("kda_bwd(Tensor dout, Tensor? dfinal_state, " LT2_GDN_INPUTS
        ", bool recurrent) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dA_log, "
        "Tensor ddt_bias, "
        "Tensor dinitial_state)");
  m.def(
      "kda_step_(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? A_log, "
      "Tensor? dt_bias, Tensor? slots, float scale, bool use_qk_l2norm, bool use_beta_sigmoid, "
      "bool allow_neg_eigval, bool state_v_first, bool delta) -> Tensor");

  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "bool silu, bool output_final_state) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_bwd(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool silu) -> (Tensor dx, Tensor dweight, Tensor dbias, "
      "Tensor dinitial_state)");
  m.def(
      "causal_conv1d_step_(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, Tensor? slots, "
      "bool silu) -> Tensor");

  m.def(
      "lightning_indexer(Tensor q_idx, Tensor k_idx, Tensor? w_idx, Tensor? cu_seqlens, Tensor? "
      "cu_seqlens_k, "
      "Tensor? q_offset, int topk, float scale, bool relu, int pool, int blocks) -> Tensor");

  m.def(
      "dsa_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? indices, Tensor? cu_seqlens, Tensor? "
      "cu_seqlens_k, Tensor? q_offset, float scale, int window) -> (Tensor o, Tensor lse)");
  m.def(
      "dsa_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? indices, Tensor o, "
      "Tensor lse, Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? q_offset, float scale, int window) -> "
      "(Tensor dq, Tensor dk, Tensor dv)");

  m.def(
      "indexer_loss_fwd(Tensor q_idx, Tensor k_idx, Tensor? w_idx, Tensor q, Tensor k, Tensor lse, "
      "Tensor? indices, Tensor? cu_seqlens, float index_scale, float attn_scale) -> "
      "(Tensor loss, Tensor statistics)");
  m.def(
      "indexer_loss_bwd(Tensor dloss, Tensor q_idx, Tensor k_idx, Tensor? w_idx, Tensor q, Tensor k, "
      "Tensor lse, Tensor? indices, Tensor statistics, Tensor? cu_seqlens, float index_scale, "
      "float attn_scale) -> (Tensor dq_idx, Tensor dk_idx, Tensor dw_idx)");

  m.def("swiglu_fwd(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_bwd(Tensor dout, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)");
  m.def("gated_rmsnorm_fwd(Tensor o, Tensor z, Tensor weight, float eps) -> (Tensor out, Tensor rstd)");
  m.def(
      "gated_rmsnorm_bwd(Tensor dout, Tensor o, Tensor z, Tensor rstd, Tensor weight) -> "
      "(Tensor d_o, Tensor dz, Tensor dweight)");
  m.def(
      "rope_cache_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor q, Tensor k, Tensor v, Tensor cos, "
      "Tensor sin, Tensor places, Tensor? slots) -> Tensor");
  m.def(
      "linear_step(Tensor x, Tensor[] weights, Tensor? norm_weight, Tensor? residual, float eps, "
      "bool swiglu, bool settled, int floats) -> Tensor[]");
  m.def(
      "mlp_step(Tensor o, Tensor residual, Tensor output, Tensor norm_weight, Tensor gate, Tensor up, Tensor "
      "down, "
      "float eps) -> Tensor");
  m.def(
      "gdn_block_step_(Tensor h, Tensor(a!) state, Tensor(b!) conv_state, Tensor norm_weight, Tensor[] "
      "projections, "
      "Tensor conv_weight, Tensor A_log, Tensor dt_bias, Tensor head_norm_weight, Tensor[] rest, Tensor? "
      "slots, "
      "float eps) -> Tensor");
  m.def(
      "attention_block_step_(Tensor h, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? index_cache, "
      "Tensor norm_weight, Tensor[] projections, Tensor cos, Tensor sin, Tensor places, Tensor lengths, "
      "Tensor[] index_where, Tensor[] rest, Tensor? slots, int topk, float index_scale, float eps) -> "
      "Tensor");

  m.def("loop_residual_fwd(Tensor h, Tensor h_in, Tensor rho) -> Tensor");
  m.def("loop_residual_bwd(Tensor dout, Tensor h_in, Tensor rho) -> (Tensor dh_in, Tensor drho)");
  m.def(
      "loop_residual_rmsnorm_fwd(Tensor h, Tensor h_in, Tensor? rho, Tensor weight, float eps) -> "
      "(Tensor h_out, Tensor normed, Tensor rstd)");
  m.def(
      "loop_residual_rmsnorm_bwd(Tensor dh_out, Tensor dnormed, Tensor h_out, Tensor rstd, Tensor? h_in, "
      "Tensor? rho, Tensor weight) -> (Tensor dh, Tensor dh_in, Tensor drho, Tensor dweight)");
  m.def(
      "loop_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? slots, "
      "Tensor? indices, Tensor? loop_map, float scale) -> Tensor");
  m.def("loop_state_zero_(Tensor(a!) state, Tensor slots) -> ()");
  m.def("loop_state_copy_(Tensor(a!) state, Tensor src, Tensor dst) -> ()");
}
