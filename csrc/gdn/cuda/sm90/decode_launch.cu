#include "gdn/cuda/sm90/decode.cuh"

namespace lt2::gdn::sm90 {
namespace {

constexpr int64_t kMaxGridYZ = 65535;
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

bool aligned(StepParams const& p) {
  return reinterpret_cast<uintptr_t>(p.state) % (kPiece * sizeof(float)) == 0 && p.state_slot % kPiece == 0 &&
         p.state_head % kPiece == 0 && p.state_row % kPiece == 0;
}

}  // namespace

Status step_supports(StepParams const& p) {
  int const contiguous = p.state_v_first ? p.key_dim : p.value_dim;
  if (p.key_dim < 1 || p.key_dim > portable::kMaxKeyDim) return "the Hopper step takes K in 1..256";
  if (p.batch > kMaxGridYZ || p.value_heads > kMaxGridYZ)
    return "the Hopper step takes up to 65535 rows and heads";
  if (contiguous % kPiece != 0 || !aligned(p))
    return "the Hopper step takes states in aligned pieces of 16 bytes";
  if (!runs_sm90_code()) return "the Hopper step needs a GPU of compute capability 9 and a build for it";
  return kOk;
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
