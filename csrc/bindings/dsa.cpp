#include "dsa/dsa.h"

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>

#include "bindings/steps.h"
#include "dsa/indexer_step.h"

namespace lt2 {
namespace {

using namespace dsa;

Heads heads_of(Tensor const& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }
float* floats(Tensor const& x) { return static_cast<float*>(x.mutable_data_ptr()); }

template <class Int>
void check_values(char const* op, char const* name, Int const* offsets, int64_t sequences, int64_t limit) {
  for (int64_t i = 0; i <= sequences; ++i) {
    int64_t const lowest = i == 0 ? 0 : offsets[i - 1];
    STD_TORCH_CHECK(offsets[i] >= lowest && offsets[i] <= limit, op, ": ", name,
                    " must ascend within [0, tokens = ", limit, "], got ", offsets[i], " at position ", i);
  }
}

// The CPU kernels trust the offsets, so their values are checked here; the CUDA kernels clamp them.
Offsets offsets_of(char const* op, char const* name, Tensor const& offsets, Tensor const& queries,
                   int64_t sequences, int64_t limit) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == sequences + 1, op, ": ", name,
                  " must have shape [N + 1] = [", sequences + 1, "], got ", shape_string(offsets));
  bool const int64 = offsets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(int64 || offsets.scalar_type() == ScalarType::Int, op, ": ", name,
                  " must be int32 or int64, got ", dtype_name(offsets.scalar_type()));
  STD_TORCH_CHECK(offsets.device() == queries.device() && offsets.is_contiguous(), op, ": ", name,
                  " must be contiguous and on the device of the queries, got shape ", shape_string(offsets));
  Offsets const result{offsets.const_data_ptr(), int64};
  if (!queries.is_cpu()) return result;
  if (int64) check_values(op, name, static_cast<int64_t const*>(result.data), sequences, limit);
  if (!int64) check_values(op, name, static_cast<int32_t const*>(result.data), sequences, limit);
  return result;
}

// queries [B, T, ..]
Sequences sequences_of(char const* op, Tensor const& queries, int64_t keys, OptionalTensor const& cu_seqlens,
                       OptionalTensor const& cu_seqlens_k, OptionalTensor const& q_offset) {
  int64_t const batch = queries.size(0), tokens = queries.size(1);
  STD_TORCH_CHECK(keys <= INT32_MAX, op, ": S must be at most 2^31 - 1, got ", keys);
  Sequences p{batch, tokens, keys, batch, {}, {}, nullptr};
  if (cu_seqlens) {
    STD_TORCH_CHECK(batch == 1, op, ": cu_seqlens must come with B = 1, got B = ", batch);
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op,
                    ": cu_seqlens must have shape [N + 1], got ", shape_string(*cu_seqlens));
    p.sequences = cu_seqlens->size(0) - 1;
    p.cu_seqlens = offsets_of(op, "cu_seqlens", *cu_seqlens, queries, p.sequences, tokens);
    p.cu_seqlens_k = cu_seqlens_k ? offsets_of(op, "cu_seqlens_k", *cu_seqlens_k, queries, p.sequences, keys)
                                  : offsets_of(op, "cu_seqlens", *cu_seqlens, queries, p.sequences, keys);
  }
  STD_TORCH_CHECK(cu_seqlens || !cu_seqlens_k, op, ": cu_seqlens_k must come with cu_seqlens, got shape ",
                  shape_string(*cu_seqlens_k));
  if (q_offset) {
    STD_TORCH_CHECK(has_shape(*q_offset, {p.sequences}), op, ": q_offset must have shape [N] = [",
                    p.sequences, "], got ", shape_string(*q_offset));
    STD_TORCH_CHECK(q_offset->scalar_type() == ScalarType::Long, op, ": q_offset must be int64, got ",
                    dtype_name(q_offset->scalar_type()));
    STD_TORCH_CHECK(q_offset->device() == queries.device() && q_offset->is_contiguous(), op,
                    ": q_offset must be contiguous and on the device of the queries, got shape ",
                    shape_string(*q_offset));
    p.q_offset = static_cast<int64_t const*>(q_offset->const_data_ptr());
  }
  return p;
}

#define OP "lt2::lightning_indexer"

void check_status(Status status) { STD_TORCH_CHECK(status == kOk, OP ": ", status); }

