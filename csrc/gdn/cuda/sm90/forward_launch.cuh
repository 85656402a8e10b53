#pragma once
#include <cstdlib>

#include "common/cuda/launch.cuh"
#include "gdn/cuda/sm90/forward.cuh"
#include "gdn/cuda/sm90/forward_launch.h"

namespace lt2::gdn::sm90 {

inline constexpr int kMultiprocessors = 132;

// How sequences are cut: not at all while whole ones fill the machine, else so that all segments run at once.
inline int64_t segment_span(ForwardParams const& p) {
  constexpr int64_t kLeastTiles = 8;
  int64_t const groups = p.value_dim % (2 * kTileSide) == 0 && p.key_dim <= 128 ? p.value_dim / (2 * kTileSide)
                                                                             : p.value_dim / kTileSide;
  int64_t const wanted = kMultiprocessors / (p.value_heads * groups);  // segments at a time
  int64_t const tiles = (p.batch * p.tokens + kTileSide - 1) / kTileSide;
  if (char const* e = getenv("LT2_SPLIT")) { if (wanted < atoi(e) * p.sequences) return 0; } else if (wanted < 2 * p.sequences) return 0;
  // Of equal sequences each is cut the same way; of others all but one may leave a shorter last segment.
  int64_t const span = p.cu_seqlens == nullptr
                           ? portable::ceil_div(portable::ceil_div(p.tokens, int64_t{kTileSide}), wanted / p.sequences)
                           : portable::ceil_div(tiles, wanted - p.sequences + 1);
  int64_t const longest = p.cu_seqlens == nullptr ? portable::ceil_div(p.tokens, int64_t{kTileSide}) : tiles;
  int64_t const chosen = span < kLeastTiles ? kLeastTiles : span;
  return chosen >= longest ? 0 : chosen * kTileSide;
}

// The parts of the workspace, and its size in floats.
inline Segments segment_layout(ForwardParams const& p, float* workspace, int64_t* floats) {
  Segments s{segment_span(p), nullptr, nullptr, nullptr, nullptr};
  *floats = 0;
  if (s.span == 0) return s;
  auto const take = [&](int64_t count) {
    float* const piece = workspace == nullptr ? nullptr : workspace + *floats;
    *floats += (count + 31) / 32 * 32;
    return piece;
  };
  int64_t const heads = segment_numbers(p, s.span) * p.value_heads;
  int64_t const map_rows = portable::ceil_div(p.key_dim, int64_t{kTileSide}) * kTileSide;
  s.starts = take(heads * p.value_dim * p.key_dim);
  s.ends = take(heads * p.value_dim * p.key_dim);
  s.maps = take(heads * map_rows * p.key_dim);
  s.first_tiles = reinterpret_cast<int*>(take(heads));
  return s;
}

template <class Traits>
Status launch_pass(ForwardParams const& p, Segments const& segments, Dtype dtype, void* stream) {
  ForwardMaps maps;
  struct {
    CUtensorMap* map;
    TokenMajor tensor;
    int tile_tokens;
  } const tensors[] = {{&maps.q, token_major(p.q, p, p.heads, p.key_dim), kChunk},
                       {&maps.k, token_major(p.k, p, p.heads, p.key_dim), kChunk},
                       {&maps.v, token_major(p.v, p, p.value_heads, p.value_dim), kTileSide},
                       {&maps.o, token_major(p.o, p, p.value_heads, p.value_dim), kTileSide}};
  for (auto const& t : tensors) {
    if (Status const status = make_tensor_map(t.map, t.tensor, dtype, t.tile_tokens); status != kOk) return status;
  }
  int const slices =
      p.value_dim / kTileSide + (Traits::kPass == Pass::kMaps ? Traits::kKeyTiles : 0);
  int const slice_groups = slices / Traits::kSlices;
  return launch(forward_kernel<Traits>, segment_numbers(p, segments.span) * p.value_heads * slice_groups,
                Traits::kThreads, sizeof(typename Traits::Shared), stream,
                ForwardLaunch{p, p.o, p.final_state, segments, slice_groups}, maps);
}

// kPairs: two slices in a block, which share the preparation of tiles.
template <Dtype kDtype, int kKeyDim, bool kPairs>
Status launch_passes(ForwardParams const& p, Segments const& segments, void* stream) {
  using T = Element<kDtype>;
  constexpr int kSlices = kPairs ? 2 : 1;
  if (segments.span != 0) {
    int64_t const heads = segment_numbers(p, segments.span) * p.value_heads;
    Status const plan = launch(plan_segments<T>, heads, kPlanWarps * 32, 0, stream, Inputs(p), segments, kKeyDim);
    if (plan != kOk) return plan;
    constexpr int kMapSlices = (kKeyDim + kTileSide - 1) / kTileSide % kSlices == 0 ? kSlices : 1;
    Status const maps =
        launch_pass<ForwardTraits<T, kKeyDim, kMapSlices, Pass::kMaps>>(p, segments, kDtype, stream);
    if (maps != kOk) return maps;
    Status const join = launch(join_segments<kKeyDim>, p.sequences * p.value_heads * (p.value_dim / kJoinRows),
                               kKeyDim, 0, stream, Inputs(p), segments);
    if (join != kOk) return join;
  }
  return launch_pass<ForwardTraits<T, kKeyDim, kSlices>>(p, segments, kDtype, stream);
}

template <Dtype kDtype, int kKeyDim>
Status launch_forward(ForwardParams const& p, float* workspace, void* stream) {
  int64_t floats;
  Segments const segments = segment_layout(p, workspace, &floats);
  if constexpr (kKeyDim <= 128) {
    // One slice in each of twice the blocks is faster while there are multiprocessors to fill.
    int64_t const pairs = p.sequences * p.value_heads * (p.value_dim / (2 * kTileSide));
    if (p.value_dim % (2 * kTileSide) == 0 && (segments.span != 0 || 4 * pairs > 3 * kMultiprocessors)) {
      return launch_passes<kDtype, kKeyDim, true>(p, segments, stream);
    }
  }
  return launch_passes<kDtype, kKeyDim, false>(p, segments, stream);
}

}  // namespace lt2::gdn::sm90
