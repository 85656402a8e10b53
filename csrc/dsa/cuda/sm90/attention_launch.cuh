// What the launches of both passes share.
#pragma once

#include <algorithm>
#include <cstdlib>
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

struct MaskParts {
  Masks masks;
  int64_t floats;  // of workspace
};
inline MaskParts mask_parts(AttentionParams const& p, float* workspace) {
  int64_t const query_tiles = portable::ceil_div(p.tokens, kTile);
  int64_t const key_tiles = portable::ceil_div(p.keys, kTile), tiles = p.batch * query_tiles * key_tiles;
  int64_t const words = tiles * kTile * 4, flags = portable::ceil_div(tiles, 16) * 4;
  auto* const used = reinterpret_cast<uint8_t*>(workspace + words);
  return {{query_tiles, key_tiles, reinterpret_cast<uint4*>(workspace), used,
           reinterpret_cast<int*>(workspace + words + flags)},
          words + flags + 32};
}

struct UnionParts {
  Unions unions;
  int* redo;
  int64_t floats;
};
inline UnionParts union_parts(AttentionParams const& p, float* workspace) {
  int const queries = static_cast<int>(kTile / (p.query_heads / p.key_heads));
  int64_t const tiles = portable::ceil_div(p.tokens, queries), all = p.batch * tiles;
  int64_t const capacity = portable::ceil_div(std::min(p.keys, queries * p.topk), kTile) * kTile;
  int64_t floats = 0;
  auto const take = [&](int64_t count) {
    float* const part = workspace + floats;
    floats += portable::ceil_div(count, 64) * 64;
    return part;
  };
  auto* const bits = reinterpret_cast<uint4*>(take(all * (capacity / kTile) * queries * 4));
  auto* const list = reinterpret_cast<int32_t*>(take(all * capacity));
  auto* const sizes = reinterpret_cast<int*>(take(all));
  auto* const redo = reinterpret_cast<int*>(take(1));
  return {{tiles, capacity, queries, sizes, list, bits}, redo, floats};
}

// Whether the forward pass goes through what queries select together, instead of through all tiles.
inline bool gathers(AttentionParams const& p) {
  constexpr int64_t kSparse = 32;
  int64_t const heads = p.query_heads / p.key_heads;
  if (getenv("LT2_DSA_UNION") != nullptr) return atoi(getenv("LT2_DSA_UNION"));  // XXX
  return heads <= kTileSide && kTile % heads == 0 && p.keys > kSparse * p.topk;
}

Status make_unions(AttentionParams const& p, Unions const& unions, int* redo, void* stream);
Status make_masks(AttentionParams const& p, Masks const& masks, void* stream);

}  // namespace lt2::dsa::sm90