IndexerParams indexer_params(Tensor const& q_idx, Tensor const& k_idx, OptionalTensor const& weights,
                             OptionalTensor const& cu_seqlens, OptionalTensor const& cu_seqlens_k,
                             OptionalTensor const& q_offset, int64_t topk, double scale, bool relu,
                             int64_t pool, int64_t blocks) {
  LT2_CHECK_DIM(OP, q_idx, 4);
  int64_t const B = q_idx.size(0), T = q_idx.size(1), HI = q_idx.size(2), DI = q_idx.size(3);
  bool const half_ok = q_idx.scalar_type() == ScalarType::Half && q_idx.is_cuda();
  STD_TORCH_CHECK(
      q_idx.scalar_type() == ScalarType::Float || q_idx.scalar_type() == ScalarType::BFloat16 || half_ok,
      OP ": q_idx must be float32 or bfloat16 (or float16 on CUDA), got ", dtype_name(q_idx.scalar_type()));
  STD_TORCH_CHECK(HI >= 1 && DI >= 8 && DI % 8 == 0,
                  OP ": q_idx must have HI >= 1 and DI a multiple of 8, got shape ", shape_string(q_idx));
  LT2_CHECK_DIM(OP, k_idx, 3);
  LT2_CHECK_SHAPE(OP, k_idx, "[B, S, DI]", k_idx.size(0), k_idx.size(1), DI);
  LT2_CHECK_DTYPE(OP, k_idx, q_idx.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, k_idx, q_idx);
  STD_TORCH_CHECK(topk >= 1, OP ": topk must be at least 1, got ", topk);
  STD_TORCH_CHECK(pool >= 0 && pool % 32 == 0, OP ": pool must be a multiple of 32, got ", pool);
  STD_TORCH_CHECK(pool == 0 || blocks > (topk - 1) / pool, OP ": blocks must have topk keys, got ", blocks);
  IndexerParams p{};
  static_cast<Sequences&>(p) = sequences_of(OP, q_idx, k_idx.size(1), cu_seqlens, cu_seqlens_k, q_offset);
  p.dtype = kernel_dtype(q_idx);
  p.heads = HI;
  p.dim = DI;
  p.topk = topk;
  p.pool = pool;
  p.blocks = blocks;
  p.scale = static_cast<float>(scale);
  p.relu = relu;
  p.q = heads_of(q_idx);
  p.k = {k_idx.data_ptr(), k_idx.stride(0), k_idx.stride(1), 0};
  if (weights) {
    Tensor const& w_idx = *weights;
    LT2_CHECK_SHAPE(OP, w_idx, "[B, T, HI]", B, T, HI);
    LT2_CHECK_DTYPE(OP, w_idx, ScalarType::Float);
    LT2_CHECK_SAME_DEVICE(OP, w_idx, q_idx);
    p.weights = heads_of(w_idx);
  }
  return p;
}

Tensor indexer(Tensor const& q_any, Tensor const& k_any, OptionalTensor const& weights,
               OptionalTensor const& cu_seqlens, OptionalTensor const& cu_seqlens_k,
               OptionalTensor const& q_offset, int64_t topk, double scale, bool relu, int64_t pool,
               int64_t blocks) {
  Tensor const q_idx = with_unit_last_stride(q_any), k_idx = with_unit_last_stride(k_any);
  IndexerParams p = indexer_params(q_idx, k_idx, weights, cu_seqlens, cu_seqlens_k, q_offset, topk, scale,
                                   relu, pool, blocks);
  LT2_CHECK_SHAPE(OP, k_idx, "[B, S, DI]", p.batch, p.keys, p.dim);
  Tensor indices = empty(q_idx, {p.batch, p.tokens, topk}, ScalarType::Int);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  if (q_idx.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q_idx.get_device_index());
    bool const hopper = pool == 0 && sm90::indexer_supports(p) == kOk;
    if (!hopper) check_status((pool ? portable::pooled_indexer_supports : portable::indexer_supports)(p));
    auto const size = hopper ? sm90::indexer_workspace
                      : pool ? portable::pooled_indexer_workspace
                             : portable::indexer_workspace;
    Tensor workspace = empty(q_idx, {size(p)}, ScalarType::Float);
    auto const run = hopper ? sm90::lightning_indexer
                     : pool ? portable::pooled_indexer
                            : portable::lightning_indexer;
    check_status(run(p, floats(workspace), current_cuda_stream(q_idx)));
    return indices;
  }
  Tensor workspace = empty(q_idx, {cpu::indexer_workspace(p, torch_pool())}, ScalarType::Float);
  cpu::lightning_indexer(p, floats(workspace), torch_pool());
  return indices;
}

}  // namespace

