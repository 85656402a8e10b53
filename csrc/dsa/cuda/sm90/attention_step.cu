#include "dsa/cuda/sm90/attention_step.cuh"

#include <algorithm>

#include "dsa/cuda/sm90/attention_launch.cuh"

namespace lt2::dsa::sm90 {

// As many blocks for a query and key head as fill the machine, two on a multiprocessor. Where these are
// clusters, there is room for a third: else the last cluster may have to wait until enough of one group of
// multiprocessors is free.
Status attention_step(AttentionForwardParams const& p, void* stream) {
  constexpr int64_t kMultiprocessors = 132;
  int64_t const group = p.query_heads / p.key_heads, head_blocks = portable::ceil_div(group, step::kHeads);
  int64_t const units = p.batch * p.tokens * p.key_heads * head_blocks;
  int blocks = 1;
  while (blocks < step::kMostBlocks && 2 * blocks * units <= 2 * kMultiprocessors &&
         p.topk >= 2 * blocks * step::kWarps * step::kKeys)
    blocks *= 2;
  if (units * blocks > INT32_MAX) return "too many queries for one launch (2^31 - 1 blocks)";
  return with_shape(p, [&](auto dtype, auto dim) {
    auto const run = [&](auto stages, auto in_clusters) {
      constexpr int kFloats = in_clusters ? dim : 0;  // of what a block is sent, for each head
      int64_t const heads = std::min<int64_t>(group, step::kHeads);
      return cuda::launch_overlapped(
          step::step_kernel<Element<dtype>, dim, stages, in_clusters>,
          dim3(static_cast<unsigned>(units * blocks)), step::kThreads,
          static_cast<int>(sizeof(step::Shared<dim, stages, in_clusters>) + heads * kFloats * sizeof(float)),
          blocks, stream, p, blocks, static_cast<int>(head_blocks));
    };
    std::integral_constant<int, 2> const two;
    std::integral_constant<int, 3> const three;
    if (blocks == 1) return run(three, std::false_type{});
    return units * blocks > kMultiprocessors ? run(two, std::true_type{}) : run(three, std::true_type{});
  });
}

}  // namespace lt2::dsa::sm90
