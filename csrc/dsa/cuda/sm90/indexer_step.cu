// A step of decoding from what projections give.
#include "dsa/cuda/sm90/indexer_launch.cuh"

namespace lt2::dsa::sm90 {
namespace {

using namespace cuda;
using namespace cuda::sm90;

template <class F>
auto with_traits(IndexerStepParams const& p, F const& f) {
  auto const with_dtype = [&](auto element) {
    using T = decltype(element);
    auto const with_dim = [&](auto dim) {
      constexpr int kDim = decltype(dim)::value, kGroups = kDim == 64 ? 4 : 2;
      return p.heads <= 8 ? f(indexer::StepTraits<T, kDim, 8, kGroups>{})
                          : f(indexer::StepTraits<T, kDim, 16, kGroups>{});
    };
    return p.dim == 64 ? with_dim(std::integral_constant<int, 64>{})
                       : with_dim(std::integral_constant<int, 128>{});
  };
  return p.dtype == Dtype::kFloat16 ? with_dtype(Element<Dtype::kFloat16>{})
                                    : with_dtype(Element<Dtype::kBFloat16>{});
}

}  // namespace

Status indexer_step_supports(IndexerStepParams const& p) {
  if (Status const s = indexer_supports(p); s != kOk) return s;
  if (p.tokens != 1 || p.pool != 0 || p.cu_seqlens.data != nullptr) return "one token of each row";
  if (!block_ops::portable::rope_in_whole_pieces(p.index) ||
      !block_ops::portable::rope_in_whole_pieces(p.attention))
    return "heads in pieces of 16 bytes";
  bool const fits = with_traits(p, [&](auto traits) { return indexer::is_step<decltype(traits)>(p); });
  return fits ? kOk : "keys whose scores fit into the shared memory of a cluster";
}

Status indexer_step(IndexerStepParams const& p, void* stream) {
  return with_traits(p, [&](auto traits) -> Status {
    using Traits = decltype(traits);
    CUtensorMap map;
    TokenMajor keys = indexer::keys_of(p);
    keys.batches = p.index.slots;
    if (Status const made = make_tensor_map(&map, keys, p.dtype, kTileSide); made != kOk) return made;
    indexer::StepPlan const plan = indexer::plan_step<Traits>(p);
    int64_t const pieces = p.batch * block_ops::portable::rope_pieces(p.attention, 8);
    int64_t const blocks =
        p.batch * plan.blocks + portable::ceil_div(pieces, Traits::kThreads * plan.blocks) * plan.blocks;
    if (blocks > INT32_MAX) return "too many queries for one launch (2^31 - 1 blocks)";
    return launch_overlapped(indexer::step_kernel<Traits, IndexerStepParams>,
                             dim3(static_cast<unsigned>(blocks)), Traits::kThreads, plan.shared_bytes,
                             plan.blocks, stream, p, map, plan.blocks, plan.stages);
  });
}

}  // namespace lt2::dsa::sm90