Tensor select_step(RopeOperands const& index, RopeOperands const& attention, Tensor const& index_cache,
                   Tensor const& weights, Tensor const& offsets, OptionalTensor const& slots, int64_t topk,
                   double scale) {
  if (index.q.is_cuda()) {
    IndexerStepParams p{
        indexer_params(index.q, index_cache, weights, {}, {}, offsets, topk, scale, true, 0, 0), index.p,
        attention.p};
    torch::stable::accelerator::DeviceGuard const guard(index.q.get_device_index());
    if (sm90::indexer_step_supports(p) == kOk) {
      Tensor indices = empty(index.q, {p.batch, p.tokens, topk}, ScalarType::Int);
      p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
      check_status(sm90::indexer_step(p, current_cuda_stream(index.q)));
      return indices;
    }
  }
  run_rope(index);
  run_rope(attention);
  Tensor const keys = slots ? rows_of(index_cache, *slots) : index_cache;
  return indexer(index.q_out, keys, weights, {}, {}, offsets, topk, scale, true, 0, 0);
}

namespace {

#undef OP
#define OP "lt2::dsa_attention"

AttentionParams attention_of(Tensor const& q, Tensor const& k, Tensor const& v,
                             OptionalTensor const& selection, OptionalTensor const& cu_seqlens,
                             OptionalTensor const& cu_seqlens_k, OptionalTensor const& q_offset, double scale,
                             int64_t window) {
  LT2_CHECK_DIM(OP, q, 4);
  LT2_CHECK_DIM(OP, k, 4);
  LT2_CHECK_DIM(OP, v, 4);
  int64_t const B = q.size(0), T = q.size(1), HQ = q.size(2), D = q.size(3), S = k.size(1), H = k.size(2);
  bool const half_ok = q.scalar_type() == ScalarType::Half && q.is_cuda();
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::BFloat16 || half_ok,
                  OP ": q must be float32 or bfloat16 (or float16 on CUDA), got ",
                  dtype_name(q.scalar_type()));
  STD_TORCH_CHECK(D >= 8 && D % 8 == 0, OP ": q must have D a multiple of 8, got shape ", shape_string(q));
  LT2_CHECK_SHAPE(OP, k, "[B, S, H, D]", B, S, H, D);
  LT2_CHECK_SHAPE(OP, v, "[B, S, H, DV]", B, S, H, v.size(3));
  STD_TORCH_CHECK(H >= 1 && HQ % H == 0, OP ": q must have a multiple of k's heads (", H, "), got shape ",
                  shape_string(q));
  STD_TORCH_CHECK(v.size(3) >= 8 && v.size(3) % 8 == 0, OP ": v must have DV a multiple of 8, got shape ",
                  shape_string(v));
  LT2_CHECK_DTYPE(OP, k, q.scalar_type());
  LT2_CHECK_DTYPE(OP, v, q.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, k, q);
  LT2_CHECK_SAME_DEVICE(OP, v, q);
  AttentionParams p{};
  static_cast<Sequences&>(p) = sequences_of(OP, q, S, cu_seqlens, cu_seqlens_k, q_offset);
  p.dtype = kernel_dtype(q);
  p.query_heads = HQ;
  p.key_heads = H;
  p.dim = D;
  p.value_dim = v.size(3);
  p.scale = static_cast<float>(scale);
  p.q = heads_of(q);
  p.k = heads_of(k);
  p.v = heads_of(v);
  if (selection) {
    Tensor const& indices = *selection;
    LT2_CHECK_DIM(OP, indices, 3);
    LT2_CHECK_SHAPE(OP, indices, "[B, T, topk]", B, T, indices.size(2));
    LT2_CHECK_DTYPE(OP, indices, ScalarType::Int);
    LT2_CHECK_CONTIGUOUS(OP, indices);
    LT2_CHECK_SAME_DEVICE(OP, indices, q);
    p.topk = indices.size(2);
    p.indices = static_cast<int32_t const*>(indices.const_data_ptr());
  } else {
    STD_TORCH_CHECK(window >= 1, OP ": window must be at least 1 without indices, got ", window);
    p.topk = std::min(window, S);
    p.dense = true;
  }
  return p;
}

