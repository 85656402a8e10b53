#include <algorithm>

#include "common/cuda/launch.cuh"
#include "gdn/cuda/portable/gradients.cuh"
#include "gdn/cuda/sm90/backward.cuh"
#include "gdn/cuda/sm90/backward_launch.h"
#include "gdn/cuda/sm90/forward_launch.cuh"

namespace lt2::gdn::sm90 {
namespace {

using namespace cuda;
using namespace cuda::sm90;

Status supports_inputs(Inputs const& p) {
  if (!p.delta) return "the Hopper kernels are those of the delta rule";
  if (p.dtype == Dtype::kFloat32) return "the Hopper kernels take bfloat16 and float16";
  if (p.key_dim != 64 && p.key_dim != 96 && p.key_dim != 128 && p.key_dim != 192)
    return "the Hopper kernels take K = 64, 96, 128 or 192";
  if (p.value_dim % kTileSide != 0) return "the Hopper kernels take multiples of 64 as V";
  if (p.batch == 0 || p.sequences == 0) return "the Hopper kernels take at least one sequence";
  if (p.tokens == 0 || p.tokens > INT32_MAX) return "the Hopper kernels take T in 1..2^31 - 1";
  for (TokenMajor const& x :
       {token_major(p.q, p, p.heads, p.key_dim), token_major(p.k, p, p.heads, p.key_dim),
        token_major(p.v, p, p.value_heads, p.value_dim)}) {
    if (!tma_compatible(x)) return "the Hopper kernels take q, k, v with strides of multiples of 8 elements";
  }
  return runs_sm90_code() ? kOk : "the Hopper kernels need compute capability 9.0";
}

template <Dtype kDtype>
Status launch_by_key_dim(BackwardParams const& p, float* workspace, void* stream) {
  switch (p.key_dim) {
    case 64:
      return launch_backward<kDtype, 64>(p, workspace, stream);
    case 96:
      return launch_backward<kDtype, 96>(p, workspace, stream);
    default:
      return launch_backward<kDtype, 128>(p, workspace, stream);
  }
}

template <Dtype kDtype>
Status launch_by_key_dim(ForwardParams const& p, float* workspace, void* stream) {
  switch (p.key_dim) {
    case 64:
      return launch_forward<kDtype, 64>(p, workspace, stream);
    case 96:
      return launch_forward<kDtype, 96>(p, workspace, stream);
    case 128:
      return launch_forward<kDtype, 128>(p, workspace, stream);
    default:
      return launch_forward<kDtype, 192>(p, workspace, stream);
  }
}

// Rows of the batch that the backward pass takes at a time, so that its workspace does not grow with the
// batch: what fills the multiprocessors with slices of both scans, and is long enough for a launch not to
// matter.
int64_t backward_rows(BackwardParams const& p) {
  if (p.cu_seqlens != nullptr) return p.batch;
  constexpr int64_t kLeast = 1 << 16;  // tokens x heads
  int64_t const slices = 2 * p.value_heads * (p.value_dim / kTileSide);
  return std::min(p.batch,
                  std::max(kMultiprocessors / slices, portable::ceil_div(kLeast, p.tokens * p.value_heads)));
}

BackwardParams rows_of(BackwardParams p, int64_t first, int64_t count) {
  auto const skip = [&](Strided& x, int64_t element_bytes) {
    if (x.data != nullptr) x.data = static_cast<char*>(x.data) + first * x.batch * element_bytes;
  };
  for (Strided* x : {&p.q, &p.k, &p.v, &p.dout, &p.dq, &p.dk, &p.dv}) skip(*x, 2);
  for (Strided* x : {&p.g, &p.beta, &p.dg, &p.dbeta}) skip(*x, sizeof(float));
  int64_t const state = first * p.value_heads * p.key_dim * p.value_dim;
  if (p.initial_state != nullptr) p.initial_state += state;
  if (p.dfinal_state != nullptr) p.dfinal_state += state;
  if (p.dinitial_state != nullptr) p.dinitial_state += state;
  p.batch = p.sequences = count;
  return p;
}

}  // namespace

Status supports(ForwardParams const& p) {
  if (p.recurrent) return "the Hopper kernels scan by chunks";
  return supports_inputs(p);
}

int64_t forward_workspace(ForwardParams const& p) {
  int64_t floats;
  segment_layout(p, nullptr, &floats);
  return floats;
}

Status forward(ForwardParams const& p, float* workspace, void* stream) {
  return p.dtype == Dtype::kFloat16 ? launch_by_key_dim<Dtype::kFloat16>(p, workspace, stream)
                                    : launch_by_key_dim<Dtype::kBFloat16>(p, workspace, stream);
}

Status supports_backward(BackwardParams const& p) {
  if (p.recurrent) return "the Hopper kernels scan by chunks";
  if (p.key_dim > 128) return "the Hopper kernels of the backward pass take K = 64, 96 or 128";
  if (!tma_compatible(token_major(p.dout, p, p.value_heads, p.value_dim)))
    return "the Hopper kernels take a gradient of o with strides of multiples of 8 elements";
  return supports_inputs(p);
}

int64_t backward_workspace(BackwardParams const& p) {
  int64_t bytes;
  BackwardParams const rows = p.cu_seqlens == nullptr ? rows_of(p, 0, backward_rows(p)) : p;
  backward_pass::backward_layout(rows, nullptr, &bytes);
  return bytes / static_cast<int64_t>(sizeof(float));
}

Status backward(BackwardParams const& p, float* workspace, void* stream) {
  int64_t const rows = backward_rows(p);
  for (int64_t first = 0; first < p.batch; first += rows) {
    BackwardParams const part =
        p.cu_seqlens == nullptr ? rows_of(p, first, std::min(rows, p.batch - first)) : p;
    Status const gradients = p.dtype == Dtype::kFloat16
                                 ? launch_by_key_dim<Dtype::kFloat16>(part, workspace, stream)
                                 : launch_by_key_dim<Dtype::kBFloat16>(part, workspace, stream);
    if (gradients != kOk) return gradients;
  }
  if (p.A_log == nullptr) return kOk;
  return launch(portable::gate_gradients, p.sequences * p.value_heads, portable::kGradientThreads, 0, stream,
                p);
}

}  // namespace lt2::gdn::sm90
