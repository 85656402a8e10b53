#pragma once

#include "dsa/cuda/sm90/attention_launch.cuh"
#include "dsa/cuda/sm90/loss_launch.h"

namespace lt2::dsa::sm90 {

// Of `tiles` query tiles.
template <Dtype kDtype, bool kSlopes>
Status launch_pairs(PairLaunch const& a, int64_t tiles, void* stream) {
  LossParams const& p = a.p;
  PairMaps maps;
  Status const made = make_maps(kDtype, {{&maps.q, queries(p, p.q, p.dim), kTile},
                                         {&maps.k, keys(p, p.k, p.dim), kTile},
                                         {&maps.index_q, index_queries(p, p.index_q), kTile},
                                         {&maps.index_k, index_keys(p), kTile}});
  if (made != kOk) return made;
  return with_dims(p, [&](auto dim, auto index_dim) {
    using Traits = PairTraits<Element<kDtype>, dim, index_dim, kSlopes>;
    return launch(pair_kernel<Traits>, tiles * a.spans, Traits::kThreads, sizeof(typename Traits::Shared),
                  stream, a, maps);
  });
}

template <Dtype kDtype>
Status launch_sums(PairLaunch const& a, void* stream) {
  return launch_pairs<kDtype, false>(a, a.p.batch * a.masks.query_tiles, stream);
}

template <Dtype kDtype, int kDim>
Status launch_slopes(SlopeLaunch const& a, SlopeMaps const& maps, void* stream) {
  using Queries = SlopeTraits<Element<kDtype>, kDim, false>;
  using Keys = SlopeTraits<Element<kDtype>, kDim, true>;
  Status const of_queries = launch(slope_kernel<Queries>, (a.end - a.first) * a.groups, Queries::kThreads,
                                   sizeof(typename Queries::Shared), stream, a, maps);
  if (of_queries != kOk) return of_queries;
  int64_t const tiles = a.masks.query_tiles, rows = (a.end - 1) / tiles - a.first / tiles + 1;
  return launch(slope_kernel<Keys>, rows * a.masks.key_tiles * a.groups, Keys::kThreads,
                sizeof(typename Keys::Shared), stream, a, maps);
}

// Slopes of `band` query tiles at a time, and what follows from them.
template <Dtype kDtype>
Status launch_gradients(PairLaunch const& pairs_of_all, SlopeLaunch const& slopes_of_all, int64_t band,
                        void* stream) {
  PairLaunch pairs = pairs_of_all;
  SlopeLaunch slopes = slopes_of_all;
  LossBackwardParams const& p = slopes.p;
  SlopeMaps maps;
  Status const made = make_maps(kDtype, {{&maps.index_q, index_queries(p, p.index_q), kTile},
                                         {&maps.index_k, index_keys(p), kTile},
                                         {&maps.dq, index_queries(p, p.dq), kTileSide}});
  if (made != kOk) return made;
  auto const with_dim = [&](auto const& f) {
    return p.index_dim == 64 ? f(std::integral_constant<int, 64>{}) : f(std::integral_constant<int, 128>{});
  };
  int64_t const tiles = p.batch * pairs.masks.query_tiles;
  for (int64_t first = 0; first < tiles; first += band) {
    pairs.first = slopes.first = first;
    slopes.end = std::min(first + band, tiles);
    Status const made_slopes = launch_pairs<kDtype, true>(pairs, slopes.end - first, stream);
    if (made_slopes != kOk) return made_slopes;
    Status const applied =
        with_dim([&](auto dim) { return launch_slopes<kDtype, dim>(slopes, maps, stream); });
    if (applied != kOk) return applied;
  }
  return with_dim([&](auto dim) {
    int64_t const pieces = p.batch * p.keys * dim / portable::kElements;
    return launch(add_groups<Element<kDtype>, dim>, portable::ceil_div(pieces, portable::kThreads),
                  portable::kThreads, 0, stream, slopes);
  });
}

}  // namespace lt2::dsa::sm90
