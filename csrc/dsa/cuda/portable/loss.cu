#include "dsa/cuda/portable/loss_launch.cuh"

namespace lt2::dsa::portable {

extern template Status launch_loss<Dtype::kBFloat16>(LossForwardParams const&, void*, int const*);
extern template Status launch_loss_backward<Dtype::kBFloat16>(LossBackwardParams const&, float*, void*,
                                                              int const*);
extern template Status launch_loss<Dtype::kFloat16>(LossForwardParams const&, void*, int const*);
extern template Status launch_loss_backward<Dtype::kFloat16>(LossBackwardParams const&, float*, void*,
                                                             int const*);
extern template Status launch_loss<Dtype::kFloat32>(LossForwardParams const&, void*, int const*);
extern template Status launch_loss_backward<Dtype::kFloat32>(LossBackwardParams const&, float*, void*,
                                                             int const*);

namespace {

constexpr int64_t kMaxDim = 256, kMaxShared = 99 << 10;  // bytes that every GPU since sm_80 has for a block
constexpr int kMeanThreads = 1024;

}  // namespace

Status loss_supports(LossParams const& p) {
  if (p.dim > kMaxDim || p.index_dim > kMaxDim) return "the CUDA kernels take D and DI up to 256";
  if (p.tokens > INT32_MAX || p.keys > INT32_MAX) return "the CUDA kernels take T and S up to 2^31 - 1";
  if (shared_floats(p, p.query_heads, p.index_heads) * int64_t{sizeof(float)} > kMaxShared)
    return "the CUDA kernels take HQ D + 2 HI DI up to about 23,000 elements";
  return kOk;
}

int64_t loss_workspace(LossForwardParams const&) { return 0; }

Status loss_rows_if(LossForwardParams const& p, void* stream, int const* condition) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return launch_loss<Dtype::kBFloat16>(p, stream, condition);
    case Dtype::kFloat16:
      return launch_loss<Dtype::kFloat16>(p, stream, condition);
    default:
      return launch_loss<Dtype::kFloat32>(p, stream, condition);
  }
}

Status loss_mean(LossForwardParams const& p, void* stream) {
  return launch(mean_kernel<kMeanThreads>, int64_t{1}, kMeanThreads, 0, stream, p);
}

Status indexer_loss(LossForwardParams const& p, float*, void* stream) {
  Status const s = loss_rows_if(p, stream, nullptr);
  return s != kOk ? s : loss_mean(p, stream);
}

int64_t loss_backward_workspace(LossBackwardParams const& p) { return loss_parts(p, nullptr).floats; }

Status loss_backward_if(LossBackwardParams const& p, float* workspace, void* stream, int const* condition) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return launch_loss_backward<Dtype::kBFloat16>(p, workspace, stream, condition);
    case Dtype::kFloat16:
      return launch_loss_backward<Dtype::kFloat16>(p, workspace, stream, condition);
    default:
      return launch_loss_backward<Dtype::kFloat32>(p, workspace, stream, condition);
  }
}

Status indexer_loss_backward(LossBackwardParams const& p, float* workspace, void* stream) {
  return loss_backward_if(p, workspace, stream, nullptr);
}

}  // namespace lt2::dsa::portable
