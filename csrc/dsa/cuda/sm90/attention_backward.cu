#include <algorithm>

#include "dsa/cuda/sm90/attention_launch.cuh"
#include "dsa/cuda/sm90/attention_union_backward.cuh"

namespace lt2::dsa::sm90 {
namespace {

// Bits of 128 rows turned into those of 128 keys, by a block. Lane l of warp t has row 8 (l / 2) + 2 t + l %
// 2, so that what a ballot gives is word t of a key. Consecutive `heads` rows have the same bits.
__device__ void transpose_bits(uint4 const* rows, int heads, uint4* keys) {
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint4 const bits = rows[(lane / 2 * 8 + warp * 2 + lane % 2) / heads];
  uint32_t const words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t own = 0;
#pragma unroll
    for (int bit = 0; bit < kWarp; ++bit) {
      uint32_t const ballot = __ballot_sync(0xffffffffu, words[w] & (1u << bit));
      own = lane == bit ? ballot : own;
    }
    reinterpret_cast<uint32_t*>(keys + lane / 2 * 8 + w * 2 + lane % 2)[warp] = own;
  }
}

__global__ void __launch_bounds__(kTile) transpose_masks(Masks const masks, uint4* key_bits) {
  int64_t const tile = blockIdx.x;
  if (portable::skipped(masks.condition) || masks.used[tile] == 0) return;
  transpose_bits(masks.bits + tile * kTile, 1, key_bits + tile * kTile);
}

__global__ void __launch_bounds__(kTile) transpose_unions(Unions const unions, uint4* key_bits) {
  int64_t const pieces = unions.capacity / kTile, tile = blockIdx.x / pieces, i = blockIdx.x % pieces;
  if (i * kTile >= unions.sizes[tile]) return;
  transpose_bits(unions.bits + unions.bits_of(tile, i), kTile / unions.queries,
                 key_bits + int64_t{blockIdx.x} * kTile);
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

BackwardLaunch take_dense(AttentionBackwardParams const& p, Arena& arena, int* redo, Rows const& rows,
                          int const* condition) {
  BackwardLaunch a{p, take_masks(p, arena, redo, condition), nullptr, rows.lse, rows.delta, nullptr, nullptr};
  a.key_bits = arena.take<uint4>(p.batch * a.masks.query_tiles * a.masks.key_tiles * kTile);
  if (p.query_heads != p.key_heads) {
    a.dk = arena.take<float>(p.batch * p.query_heads * p.keys * p.dim);
    a.dv = arena.take<float>(p.batch * p.query_heads * p.keys * p.dim);
  }
  return a;
}

// Where neighbours select more together than what bits for all keys cost less for, or than a fixed number of
// bands holds, the flag `full` is set and other kernels compute dk and dv.
UnionBackwardLaunch take_union(AttentionBackwardParams const& p, Arena& arena, Flags const& flags,
                               Rows const& rows) {
  constexpr int64_t kShareBytes = int64_t{1} << 31, kMostBands = 256, kDense = 8;
  UnionBackwardLaunch a{};
  a.p = p;
  a.redo = flags.redo;
  a.tokens = rows.tokens;
  a.lse = rows.lse;
  a.delta = rows.delta;
  Unions& unions = a.unions;
  unions = take_unions(p, arena);
  unions.word_count = portable::ceil_div(p.keys, kWarp);
  unions.words = arena.take<uint2>(p.batch * unions.tiles * unions.word_count);
  a.key_bits = arena.take<uint4>(p.batch * unions.tiles * unions.capacity);
  a.full = fits_masks(p) ? flags.full : flags.redo;
  int64_t const piece = p.key_heads * kTile * 2 * p.dim, all = unions.tiles * (unions.capacity / kTile);
  a.most = fits_masks(p) ? portable::ceil_div(unions.tiles * portable::ceil_div(p.keys, kTile), kDense) : all;
  a.band = std::min(kShareBytes / (piece * static_cast<int64_t>(sizeof(float))), a.most);
  a.bands = std::min(portable::ceil_div(a.most, a.band), kMostBands);
  a.most = std::min(a.most, a.bands * a.band);
  a.starts = arena.take<int>(p.batch * (unions.tiles + 1));
  a.firsts = arena.take<int>(p.batch * (a.bands + 1));
  a.shares = arena.take<float>(a.band * piece);
  a.sums = a.bands > 1 ? arena.take<float>(p.keys * p.key_heads * 2 * p.dim) : nullptr;
  return a;
}

template <class Traits>
Status launch_pass(BackwardLaunch const& a, BackwardMaps const& maps, void* stream) {
  int64_t const tiles = Traits::kKeys ? a.masks.key_tiles : a.masks.query_tiles;
  int64_t const units = a.p.query_heads / BackwardUnit::heads_of<Traits>(a.p);
  return launch(backward_kernel<Traits>, a.p.batch * tiles * units, Traits::kThreads,
                sizeof(typename Traits::Shared), stream, a, maps);
}

template <Dtype kDtype, int kDim, bool kWindow>
Status launch_dense(BackwardLaunch const& a, bool of_queries, void* stream) {
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
  Status const of_keys = launch_pass<BackwardTraits<T, kDim, true, kWindow>>(a, maps, stream);
  if (of_keys != kOk) return of_keys;
  if (of_queries) {
    Status const s = launch_pass<BackwardTraits<T, kDim, false, kWindow>>(a, maps, stream);
    if (s != kOk) return s;
  }
  if (a.dk == nullptr) return kOk;
  int64_t const pieces = p.batch * p.keys * p.key_heads * kDim / portable::kElements;
  return launch(sum_parts<T, kDim>, portable::ceil_div(pieces, portable::kThreads), portable::kThreads, 0,
                stream, a);
}

template <Dtype kDtype, int kDim>
Status launch_union(UnionBackwardLaunch a, void* stream) {
  using T = Element<kDtype>;
  using Queries = UnionTraits<T, kDim, false>;
  using Keys = UnionTraits<T, kDim, true>;
  constexpr int64_t kMultiprocessors = 132;
  AttentionBackwardParams const& p = a.p;
  int const heads = static_cast<int>(p.query_heads / p.key_heads);
  UnionMaps maps;
  Status const made = make_maps(kDtype, {{&maps.q, queries(p, p.q, kDim), kTileSide / heads, heads},
                                         {&maps.dout, queries(p, p.dout, kDim), kTileSide / heads, heads},
                                         {&maps.dq, queries(p, p.dq, kDim), kTileSide / heads, heads}});
  if (made != kOk) return made;
  Status const of_queries = launch(union_backward_kernel<Queries>, p.batch * a.unions.tiles * p.key_heads,
                                   Queries::kThreads, sizeof(typename Queries::Shared), stream, a, maps);
  if (of_queries != kOk) return of_queries;
  for (a.row = 0; a.row < p.batch; ++a.row) {
    for (a.number = 0; a.number < a.bands; ++a.number) {
      Status const of_keys =
          launch(union_backward_kernel<Keys>, std::min(a.unions.tiles * p.key_heads, kMultiprocessors),
                 Keys::kThreads, sizeof(typename Keys::Shared), stream, a, maps);
      if (of_keys != kOk) return of_keys;
      Status const added =
          launch(add_shares<T, kDim>, std::min(a.unions.word_count * p.key_heads, 2 * kMultiprocessors),
                 kAddThreads, 0, stream, a);
      if (added != kOk) return added;
    }
  }
  return kOk;
}

template <Dtype kDtype, int kDim>
Status launch_rows(AttentionBackwardParams const& p, Rows const& rows, void* stream) {
  int64_t const pieces = p.batch * p.query_heads * rows.tokens * kDim / portable::kElements;
  return launch(row_kernel<Element<kDtype>, kDim>, portable::ceil_div(pieces, portable::kThreads),
                portable::kThreads, 0, stream, p, rows.tokens, rows.lse, rows.delta);
}

Status dense_backward(BackwardLaunch const& a, bool of_queries, void* stream) {
  if (Status const s = make_masks(a.p, a.masks, stream); s != kOk) return s;
  Status const transposed = launch(transpose_masks, a.p.batch * a.masks.query_tiles * a.masks.key_tiles,
                                   kTile, 0, stream, a.masks, const_cast<uint4*>(a.key_bits));
  if (transposed != kOk) return transposed;
  return with_shape(
      a.p, [&](auto dtype, auto dim) { return launch_dense<dtype, dim, false>(a, of_queries, stream); });
}

Status union_backward(UnionBackwardLaunch const& a, void* stream) {
  if (Status const s = make_unions(a.p, a.unions, a.redo, stream); s != kOk) return s;
  if (Status const s = launch(start_kernel, a.p.batch, kStartThreads, 0, stream, a); s != kOk) return s;
  Status const transposed = launch(transpose_unions, a.p.batch * a.unions.tiles * (a.unions.capacity / kTile),
                                   kTile, 0, stream, a.unions, const_cast<uint4*>(a.key_bits));
  if (transposed != kOk) return transposed;
  return with_shape(a.p, [&](auto dtype, auto dim) { return launch_union<dtype, dim>(a, stream); });
}

}  // namespace

Status attention_backward_supports(AttentionBackwardParams const& p) {
  if (is_step(p)) return "the Hopper kernels of the backward pass take T from 64";
  if (!tma_compatible(queries(p, p.dout, p.dim)))
    return "the Hopper kernels take a gradient of o with strides of multiples of 8 elements";
  return attention_supports(p);
}

// The ways to compute take turns in the workspace behind the rows.
int64_t attention_backward_workspace(AttentionBackwardParams const& p) {
  Arena arena{nullptr};
  Flags const flags = take_flags(arena);
  Rows const rows = take_rows(p, arena);
  if (p.dense) return arena.floats;
  Arena gathering = arena, dense = arena;
  if (gathers(p)) take_union(p, gathering, flags, rows);
  if (!gathers(p) || fits_masks(p)) take_dense(p, dense, flags.redo, rows, nullptr);
  return std::max({gathering.floats, dense.floats, arena.floats + portable::attention_backward_workspace(p)});
}

Status attention_backward(AttentionBackwardParams const& p, float* workspace, void* stream) {
  Arena arena{workspace};
  Flags const flags = take_flags(arena);
  Rows const rows = take_rows(p, arena);
  float* const rest = workspace + arena.floats;
  Status const stats =
      with_shape(p, [&](auto dtype, auto dim) { return launch_rows<dtype, dim>(p, rows, stream); });
  if (stats != kOk) return stats;
  if (p.dense) {
    BackwardLaunch a{p, cut_masks(p), nullptr, rows.lse, rows.delta, nullptr, nullptr};
    a.masks.redo = flags.redo;  // written, not read
    return with_shape(p,
                      [&](auto dtype, auto dim) { return launch_dense<dtype, dim, true>(a, true, stream); });
  }
  if (Status const s = clear(flags, stream); s != kOk) return s;
  bool const gather = gathers(p);
  if (gather) {
    Arena gathering = arena;
    Status const s = union_backward(take_union(p, gathering, flags, rows), stream);
    if (s != kOk) return s;
  }
  if (!gather || fits_masks(p)) {
    int const* const condition = gather ? flags.full : nullptr;
    Status const s = dense_backward(take_dense(p, arena, flags.redo, rows, condition), !gather, stream);
    if (s != kOk) return s;
  }
  return portable::attention_backward_if(p, rest, stream, flags.redo);
}

}  // namespace lt2::dsa::sm90
