#include "loop_state/cuda/sm90/decode_gather.cuh"

#include <algorithm>
#include <type_traits>

namespace lt2::loop_state::sm90 {
namespace {

constexpr int kMultiprocessors = 132, kSharedBytes = 227 << 10;

int64_t units(DecodeParams const& p) { return p.batch * p.tokens * p.heads; }

GatherCut cut_into(DecodeParams const& p, int blocks) {
  int const parts = static_cast<int>((p.topk + kPartKeys - 1) / kPartKeys), heads = p.query_heads / p.heads;
  int column_bits = 0;
  while (blocks << (column_bits + 1) <= p.key_dim) ++column_bits;
  return {parts, blocks, heads, column_bits, heads << column_bits};
}

// As many blocks for a query and key head as fill the machine, two on a multiprocessor.
GatherCut cut_of(DecodeParams const& p) {
  int blocks = 1;
  while (blocks < kMostBlocks && 2 * blocks * units(p) <= 2 * kMultiprocessors &&
         p.topk > (2 * blocks * kGatherWarps - 1) * kPartKeys)
    blocks *= 2;
  return cut_into(p, blocks);
}

int64_t joined_bytes(GatherCut const& cut) {
  return int64_t{cut.parts} * (cut.heads * sizeof(float2) + (cut.share + kShareSkew) * sizeof(float));
}

bool aligned(Cache const& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.loop % 8 == 0 && x.slot % 8 == 0 &&
         x.token % 8 == 0 && x.head % 8 == 0;
}

}  // namespace

Status supports(DecodeParams const& p) {
  bool const fits = p.indices != nullptr && p.topk > 0 && p.topk <= INT32_MAX / 2 &&
                    p.dtype != Dtype::kFloat32 && p.scale > 0 && p.key_dim == p.value_dim &&
                    (p.key_dim == 64 || p.key_dim == 128) && p.query_heads / p.heads <= kGatherHeads &&
                    aligned(p.k) && aligned(p.v) && reinterpret_cast<uintptr_t>(p.q) % 4 == 0 &&
                    units(p) > 0 && units(p) * kMostBlocks <= INT32_MAX;
  if (!fits)
    return "lists of 2-byte keys in pieces of 16 bytes, D = DV = 64, 128, 16 heads of a key, scale > 0";
  // Of one block, so that it does not depend on the batch which kernel a row has.
  if (joined_bytes(cut_into(p, 1)) > kSharedBytes - static_cast<int>(sizeof(GatherShared<128, true>)))
    return "parts of lists that fit into shared memory";
  return runs_sm90_code() ? kOk : "compute capability 9.0";
}

Status decode(DecodeParams const& p, void* stream) {
  GatherCut const cut = cut_of(p);
  auto const run = [&](auto element, auto dim, auto in_cluster) {
    using T = decltype(element);
    constexpr int kDim = decltype(dim)::value;
    constexpr bool kCluster = decltype(in_cluster)::value;
    return launch_overlapped(gather_kernel<T, kDim, kCluster>,
                             dim3(static_cast<unsigned>(units(p) * cut.blocks)), kGatherThreads,
                             static_cast<int>(sizeof(GatherShared<kDim, kCluster>) + joined_bytes(cut)),
                             cut.blocks, stream, p, cut);
  };
  auto const with_dim = [&](auto element, auto dim) {
    return cut.blocks > 1 ? run(element, dim, std::true_type{}) : run(element, dim, std::false_type{});
  };
  auto const with_dtype = [&](auto element) {
    return p.key_dim == 64 ? with_dim(element, std::integral_constant<int, 64>{})
                           : with_dim(element, std::integral_constant<int, 128>{});
  };
  return p.dtype == Dtype::kBFloat16 ? with_dtype(Element<Dtype::kBFloat16>{})
                                     : with_dtype(Element<Dtype::kFloat16>{});
}

}  // namespace lt2::loop_state::sm90