void check_attention(Status status) { STD_TORCH_CHECK(status == kOk, OP ": ", status); }

// The CUDA kernels read 16 bytes at a time.
Tensor with_kernel_rows(Tensor const& t) {
  Tensor const rows = with_unit_last_stride(t);
  if (t.is_cpu()) return rows;
  bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < rows.dim(); ++i) aligned &= rows.size(i) <= 1 || rows.stride(i) % 8 == 0;
  return aligned ? rows : torch::stable::clone(torch::stable::contiguous(rows));
}

std::tuple<Tensor, Tensor> attention(Tensor const& q_any, Tensor const& k_any, Tensor const& v_any,
                                     OptionalTensor const& indices, OptionalTensor const& cu_seqlens,
                                     OptionalTensor const& cu_seqlens_k, OptionalTensor const& q_offset,
                                     double scale, int64_t window) {
  Tensor const q = with_kernel_rows(q_any), k = with_kernel_rows(k_any), v = with_kernel_rows(v_any);
  AttentionForwardParams p{};
  static_cast<AttentionParams&>(p) =
      attention_of(q, k, v, indices, cu_seqlens, cu_seqlens_k, q_offset, scale, window);
  Tensor o = empty(q, {p.batch, p.tokens, p.query_heads, p.value_dim}, q.scalar_type());
  Tensor lse = empty(q, {p.batch, p.tokens, p.query_heads}, ScalarType::Float);
  p.o = heads_of(o);
  p.lse = floats(lse);
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    bool const hopper = sm90::attention_supports(p) == kOk;
    if (!hopper) check_attention(portable::attention_supports(p));
    Tensor workspace = empty(q, {hopper ? sm90::attention_workspace(p) : portable::attention_workspace(p)},
                             ScalarType::Float);
    auto const run = hopper ? sm90::attention : portable::attention;
    check_attention(run(p, floats(workspace), current_cuda_stream(q)));
    return {o, lse};
  }
  Tensor workspace = empty(q, {cpu::attention_workspace(p, torch_pool())}, ScalarType::Float);
  cpu::attention(p, floats(workspace), torch_pool());
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    Tensor const& dout_any, OptionalTensor const& dlse_any, Tensor const& q_any, Tensor const& k_any,
    Tensor const& v_any, OptionalTensor const& indices, Tensor const& o_any, Tensor const& lse,
    OptionalTensor const& cu_seqlens, OptionalTensor const& cu_seqlens_k, OptionalTensor const& q_offset,
    double scale, int64_t window) {
  Tensor const q = with_kernel_rows(q_any), k = with_kernel_rows(k_any), v = with_kernel_rows(v_any);
  Tensor const o = with_kernel_rows(o_any), dout = with_kernel_rows(dout_any);
  AttentionBackwardParams p{};
  static_cast<AttentionParams&>(p) =
      attention_of(q, k, v, indices, cu_seqlens, cu_seqlens_k, q_offset, scale, window);
  int64_t const B = p.batch, T = p.tokens, HQ = p.query_heads;
  for (auto const& [name, x] : {std::pair{"dout", &dout}, std::pair{"o", &o}}) {
    STD_TORCH_CHECK(has_shape(*x, {B, T, HQ, p.value_dim}), OP ": ", name,
                    " must have shape [B, T, HQ, DV] = ", shape_string({B, T, HQ, p.value_dim}), ", got ",
                    shape_string(*x));
  }
  LT2_CHECK_DTYPE(OP, dout, q.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, dout, q);
  LT2_CHECK_DTYPE(OP, o, q.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, o, q);
  LT2_CHECK_SHAPE(OP, lse, "[B, T, HQ]", B, T, HQ);
  LT2_CHECK_DTYPE(OP, lse, ScalarType::Float);
  LT2_CHECK_CONTIGUOUS(OP, lse);
  LT2_CHECK_SAME_DEVICE(OP, lse, q);
  p.dout = heads_of(dout);
  p.o = heads_of(o);
  p.lse = static_cast<float const*>(lse.const_data_ptr());
  std::optional<Tensor> const contiguous_dlse =
      dlse_any ? OptionalTensor(torch::stable::contiguous(*dlse_any)) : std::nullopt;
  if (contiguous_dlse) {
    Tensor const& dlse = *contiguous_dlse;
    LT2_CHECK_SHAPE(OP, dlse, "[B, T, HQ]", B, T, HQ);
    LT2_CHECK_DTYPE(OP, dlse, ScalarType::Float);
    LT2_CHECK_SAME_DEVICE(OP, dlse, q);
    p.dlse = static_cast<float const*>(dlse.const_data_ptr());
  }
  Tensor dq = empty(q, {B, T, HQ, p.dim}, q.scalar_type());
  Tensor dk = empty(q, {B, p.keys, p.key_heads, p.dim}, q.scalar_type());
  Tensor dv = empty(q, {B, p.keys, p.key_heads, p.value_dim}, q.scalar_type());
  p.dq = heads_of(dq);
  p.dk = heads_of(dk);
  p.dv = heads_of(dv);
  if (q.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q.get_device_index());
    bool const hopper = sm90::attention_backward_supports(p) == kOk;
    if (!hopper) check_attention(portable::attention_supports(p));
    Tensor workspace =
        empty(q, {hopper ? sm90::attention_backward_workspace(p) : portable::attention_backward_workspace(p)},
              ScalarType::Float);
    auto const run = hopper ? sm90::attention_backward : portable::attention_backward;
    check_attention(run(p, floats(workspace), current_cuda_stream(q)));
    return {dq, dk, dv};
  }
  Tensor workspace = empty(q, {cpu::attention_backward_workspace(p, torch_pool())}, ScalarType::Float);
  cpu::attention_backward(p, floats(workspace), torch_pool());
  return {dq, dk, dv};
}

