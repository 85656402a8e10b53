#include "gdn/cuda/portable/fused_step.cuh"

namespace lt2::gdn::portable {
namespace {

FusedSizes fused_sizes(StepParams const& p, int columns) {
  int const slices = static_cast<int>(ceil_div(p.value_dim, columns));
  int const most = runs_sm90_code() ? kMaxCluster : 1;
  int const own = static_cast<int>(ceil_div(slices, most)), group = p.value_heads / p.heads;
  int const blocks = static_cast<int>(ceil_div(slices, own));
  return {slices, blocks, own, group, static_cast<int>(ceil_div(2 * p.key_dim, blocks))};
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

template <class T>
Status run(FusedStepParams const& p, void* stream) {
  return with_tile(p.step, [&](auto tile) {
    using Tile = decltype(tile);
    FusedSizes const sizes = fused_sizes(p.step, Tile::kColumns);
    dim3 const grid(sizes.blocks, p.step.heads, static_cast<unsigned>(p.step.batch));
    return launch_overlapped(fused_kernel<T, Tile>, grid, Tile::kThreads,
                             sizes.shared_bytes<T, Tile>(p.conv.width), sizes.blocks, stream, p, sizes);
  });
}

}  // namespace

Status fused_step_supports(FusedStepParams const& p) {
  if (Status const rule = check_state(p.step); rule != kOk) return rule;
  return with_tile(p.step, [&](auto tile) -> Status {
    using Tile = decltype(tile);
    FusedSizes const sizes = fused_sizes(p.step, Tile::kColumns);
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (sizes.shared_bytes<float, Tile>(p.conv.width) > most) {
      return "the fused CUDA step needs more shared memory than this GPU has: fewer value heads per key head";
    }
    return kOk;
  });
}

Status fused_step(FusedStepParams const& p, void* stream) {
  switch (p.step.dtype) {
    case Dtype::kBFloat16:
      return run<__nv_bfloat16>(p, stream);
    case Dtype::kFloat16:
      return run<__half>(p, stream);
    default:
      return run<float>(p, stream);
  }
}

}  // namespace lt2::gdn::portable
