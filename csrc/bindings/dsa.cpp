#include "dsa/dsa.h"

#include "bindings/tensor.h"

namespace lt2 {
namespace {

using namespace dsa;

Heads heads_of(Tensor const& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

#define OP "lt2::lightning_indexer"

template <class Int>
void check_values(char const* name, Int const* offsets, int64_t sequences, int64_t limit) {
  for (int64_t i = 0; i <= sequences; ++i) {
    int64_t const lowest = i == 0 ? 0 : offsets[i - 1];
    STD_TORCH_CHECK(offsets[i] >= lowest && offsets[i] <= limit, OP ": ", name,
                    " must ascend within [0, tokens = ", limit, "], got ", offsets[i], " at position ", i);
  }
}

// The kernels trust the offsets, so their values are checked here.
Offsets offsets_of(char const* name, Tensor const& offsets, int64_t sequences, int64_t limit) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == sequences + 1, OP ": ", name,
                  " must have shape [N + 1] = [", sequences + 1, "], got ", shape_string(offsets));
  bool const int64 = offsets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(int64 || offsets.scalar_type() == ScalarType::Int, OP ": ", name,
                  " must be int32 or int64, got ", dtype_name(offsets.scalar_type()));
  STD_TORCH_CHECK(offsets.is_cpu() && offsets.is_contiguous(), OP ": ", name,
                  " must be contiguous and on the CPU, got shape ", shape_string(offsets));
  Offsets const result{offsets.const_data_ptr(), int64};
  if (int64) check_values(name, static_cast<int64_t const*>(result.data), sequences, limit);
  if (!int64) check_values(name, static_cast<int32_t const*>(result.data), sequences, limit);
  return result;
}

Sequences sequences_of(int64_t batch, int64_t tokens, int64_t keys, OptionalTensor const& cu_seqlens,
                       OptionalTensor const& cu_seqlens_k, OptionalTensor const& positions) {
  STD_TORCH_CHECK(keys <= INT32_MAX, OP ": k_idx must have at most 2^31 - 1 keys, got ", keys);
  Sequences p{batch, tokens, keys, batch, {}, {}, nullptr};
  if (cu_seqlens) {
    STD_TORCH_CHECK(batch == 1, OP ": q_idx must have B = 1 with cu_seqlens, got B = ", batch);
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
                    OP ": cu_seqlens must have shape [N + 1], got ", shape_string(*cu_seqlens));
    p.sequences = cu_seqlens->size(0) - 1;
    p.cu_seqlens = offsets_of("cu_seqlens", *cu_seqlens, p.sequences, tokens);
    p.cu_seqlens_k = cu_seqlens_k ? offsets_of("cu_seqlens_k", *cu_seqlens_k, p.sequences, keys)
                                  : offsets_of("cu_seqlens", *cu_seqlens, p.sequences, keys);
  }
  STD_TORCH_CHECK(cu_seqlens || !cu_seqlens_k, OP ": cu_seqlens_k must come with cu_seqlens, got shape ",
                  shape_string(*cu_seqlens_k));
  if (positions) {
    Tensor const& q_offset = *positions;
    LT2_CHECK_SHAPE(OP, q_offset, "[N]", p.sequences);
    LT2_CHECK_DTYPE(OP, q_offset, ScalarType::Long);
    STD_TORCH_CHECK(q_offset.is_cpu() && q_offset.is_contiguous(),
                    OP ": q_offset must be contiguous and on the CPU, got shape ", shape_string(q_offset));
    p.q_offset = static_cast<int64_t const*>(q_offset.const_data_ptr());
  }
  return p;
}

Tensor indexer_cpu(Tensor const& q_any, Tensor const& k_any, OptionalTensor const& weights,
                   OptionalTensor const& cu_seqlens, OptionalTensor const& cu_seqlens_k,
                   OptionalTensor const& q_offset, int64_t topk, double scale, bool relu) {
  Tensor const q_idx = with_unit_last_stride(q_any), k_idx = with_unit_last_stride(k_any);
  LT2_CHECK_DIM(OP, q_idx, 4);
  int64_t const B = q_idx.size(0), T = q_idx.size(1), HI = q_idx.size(2), DI = q_idx.size(3);
  STD_TORCH_CHECK(q_idx.scalar_type() == ScalarType::Float || q_idx.scalar_type() == ScalarType::BFloat16,
                  OP ": q_idx must be float32 or bfloat16, got ", dtype_name(q_idx.scalar_type()));
  STD_TORCH_CHECK(HI >= 1 && DI >= 8 && DI % 8 == 0,
                  OP ": q_idx must have HI >= 1 and DI a multiple of 8, got shape ", shape_string(q_idx));
  LT2_CHECK_DIM(OP, k_idx, 3);
  LT2_CHECK_SHAPE(OP, k_idx, "[B, S, DI]", B, k_idx.size(1), DI);
  LT2_CHECK_DTYPE(OP, k_idx, q_idx.scalar_type());
  LT2_CHECK_SAME_DEVICE(OP, k_idx, q_idx);
  STD_TORCH_CHECK(topk >= 1, OP ": topk must be at least 1, got ", topk);
  IndexerParams p{};
  static_cast<Sequences&>(p) = sequences_of(B, T, k_idx.size(1), cu_seqlens, cu_seqlens_k, q_offset);
  p.dtype = kernel_dtype(q_idx);
  p.heads = HI;
  p.dim = DI;
  p.topk = topk;
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
  Tensor indices = empty(q_idx, {B, T, topk}, ScalarType::Int);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  Tensor workspace = empty(q_idx, {cpu::indexer_workspace(p, torch_pool())}, ScalarType::Float);
  cpu::lightning_indexer(p, static_cast<float*>(workspace.mutable_data_ptr()), torch_pool());
  return indices;
}

Tensor indexer_cuda(Tensor const&, Tensor const&, OptionalTensor const&, OptionalTensor const&,
                    OptionalTensor const&, OptionalTensor const&, int64_t, double, bool) {
  STD_TORCH_CHECK(false, OP ": q_idx must be on the CPU (not supported on CUDA), got a CUDA tensor");
  return {};
}

#undef OP

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lt2, CPU, m) { m.impl("lightning_indexer", TORCH_BOX(&indexer_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(lt2, CUDA, m) { m.impl("lightning_indexer", TORCH_BOX(&indexer_cuda)); }

}  // namespace lt2