#undef OP
#define OP "lt2::indexer_loss"

void check_loss(Status status) { STD_TORCH_CHECK(status == kOk, OP ": ", status); }

LossParams loss_of(Tensor const& q_idx, Tensor const& k_idx, OptionalTensor const& weights, Tensor const& q,
                   Tensor const& k, Tensor const& lse, OptionalTensor const& selection,
                   OptionalTensor const& cu_seqlens, double index_scale, double attn_scale) {
  LT2_CHECK_DIM(OP, q_idx, 4);
  LT2_CHECK_DIM(OP, k_idx, 3);
  LT2_CHECK_DIM(OP, q, 4);
  LT2_CHECK_DIM(OP, k, 4);
  int64_t const B = q_idx.size(0), T = q_idx.size(1), HI = q_idx.size(2), DI = q_idx.size(3);
  int64_t const S = k_idx.size(1), HQ = q.size(2), D = q.size(3), H = k.size(2);
  ScalarType const dtype = q_idx.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      (dtype == ScalarType::Half && q_idx.is_cuda()),
                  OP ": q_idx must be float32 or bfloat16 (or float16 on CUDA), got ", dtype_name(dtype));
  STD_TORCH_CHECK(HI >= 1 && DI >= 8 && DI % 8 == 0,
                  OP ": q_idx must have HI >= 1 and DI a multiple of 8, got shape ", shape_string(q_idx));
  LT2_CHECK_SHAPE(OP, k_idx, "[B, S, DI]", B, S, DI);
  LT2_CHECK_SHAPE(OP, q, "[B, T, HQ, D]", B, T, HQ, D);
  STD_TORCH_CHECK(D >= 8 && D % 8 == 0, OP ": q must have D a multiple of 8, got shape ", shape_string(q));
  STD_TORCH_CHECK(H >= 1 && HQ >= 1 && HQ % H == 0, OP ": q must have a multiple of k's heads (", H,
                  "), got shape ", shape_string(q));
  LT2_CHECK_SHAPE(OP, k, "[B, S, H, D]", B, S, H, D);
  LT2_CHECK_SHAPE(OP, lse, "[B, T, HQ]", B, T, HQ);
  LT2_CHECK_DTYPE(OP, k_idx, dtype);
  LT2_CHECK_DTYPE(OP, q, dtype);
  LT2_CHECK_DTYPE(OP, k, dtype);
  LT2_CHECK_DTYPE(OP, lse, ScalarType::Float);
  LT2_CHECK_CONTIGUOUS(OP, lse);
  LT2_CHECK_SAME_DEVICE(OP, k_idx, q_idx);
  LT2_CHECK_SAME_DEVICE(OP, q, q_idx);
  LT2_CHECK_SAME_DEVICE(OP, k, q_idx);
  LT2_CHECK_SAME_DEVICE(OP, lse, q_idx);
  LossParams p{};
  static_cast<Sequences&>(p) = sequences_of(OP, q_idx, S, cu_seqlens, std::nullopt, std::nullopt);
  p.dtype = kernel_dtype(q_idx);
  p.query_heads = HQ;
  p.key_heads = H;
  p.dim = D;
  p.topk = S;
  p.dense = !selection;
  p.scale = static_cast<float>(attn_scale);
  p.q = heads_of(q);
  p.k = heads_of(k);
  p.index_heads = HI;
  p.index_dim = DI;
  p.index_scale = static_cast<float>(index_scale);
  p.index_q = heads_of(q_idx);
  p.index_k = {k_idx.data_ptr(), k_idx.stride(0), k_idx.stride(1), 0};
  p.lse = static_cast<float const*>(lse.const_data_ptr());
  if (selection) {
    Tensor const& indices = *selection;
    LT2_CHECK_DIM(OP, indices, 3);
    LT2_CHECK_SHAPE(OP, indices, "[B, T, topk]", B, T, indices.size(2));
    LT2_CHECK_DTYPE(OP, indices, ScalarType::Int);
    LT2_CHECK_CONTIGUOUS(OP, indices);
    LT2_CHECK_SAME_DEVICE(OP, indices, q_idx);
    p.topk = indices.size(2);
    p.indices = static_cast<int32_t const*>(indices.const_data_ptr());
  }
  if (weights) {
    Tensor const& w_idx = *weights;
    LT2_CHECK_SHAPE(OP, w_idx, "[B, T, HI]", B, T, HI);
    LT2_CHECK_DTYPE(OP, w_idx, ScalarType::Float);
    LT2_CHECK_SAME_DEVICE(OP, w_idx, q_idx);
    p.weights = heads_of(w_idx);
  }
  return p;
}

