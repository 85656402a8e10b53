#include <algorithm>

#include "dsa/cuda/sm90/attention_backward.cuh"
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

// lse and delta, [B, HQ, tokens] each.
struct Rows {
  int64_t tokens;
  float *lse, *delta;
};
Rows take_rows(AttentionParams const& p, Arena& arena) {
  int64_t const tokens = portable::ceil_div(p.tokens, kTile) * kTile, size = p.batch * p.query_heads * tokens;
  float* const lse = arena.take<float>(size);
  return {tokens, lse, arena.take<float>(size)};
}

BackwardLaunch take_launch(AttentionBackwardParams const& p, Arena& arena, int* redo, Rows const& rows) {
  BackwardLaunch a{p, take_masks(p, arena, redo), nullptr, rows.lse, rows.delta, nullptr, nullptr};
  a.key_bits = arena.take<uint4>(p.batch * a.masks.query_tiles * a.masks.key_tiles * kTile);
  if (p.query_heads != p.key_heads) {
    a.dk = arena.take<float>(p.batch * p.query_heads * p.keys * p.dim);
    a.dv = arena.take<float>(p.batch * p.query_heads * p.keys * p.dim);
  }
  return a;
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
  Status const of_keys = launch_pass<BackwardTraits<T, kDim, true>>(a, maps, stream);
  if (of_keys != kOk) return of_keys;
  Status const of_queries = launch_pass<BackwardTraits<T, kDim, false>>(a, maps, stream);
  if (of_queries != kOk || a.dk == nullptr) return of_queries;
  int64_t const pieces = p.batch * p.keys * p.key_heads * kDim / portable::kElements;
  return launch(sum_parts<T, kDim>, portable::ceil_div(pieces, portable::kThreads), portable::kThreads, 0,
                stream, a);
}

template <Dtype kDtype, int kDim>
Status launch_rows(AttentionBackwardParams const& p, Rows const& rows, void* stream) {
  int64_t const pieces = p.batch * p.query_heads * rows.tokens * kDim / portable::kElements;
  return launch(row_kernel<Element<kDtype>, kDim>, portable::ceil_div(pieces, portable::kThreads),
                portable::kThreads, 0, stream, p, rows.tokens, rows.lse, rows.delta);
}

}  // namespace

Status attention_backward_supports(AttentionBackwardParams const& p) {
  if (!fits_masks(p)) return "the Hopper kernels of the backward pass take S up to 64 topk";
  if (!tma_compatible(queries(p, p.dout, p.dim)))
    return "the Hopper kernels take a gradient of o with strides of multiples of 8 elements";
  return attention_supports(p);
}

// The gathering kernels, if they run, take the place of all but the flag.
int64_t attention_backward_workspace(AttentionBackwardParams const& p) {
  Arena arena{nullptr};
  int* const redo = arena.take<int>(1);
  int64_t const gathering = arena.floats + portable::attention_backward_workspace(p);
  take_launch(p, arena, redo, take_rows(p, arena));
  return std::max(arena.floats, gathering);
}

Status attention_backward(AttentionBackwardParams const& p, float* workspace, void* stream) {
  Arena arena{workspace};
  int* const redo = arena.take<int>(1);
  float* const rest = workspace + arena.floats;
  Rows const rows = take_rows(p, arena);
  BackwardLaunch const a = take_launch(p, arena, redo, rows);
  if (Status const s = clear(redo, stream); s != kOk) return s;
  if (Status const s = make_masks(p, a.masks, stream); s != kOk) return s;
  Status const transposed =
      launch(transpose_kernel, p.batch * a.masks.query_tiles * a.masks.key_tiles, kTile, 0, stream, a.masks,
             reinterpret_cast<uint32_t*>(const_cast<uint4*>(a.key_bits)));
  if (transposed != kOk) return transposed;
  Status const dense = with_shape(p, [&](auto dtype, auto dim) {
    Status const stats = launch_rows<dtype, dim>(p, rows, stream);
    return stats != kOk ? stats : launch_backward<dtype, dim>(a, stream);
  });
  return dense != kOk ? dense : portable::attention_backward_if(p, rest, stream, redo);
}

}  // namespace lt2::dsa::sm90
