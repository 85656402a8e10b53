#include <algorithm>

#include "gdn/cuda/portable/simple_launch.h"
#include "gdn/cuda/portable/sizes.cuh"

namespace lt2::gdn::portable {
namespace {

// Blocks that fill the multiprocessors of a large GPU twice, and the fewest tokens that are worth one.
constexpr int64_t kBlocks = 264, kLeastSegment = 4 * kChunk;

// Tokens of a segment, or more than there are: then a sequence is one segment.
int64_t segment_size(Inputs const& p, int directions) {
  int64_t const blocks = kBlocks / directions, tokens = p.batch * p.tokens;
  int64_t const rows = std::max(p.sequences * p.value_heads, int64_t{1});
  int64_t const even = p.cu_seqlens == nullptr ? ceil_div(p.tokens, std::max(blocks / rows, int64_t{1}))
                                               : ceil_div(tokens * p.value_heads, blocks);
  int64_t const size = std::max(ceil_div(even, kChunk) * kChunk, kLeastSegment);
  return size < p.tokens ? size : tokens + 1;
}

}  // namespace

bool simple_supports(Inputs const& p) {
  auto const fits = [](int dim) { return dim <= 128 && dim % 8 == 0; };
  return !p.delta && !p.qk_l2norm && p.dtype != Dtype::kFloat32 && fits(p.key_dim) && fits(p.value_dim);
}

SegmentPlan simple_plan(Inputs const& p, int directions, float* workspace) {
  int64_t const size = segment_size(p, directions);
  if (size > p.tokens * p.batch) return {size, nullptr, nullptr};
  int64_t const states = segment_numbers(p, size) * p.value_heads;
  return {size, workspace, workspace + states * p.key_dim * p.value_dim};
}

int64_t simple_plan_floats(Inputs const& p, int directions) {
  int64_t const size = segment_size(p, directions);
  if (size > p.tokens * p.batch) return 0;
  int64_t const states = segment_numbers(p, size) * p.value_heads;
  return ceil_div(states * (int64_t{p.key_dim} * p.value_dim + 1), 4) * 4;  // what follows is aligned, too
}

int64_t simple_edge_floats(Inputs const& p) {
  int64_t const keys = p.key_dim <= 64 ? 64 : 128, values = p.value_dim <= 64 ? 64 : 128;
  return chunk_numbers(p) * p.value_heads * keys * values / 2;
}

int64_t simple_backward_floats(BackwardParams const& p) {
  int64_t const rows = p.batch * p.tokens * p.value_heads * p.key_dim;
  return 2 * (simple_edge_floats(p) + simple_plan_floats(p, 2) + (p.heads == p.value_heads ? 0 : rows));
}

}  // namespace lt2::gdn::portable
