#include <algorithm>
#include <type_traits>

#include "loop_state/cuda/portable/decode.h"
#include "loop_state/cuda/portable/decode_split.cuh"

namespace lt2::loop_state::portable {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(Cache const& cache) {
  return reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 && cache.loop % kElements == 0 &&
         cache.slot % kElements == 0 && cache.token % kElements == 0 && cache.head % kElements == 0;
}

SplitCut cut_of(DecodeParams const& p, float* partial) {
  int64_t const queries = unit_tokens(p) * (p.query_heads / p.heads);
  int64_t const keys = p.indices == nullptr ? p.capacity : p.topk;
  return {ceil_div(queries, kRows), std::max<int64_t>(1, ceil_div(keys, part_keys(p.indices != nullptr))),
          partial};
}

template <class F>
Status with_kind(DecodeParams const& p, F const& f) {
  auto const with_dim = [&](auto element) {
    return p.key_dim == 64   ? f(element, std::integral_constant<int, 64>{})
           : p.key_dim == 96 ? f(element, std::integral_constant<int, 96>{})
                             : f(element, std::integral_constant<int, 128>{});
  };
  return p.dtype == Dtype::kBFloat16 ? with_dim(Element<Dtype::kBFloat16>{})
                                     : with_dim(Element<Dtype::kFloat16>{});
}

}  // namespace

bool split_supports(DecodeParams const& p) {
  return p.dtype != Dtype::kFloat32 && p.key_dim == p.value_dim &&
         (p.key_dim == 64 || p.key_dim == 96 || p.key_dim == 128) && aligned(p.k) && aligned(p.v) &&
         reinterpret_cast<uintptr_t>(p.q) % 4 == 0;
}

int64_t split_workspace(DecodeParams const& p) {
  SplitCut const cut = cut_of(p, nullptr);
  return cut.parts == 1 ? 0 : p.batch * p.tokens * p.query_heads * cut.parts * (p.value_dim + 2);
}

Status split_decode(DecodeParams const& p, float* workspace, void* stream) {
  SplitCut const cut = cut_of(p, workspace);
  int device = 0, multiprocessors = 0;
  if (Status const s = status(cudaGetDevice(&device)); s != kOk) return s;
  Status const counted =
      status(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (counted != kOk) return counted;
  return with_kind(p, [&](auto element, auto dim) {
    using T = decltype(element);
    constexpr int kDim = dim, kBytes = sizeof(SplitShared<T, kDim>);
    int64_t const items = unit_count(p) * cut.parts * p.heads * cut.row_blocks;
    int64_t const blocks = std::min<int64_t>(items, int64_t{multiprocessors} * kResident<kDim>);
    auto* const kernel = p.indices == nullptr ? split_kernel<T, kDim, false> : split_kernel<T, kDim, true>;
    Status const split = launch_overlapped(kernel, dim3(static_cast<unsigned>(blocks)), kSplitThreads, kBytes,
                                           1, stream, p, cut);
    if (split != kOk || cut.parts == 1) return split;
    int64_t const queries = p.batch * p.tokens * p.query_heads;
    if (queries > INT32_MAX) return Status{"too many queries for one launch (2^31 - 1 blocks)"};
    return launch_overlapped(join_parts<T, kDim>, dim3(static_cast<unsigned>(queries)), kDim, 0, 1, stream, p,
                             cut);
  });
}

}  // namespace lt2::loop_state::portable
