// What the launches of both passes share.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/cuda/launch.cuh"
#include "common/cuda/sm90/tma.cuh"
#include "dsa/cuda/portable/attention_launch.h"
#include "dsa/cuda/sm90/union.cuh"

namespace lt2::dsa::sm90 {

using namespace cuda::sm90;

inline TokenMajor queries(AttentionParams const& p, Heads const& x, int64_t dim) {
  return {x.data, x.batch, x.token, x.head, p.batch, p.tokens, p.query_heads, dim};
}
inline TokenMajor keys(AttentionParams const& p, Heads const& x, int64_t dim) {
  return {x.data, x.batch, x.token, x.head, p.batch, p.keys, p.key_heads, dim};
}

struct MapOf {
  CUtensorMap* map;
  TokenMajor tensor;
  int tile_tokens, tile_heads = 1;
};
inline Status make_maps(Dtype dtype, std::initializer_list<MapOf> maps) {
  for (MapOf const& m : maps) {
    if (Status const s = make_tensor_map(m.map, m.tensor, dtype, m.tile_tokens, m.tile_heads); s != kOk)
      return s;
  }
  return kOk;
}

// f(dtype, dim) for what the kernels take.
template <class F>
Status with_shape(AttentionParams const& p, F const& f) {
  auto const by_dim = [&](auto dtype) {
    return p.dim == 64 ? f(dtype, std::integral_constant<int, 64>{})
                       : f(dtype, std::integral_constant<int, 128>{});
  };
  return p.dtype == Dtype::kFloat16 ? by_dim(std::integral_constant<Dtype, Dtype::kFloat16>{})
                                    : by_dim(std::integral_constant<Dtype, Dtype::kBFloat16>{});
}

// Takes one part of a workspace after the other.
struct Arena {
  float* workspace;
  int64_t floats = 0;

  template <class T>
  T* take(int64_t count) {
    float* const part = workspace + floats;
    floats += portable::ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 64;
    return reinterpret_cast<T*>(part);
  }
};

// Zero at first: whether to gather for each query alone, and whether neighbours select too many keys
// together.
struct Flags {
  int *redo, *full;
};
inline Flags take_flags(Arena& arena) {
  int* const flags = arena.take<int>(2);
  return {flags, flags + 1};
}
Status clear(Flags const& flags, void* stream);

// Without bits.
inline Masks cut_masks(AttentionParams const& p) {
  return {portable::ceil_div(p.tokens, kTile),
          portable::ceil_div(p.keys, kTile),
          nullptr,
          nullptr,
          nullptr,
          nullptr};
}
inline Masks take_masks(AttentionParams const& p, Arena& arena, int* redo, int const* condition) {
  Masks masks = cut_masks(p);
  int64_t const tiles = p.batch * masks.query_tiles * masks.key_tiles;
  masks.bits = arena.take<uint4>(tiles * kTile);
  masks.used = arena.take<uint8_t>(tiles);
  masks.redo = redo;
  masks.condition = condition;
  return masks;
}
Status make_masks(AttentionParams const& p, Masks const& masks, void* stream);

inline Unions take_unions(AttentionParams const& p, Arena& arena) {
  int const queries = static_cast<int>(kTile / (p.query_heads / p.key_heads));
  int64_t const tiles = portable::ceil_div(p.tokens, queries), all = p.batch * tiles;
  int64_t const capacity = portable::ceil_div(std::min(p.keys, queries * p.topk), kTile) * kTile;
  Unions unions{tiles, capacity, queries, arena.take<int>(all), arena.take<int32_t>(all * capacity)};
  unions.bits = arena.take<uint4>(all * (capacity / kTile) * queries);
  return unions;
}
Status make_unions(AttentionParams const& p, Unions const& unions, int* redo, void* stream);

// Whether there are too few queries for tiles: then each gathers alone, by warps that share its selection.
inline bool is_step(AttentionParams const& p) { return p.tokens < kTileSide; }
Status attention_step(AttentionForwardParams const& p, void* stream);

// Whether to go through what queries select together, instead of through all tiles.
inline bool gathers(AttentionParams const& p) {
  constexpr int64_t kSparse = 32;
  int64_t const heads = p.query_heads / p.key_heads;
  return heads <= kTileSide && kTile % heads == 0 && p.keys > kSparse * p.topk;
}

// Whether to go through all tiles: a gather for each query alone reads topk keys for each query and key head,
// a tile all keys for 128 queries of a query head. The bits of a query are no larger than two of its
// selections.
inline bool fits_masks(AttentionParams const& p) {
  constexpr int64_t kSparsest = 64;
  return p.keys <= kSparsest * p.topk;
}

}  // namespace lt2::dsa::sm90
