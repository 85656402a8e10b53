#include "dsa/cuda/sm90/attention_backward.cuh"

#include <algorithm>

#include "dsa/cuda/sm90/attention_launch.cuh"

namespace lt2::dsa::sm90 {
namespace {

// key_bits out of masks.bits, a block a tile. Lane l of warp t has query 8 (l / 2) + 2 t + l % 2, so that
// what a ballot gives is word t of a key.
__global__ void __launch_bounds__(kTile) transpose_kernel(Masks const masks, uint32_t* key_bits) {
  int64_t const tile = blockIdx.x;
  if (masks.used[tile] == 0) return;
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint4 const bits = masks.bits[tile * kTile + lane / 2 * 8 + warp * 2 + lane % 2];
  uint32_t const words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t own = 0;
#pragma unroll
    for (int bit = 0; bit < kWarp; ++bit) {
      uint32_t const ballot = __ballot_sync(0xffffffffu, words[w] & (1u << bit));
      own = lane == bit ? ballot : own;
    }
    key_bits[(tile * kTile + lane / 2 * 8 + w * 2 + lane % 2) * 4 + warp] = own;
  }
}

struct Parts {
  BackwardLaunch launch;
  float* gather;  // workspace of the gathering kernels, which run when all other parts are done with
  int64_t floats;
};

Parts backward_parts(AttentionBackwardParams const& p, float* workspace) {
  MaskParts const mask = mask_parts(p, workspace);
  int64_t floats = mask.floats;
  auto const take = [&](int64_t count) {
    float* const part = workspace + floats;
    floats += portable::ceil_div(count, 64) * 64;
    return part;
  };
  float* const gather = take(0);
  int64_t const tokens = mask.masks.query_tiles * kTile;
  auto const* const key_bits =
      reinterpret_cast<uint4 const*>(take(p.batch * tokens * mask.masks.key_tiles * 4));
  float const* const lse = take(p.batch * p.query_heads * tokens);
  float const* const delta = take(p.batch * p.query_heads * tokens);
  int64_t const partial = p.query_heads == p.key_heads ? 0 : p.batch * p.query_heads * p.keys * p.dim;
  float *const dk = take(partial), *const dv = take(partial);
  BackwardLaunch const launch{
      p, mask.masks, key_bits, lse, delta, partial == 0 ? nullptr : dk, partial == 0 ? nullptr : dv};
  return {launch, gather, std::max(floats, mask.floats + portable::attention_backward_workspace(p))};
}

template <class Traits>
Status launch_pass(BackwardLaunch const& a, BackwardMaps const& maps, void* stream) {
  int64_t const tiles = Traits::kKeys ? a.masks.key_tiles : a.masks.query_tiles;
  return launch(backward_kernel<Traits>, a.p.batch * tiles * a.p.query_heads, Traits::kThreads,
                sizeof(typename Traits::Shared), stream, a, maps);
}

template <Dtype kDtype, int kDim>
Status launch_backward(BackwardLaunch const& a, void* stream) {
  using T = Element<kDtype>;
  AttentionBackwardParams const& p = a.p;
  BackwardMaps maps;
  Status const made = make_maps(kDtype, {{&maps.q, queries(p, p.q, kDim), kTileSide},
                                         {&maps.k, keys(p, p.k, kDim), kTileSide},
                                         {&maps.v, keys(p, p.v, kDim), kTileSide},
                                         {&maps.dout, queries(p, p.dout, kDim), kTileSide},
                                         {&maps.dq, queries(p, p.dq, kDim), kTileSide},
                                         {&maps.dk, keys(p, p.dk, kDim), kTileSide},
                                         {&maps.dv, keys(p, p.dv, kDim), kTileSide}});
  if (made != kOk) return made;
  int64_t const pieces = kDim / portable::kElements,
                rows = p.batch * a.masks.query_tiles * kTile * p.query_heads;
  Status const stats =
      launch(row_kernel<T, kDim>, portable::ceil_div(rows * pieces, portable::kThreads), portable::kThreads,
             0, stream, a, const_cast<float*>(a.lse), const_cast<float*>(a.delta));
  if (stats != kOk) return stats;
  Status const of_keys = launch_pass<BackwardTraits<T, kDim, true>>(a, maps, stream);
  if (of_keys != kOk) return of_keys;
  Status const of_queries = launch_pass<BackwardTraits<T, kDim, false>>(a, maps, stream);
  if (of_queries != kOk || a.dk == nullptr) return of_queries;
  return launch(sum_parts<T, kDim>,
                portable::ceil_div(p.batch * p.keys * p.key_heads * pieces, portable::kThreads),
                portable::kThreads, 0, stream, a);
}

}  // namespace

Status attention_backward_supports(AttentionBackwardParams const& p) {
  if (!tma_compatible(queries(p, p.dout, p.dim)))
    return "the Hopper kernels take a gradient of o with strides of multiples of 8 elements";
  if (p.keys > 64 * p.topk) return "the Hopper kernels of the backward pass take S up to 64 topk";
  return attention_supports(p);
}

int64_t attention_backward_workspace(AttentionBackwardParams const& p) {
  return backward_parts(p, nullptr).floats;
}

Status attention_backward(AttentionBackwardParams const& p, float* workspace, void* stream) {
  Parts const parts = backward_parts(p, workspace);
  BackwardLaunch const& a = parts.launch;
  if (Status const s = make_masks(p, a.masks, stream); s != kOk) return s;
  Status const transposed =
      launch(transpose_kernel, p.batch * a.masks.query_tiles * a.masks.key_tiles, kTile, 0, stream, a.masks,
             reinterpret_cast<uint32_t*>(const_cast<uint4*>(a.key_bits)));
  if (transposed != kOk) return transposed;
  Status const dense =
      with_shape(p, [&](auto dtype, auto dim) { return launch_backward<dtype, dim>(a, stream); });
  return dense != kOk ? dense : portable::attention_backward_if(p, parts.gather, stream, a.masks.redo);
}

}  // namespace lt2::dsa::sm90
