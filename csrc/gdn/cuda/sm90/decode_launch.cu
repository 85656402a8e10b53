#include "gdn/cuda/sm90/decode.cuh"

namespace lt2::gdn::sm90 {
namespace {

// With fewer blocks than this, states are cut finer.
constexpr int64_t kFewBlocks = 2 * 132;

dim3 grid(StepParams const& p, int columns) {
  return dim3(static_cast<unsigned>(ceil_div(p.value_dim, columns)), p.value_heads,
              static_cast<unsigned>(p.batch));
}

template <class T, class Fine, class Coarse>
Status run(StepParams const& p, void* stream) {
  static_assert(Fine::kKeys == Coarse::kKeys && Fine::kColumns < Coarse::kColumns);
  dim3 const fine = grid(p, Fine::kColumns), coarse = grid(p, Coarse::kColumns);
  bool const few = int64_t{coarse.x} * coarse.y * coarse.z < kFewBlocks;
  return few ? launch_overlapped(decode_kernel<T, Fine>, fine, kStepThreads, 0, 1, stream, p)
             : launch_overlapped(decode_kernel<T, Coarse>, coarse, kStepThreads, 0, 1, stream, p);
}

template <class T>
Status run(StepParams const& p, void* stream) {
  if (p.state_v_first) {
    if (p.key_dim <= 64) return run<T, ValueFirst<4, 4, 1>, ValueFirst<4, 4, 2>>(p, stream);
    if (p.key_dim <= 96) return run<T, ValueFirst<8, 3, 1>, ValueFirst<8, 3, 2>>(p, stream);
    if (p.key_dim <= 128) return run<T, ValueFirst<8, 4, 1>, ValueFirst<8, 4, 2>>(p, stream);
    if (p.key_dim <= 192) return run<T, ValueFirst<16, 3, 1>, ValueFirst<16, 3, 2>>(p, stream);
    return run<T, ValueFirst<16, 4, 1>, ValueFirst<16, 4, 2>>(p, stream);
  }
  if (p.key_dim <= 64) return run<T, KeyFirst<8, 4>, KeyFirst<16, 8>>(p, stream);
  if (p.key_dim <= 96) return run<T, KeyFirst<4, 3>, KeyFirst<8, 6>>(p, stream);
  if (p.key_dim <= 128) return run<T, KeyFirst<4, 4>, KeyFirst<8, 8>>(p, stream);
  if (p.key_dim <= 192) return run<T, KeyFirst<4, 6>, KeyFirst<8, 12>>(p, stream);
  return run<T, KeyFirst<4, 8>, KeyFirst<8, 16>>(p, stream);
}

}  // namespace

Status step_supports(StepParams const& p) {
  if (Status const rule = check_state(p); rule != kOk) return rule;
  return runs_sm90_code() ? kOk : "the Hopper step needs a GPU of compute capability 9 and a build for it";
}

Status step(StepParams const& p, void* stream) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return run<__nv_bfloat16>(p, stream);
    case Dtype::kFloat16:
      return run<__half>(p, stream);
    default:
      return run<float>(p, stream);
  }
}

}  // namespace lt2::gdn::sm90