// What the forward pass leaves to the backward pass.
void set_statistics(LossParams& p, Tensor const& statistics) {
  p.log_sums = static_cast<float*>(statistics.data_ptr());
  p.masses = p.log_sums + p.batch * p.tokens;
  p.rows = p.masses + p.batch * p.tokens;
}

std::tuple<Tensor, Tensor> loss(Tensor const& q_idx_any, Tensor const& k_idx_any,
                                OptionalTensor const& weights, Tensor const& q_any, Tensor const& k_any,
                                Tensor const& lse, OptionalTensor const& selection,
                                OptionalTensor const& cu_seqlens, double index_scale, double attn_scale) {
  Tensor const q_idx = with_kernel_rows(q_idx_any), k_idx = with_kernel_rows(k_idx_any);
  Tensor const q = with_kernel_rows(q_any), k = with_kernel_rows(k_any);
  LossForwardParams p{};
  static_cast<LossParams&>(p) =
      loss_of(q_idx, k_idx, weights, q, k, lse, selection, cu_seqlens, index_scale, attn_scale);
  Tensor mean = empty(q_idx, {}, ScalarType::Float);
  Tensor statistics = empty(q_idx, {2 * p.batch * p.tokens + 1}, ScalarType::Float);
  Tensor losses = empty(q_idx, {p.batch, p.tokens}, ScalarType::Float);
  set_statistics(p, statistics);
  p.losses = floats(losses);
  p.mean = floats(mean);
  if (q_idx.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q_idx.get_device_index());
    bool const hopper = sm90::loss_supports(p) == kOk;
    if (!hopper) check_loss(portable::loss_supports(p));
    Tensor workspace =
        empty(q_idx, {hopper ? sm90::loss_workspace(p) : portable::loss_workspace(p)}, ScalarType::Float);
    auto const run = hopper ? sm90::indexer_loss : portable::indexer_loss;
    check_loss(run(p, floats(workspace), current_cuda_stream(q_idx)));
    return {mean, statistics};
  }
  Tensor workspace = empty(q_idx, {cpu::loss_workspace(p, torch_pool())}, ScalarType::Float);
  cpu::indexer_loss(p, floats(workspace), torch_pool());
  return {mean, statistics};
}

