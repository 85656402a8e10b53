// Which tile of a state a block of the fused step has, and how many blocks a cluster.
#pragma once

#include "gdn/cuda/portable/fused_step.cuh"

namespace lt2::gdn::portable {

inline FusedSizes fused_sizes(StepParams const& p, int columns) {
  int const slices = static_cast<int>(ceil_div(p.value_dim, columns));
  int const most = runs_sm90_code() ? kMaxCluster : 1;
  int const own = static_cast<int>(ceil_div(slices, most)), group = p.value_heads / p.heads;
  int const blocks = static_cast<int>(ceil_div(slices, own));
  return {slices, blocks, own, group, static_cast<int>(ceil_div(2 * p.key_dim, blocks))};
}

template <class T>
bool is_plain(FusedStepParams const& p, FusedSizes const& sizes) {
  return p.step.tokens == 1 && sizes.group == 1 && sizes.own == 1 &&
         causal_conv1d::portable::packed_windows<T>(p.conv);
}

// Fewer and larger blocks, measured: wide tiles make clusters of half as many blocks, and are faster from so
// many clusters on, where a machine is filled once or a few times, but not with very many. A block that has
// all of a head needs no cluster, and is faster around one block a multiprocessor.
constexpr int64_t kFewClusters = 32, kSomeClusters = 64, kWholeClusters = 128, kManyClusters = 1024;

template <class Tile, class Wide, class Whole, class F>
Status with_any(StepParams const& p, int64_t first_whole, F const& f) {
  int64_t const clusters = p.batch * p.heads;
  bool const one_head = p.heads == p.value_heads && p.value_dim == Whole::kColumns;
  if (one_head && clusters >= first_whole && clusters <= kWholeClusters) return f(Whole{});
  return clusters >= kSomeClusters && clusters < kManyClusters ? f(Wide{}) : f(Tile{});
}

// f(tile) with a tile of both layouts for K.
template <class F>
Status with_tile(StepParams const& p, F const& f) {
  if (p.state_v_first) {
    if (p.key_dim <= 64) return f(ValueFirst<4, 4, 1>{});
    if (p.key_dim <= 96) return f(ValueFirst<8, 3, 2>{});
    if (p.key_dim <= 128) {
      return with_any<ValueFirst<8, 4, 2>, ValueFirst<8, 4, 4>, ValueFirst<8, 4, 2, 512>>(p, kFewClusters, f);
    }
    if (p.key_dim <= 192) return f(ValueFirst<16, 3, 3>{});
    return f(ValueFirst<16, 4, 2>{});
  }
  if (p.key_dim <= 64) return f(KeyFirst<8, 4>{});
  if (p.key_dim <= 96) return f(KeyFirst<8, 6>{});
  if (p.key_dim <= 128) {
    return with_any<KeyFirst<8, 8>, KeyFirst<16, 16>, KeyFirst<32, 8, 512>>(p, kSomeClusters, f);
  }
  if (p.key_dim <= 192) return f(KeyFirst<8, 12>{});
  return f(KeyFirst<8, 16>{});
}

}  // namespace lt2::gdn::portable
