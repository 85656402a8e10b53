#include "dsa/cuda/sm90/attention_step.cuh"

#include "dsa/cuda/sm90/attention_launch.cuh"

namespace lt2::dsa::sm90 {

// As many blocks for a query and key head as fill the machine, two on a multiprocessor.
Status attention_step(AttentionForwardParams const& p, void* stream) {
  constexpr int64_t kFull = 2 * 132;
  int64_t const head_blocks = portable::ceil_div(p.query_heads / p.key_heads, step::kHeads);
  int64_t const units = p.batch * p.tokens * p.key_heads * head_blocks;
  int blocks = 1;
  while (blocks < step::kMostBlocks && 2 * blocks * units <= kFull &&
         p.topk >= 2 * blocks * step::kWarps * step::kKeys)
    blocks *= 2;
  if (units * blocks > INT32_MAX) return "too many queries for one launch (2^31 - 1 blocks)";
  return with_shape(p, [&](auto dtype, auto dim) {
    return cuda::launch_overlapped(
        step::step_kernel<Element<dtype>, dim>, dim3(static_cast<unsigned>(units * blocks)), step::kThreads,
        sizeof(step::Shared<dim>), blocks, stream, p, blocks, static_cast<int>(head_blocks));
  });
}

}  // namespace lt2::dsa::sm90
