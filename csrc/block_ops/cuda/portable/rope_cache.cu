#include "block_ops/cuda/portable/rope_cache.cuh"

#include "common/cuda/overlap.cuh"

namespace lt2::block_ops::portable {
namespace {

constexpr int kThreads = 128;

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) rope_cache_heads(RopeCacheParams const p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int const i = static_cast<int>(blockIdx.y) * kThreads + threadIdx.x;
  if (i < rope_pieces(p, kVec)) rope_cache_piece<T, kVec>(p, blockIdx.x, i);
}

}  // namespace

Status rope_cache(RopeCacheParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVec = 16 / sizeof(T);
    bool const whole = rope_in_whole_pieces(p);
    int64_t const across = (rope_pieces(p, whole ? kVec : 1) + kThreads - 1) / kThreads;
    if (p.batch * p.tokens > INT32_MAX || across > 65535) return Status{"too many tokens for one launch"};
    dim3 const grid(static_cast<unsigned>(p.batch * p.tokens), static_cast<unsigned>(across));
    return launch_overlapped(whole ? rope_cache_heads<T, kVec> : rope_cache_heads<T, 1>, grid, kThreads, 0, 1,
                             stream, p);
  });
}

}  // namespace lt2::block_ops::portable
