#include "dsa/cuda/portable/attention_launch.cuh"

namespace lt2::dsa::portable {

extern template Status launch_attention<Dtype::kBFloat16>(AttentionForwardParams const&, float*, void*,
                                                          int const*);
extern template Status launch_attention<Dtype::kFloat16>(AttentionForwardParams const&, float*, void*,
                                                         int const*);
extern template Status launch_attention<Dtype::kFloat32>(AttentionForwardParams const&, float*, void*,
                                                         int const*);
extern template Status launch_attention_backward<Dtype::kBFloat16>(AttentionBackwardParams const&, float*,
                                                                   void*, int const*);
extern template Status launch_attention_backward<Dtype::kFloat16>(AttentionBackwardParams const&, float*,
                                                                  void*, int const*);
extern template Status launch_attention_backward<Dtype::kFloat32>(AttentionBackwardParams const&, float*,
                                                                  void*, int const*);

Status attention_if(AttentionForwardParams const& p, float* workspace, void* stream, int const* condition) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return launch_attention<Dtype::kBFloat16>(p, workspace, stream, condition);
    case Dtype::kFloat16:
      return launch_attention<Dtype::kFloat16>(p, workspace, stream, condition);
    default:
      return launch_attention<Dtype::kFloat32>(p, workspace, stream, condition);
  }
}

Status attention_backward_if(AttentionBackwardParams const& p, float* workspace, void* stream,
                             int const* condition) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return launch_attention_backward<Dtype::kBFloat16>(p, workspace, stream, condition);
    case Dtype::kFloat16:
      return launch_attention_backward<Dtype::kFloat16>(p, workspace, stream, condition);
    default:
      return launch_attention_backward<Dtype::kFloat32>(p, workspace, stream, condition);
  }
}

Status attention_supports(AttentionParams const& p) {
  if (p.dim > kMaxDim || p.value_dim > kMaxDim) return "the CUDA kernels take D and DV up to 256";
  if (p.tokens > INT32_MAX) return "the CUDA kernels take T up to 2^31 - 1";
  return kOk;
}

int64_t attention_workspace(AttentionForwardParams const& p) {
  int64_t const splits = cut_attention(p).splits;
  return splits == 1 ? 0 : p.batch * p.tokens * p.query_heads * splits * (p.value_dim + 2);
}

Status attention(AttentionForwardParams const& p, float* workspace, void* stream) {
  return attention_if(p, workspace, stream, nullptr);
}

int64_t attention_backward_workspace(AttentionBackwardParams const& p) {
  return backward_parts(p, nullptr).floats;
}

Status attention_backward(AttentionBackwardParams const& p, float* workspace, void* stream) {
  return attention_backward_if(p, workspace, stream, nullptr);
}

}  // namespace lt2::dsa::portable