std::tuple<Tensor, Tensor, Tensor> loss_backward(Tensor const& dloss, Tensor const& q_idx_any,
                                                 Tensor const& k_idx_any, OptionalTensor const& weights,
                                                 Tensor const& q_any, Tensor const& k_any, Tensor const& lse,
                                                 OptionalTensor const& selection, Tensor const& statistics,
                                                 OptionalTensor const& cu_seqlens, double index_scale,
                                                 double attn_scale) {
  Tensor const q_idx = with_kernel_rows(q_idx_any), k_idx = with_kernel_rows(k_idx_any);
  Tensor const q = with_kernel_rows(q_any), k = with_kernel_rows(k_any);
  LossBackwardParams p{};
  static_cast<LossParams&>(p) =
      loss_of(q_idx, k_idx, weights, q, k, lse, selection, cu_seqlens, index_scale, attn_scale);
  int64_t const B = p.batch, T = p.tokens, HI = p.index_heads, DI = p.index_dim;
  LT2_CHECK_SHAPE(OP, dloss, "[]", );
  LT2_CHECK_DTYPE(OP, dloss, ScalarType::Float);
  LT2_CHECK_SAME_DEVICE(OP, dloss, q_idx);
  LT2_CHECK_SHAPE(OP, statistics, "[2 B T + 1]", 2 * B * T + 1);
  LT2_CHECK_DTYPE(OP, statistics, ScalarType::Float);
  LT2_CHECK_CONTIGUOUS(OP, statistics);
  LT2_CHECK_SAME_DEVICE(OP, statistics, q_idx);
  Tensor dq = empty(q_idx, {B, T, HI, DI}, q_idx.scalar_type());
  Tensor dk = empty(q_idx, {B, p.keys, DI}, q_idx.scalar_type());
  Tensor dw = weights ? empty(q_idx, {B, T, HI}, ScalarType::Float) : empty(q_idx, {0}, ScalarType::Float);
  set_statistics(p, statistics);
  p.dmean = static_cast<float const*>(dloss.const_data_ptr());
  p.dq = heads_of(dq);
  p.dk = {dk.data_ptr(), dk.stride(0), dk.stride(1), 0};
  if (weights) p.dweights = heads_of(dw);
  if (q_idx.is_cuda()) {
    torch::stable::accelerator::DeviceGuard const guard(q_idx.get_device_index());
    bool const hopper = sm90::loss_supports(p) == kOk;
    if (!hopper) check_loss(portable::loss_supports(p));
    Tensor workspace =
        empty(q_idx, {hopper ? sm90::loss_backward_workspace(p) : portable::loss_backward_workspace(p)},
              ScalarType::Float);
    auto const run = hopper ? sm90::indexer_loss_backward : portable::indexer_loss_backward;
    check_loss(run(p, floats(workspace), current_cuda_stream(q_idx)));
    return {dq, dk, dw};
  }
  Tensor workspace = empty(q_idx, {cpu::loss_backward_workspace(p, torch_pool())}, ScalarType::Float);
  cpu::indexer_loss_backward(p, floats(workspace), torch_pool());
  return {dq, dk, dw};
}

#undef OP

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) {
  m.impl("lightning_indexer", TORCH_BOX(&indexer));
  m.impl("dsa_attention_fwd", TORCH_BOX(&attention));
  m.impl("dsa_attention_bwd", TORCH_BOX(&attention_backward));
  m.impl("indexer_loss_fwd", TORCH_BOX(&loss));
  m.impl("indexer_loss_bwd", TORCH_BOX(&loss_backward));
}

STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) {
  m.impl("lightning_indexer", TORCH_BOX(&indexer));
  m.impl("dsa_attention_fwd", TORCH_BOX(&attention));
  m.impl("dsa_attention_bwd", TORCH_BOX(&attention_backward));
  m.impl("indexer_loss_fwd", TORCH_BOX(&loss));
  m.impl("indexer_loss_bwd", TORCH_BOX(&loss_backward));
}

}  // namespace lt2
