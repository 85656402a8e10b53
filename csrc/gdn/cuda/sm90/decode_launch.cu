#include "gdn/cuda/sm90/decode.cuh"

namespace lt2::gdn::sm90 {
namespace {

// Below so many blocks states are cut finer, from so many on coarser.
constexpr int64_t kFewBlocks = 128, kManyBlocks = 8 * 132;

dim3 grid(StepParams const& p, int columns) {
  return dim3(static_cast<unsigned>(ceil_div(p.value_dim, columns)), p.value_heads,
              static_cast<unsigned>(p.batch));
}

template <class T, class Tile>
Status run_tile(StepParams const& p, void* stream) {
  auto const run = [&](auto kernel) {
    return launch_overlapped(kernel, grid(p, Tile::kColumns), kStepThreads, 0, 1, stream, p);
  };
  return p.state_dtype == Dtype::kBFloat16 ? run(decode_kernel<T, __nv_bfloat16, Tile>)
                                           : run(decode_kernel<T, float, Tile>);
}

template <class T, class Fine, class Middle, class Coarse = Middle>
Status run(StepParams const& p, void* stream) {
  static_assert(Fine::kKeys == Middle::kKeys && Middle::kKeys == Coarse::kKeys);
  static_assert(Fine::kColumns < Middle::kColumns && Middle::kColumns <= Coarse::kColumns);
  auto const blocks = [&](int columns) {
    dim3 const g = grid(p, columns);
    return int64_t{g.x} * g.y * g.z;
  };
  if (blocks(Middle::kColumns) < kFewBlocks) return run_tile<T, Fine>(p, stream);
  return blocks(Coarse::kColumns) < kManyBlocks ? run_tile<T, Middle>(p, stream)
                                                : run_tile<T, Coarse>(p, stream);
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
  if (p.key_dim <= 96) return run<T, KeyFirst<4, 3>, KeyFirst<8, 6>, KeyFirst<16, 12>>(p, stream);
  if (p.key_dim <= 128) return run<T, KeyFirst<4, 4>, KeyFirst<8, 8>, KeyFirst<16, 16>>(p, stream);
  if (p.key_dim <= 192) return run<T, KeyFirst<4, 6>, KeyFirst<8, 12>>(p, stream);
  return run<T, KeyFirst<4, 8>, KeyFirst<8, 16>>(p, stream);
}

}  // namespace

Status step_supports(StepParams const& p) {
  if (!p.delta || p.A_log == nullptr || !p.beta_sigmoid)
    return "the Hopper step is that of a raw gate and beta";
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
