#include "dsa/cuda/portable/loss_launch.cuh"

namespace lt2::dsa::portable {

extern template Status launch_loss<Dtype::kBFloat16>(LossParams const&, float*, float*, void*);
extern template Status launch_loss<Dtype::kFloat16>(LossParams const&, float*, float*, void*);
extern template Status launch_loss<Dtype::kFloat32>(LossParams const&, float*, float*, void*);

namespace {

constexpr int64_t kMaxDim = 256, kMaxShared = 99 << 10;  // bytes that every GPU since sm_80 has for a block

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(T const* x, float const* factor, T* out, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    out[i] = from_float<T>(to_float(x[i]) * *factor);
  }
}

template <class T>
Status launch_scale(void const* x, float const* factor, void* out, int64_t count, void* stream) {
  return launch(scale_kernel<T>, std::min(ceil_div(count, kThreads), kBlocks), kThreads, 0, stream,
                static_cast<T const*>(x), factor, static_cast<T*>(out), count);
}

}  // namespace

Status loss_supports(LossParams const& p) {
  if (p.dim > kMaxDim || p.index_dim > kMaxDim) return "the CUDA kernels take D and DI up to 256";
  if (p.tokens > INT32_MAX || p.keys > INT32_MAX) return "the CUDA kernels take T and S up to 2^31 - 1";
  if (shared_floats(p, p.query_heads, p.index_heads) * int64_t{sizeof(float)} > kMaxShared)
    return "the CUDA kernels take HQ D + 2 HI DI up to about 23,000 elements";
  return kOk;
}

int64_t loss_workspace(LossParams const& p) { return loss_parts(p, nullptr).floats; }

Status indexer_loss(LossParams const& p, float* loss, float* workspace, void* stream) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return launch_loss<Dtype::kBFloat16>(p, loss, workspace, stream);
    case Dtype::kFloat16:
      return launch_loss<Dtype::kFloat16>(p, loss, workspace, stream);
    default:
      return launch_loss<Dtype::kFloat32>(p, loss, workspace, stream);
  }
}

Status scale(Dtype dtype, void const* x, float const* factor, void* out, int64_t count, void* stream) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return launch_scale<__nv_bfloat16>(x, factor, out, count, stream);
    case Dtype::kFloat16:
      return launch_scale<__half>(x, factor, out, count, stream);
    default:
      return launch_scale<float>(x, factor, out, count, stream);
  }
}

}  // namespace lt2::dsa::portable
