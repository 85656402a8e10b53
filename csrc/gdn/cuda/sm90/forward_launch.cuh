#pragma once

#include <cmath>

#include "common/cuda/launch.cuh"
#include "gdn/cuda/sm90/forward.cuh"
#include "gdn/cuda/sm90/forward_launch.h"

namespace lt2::gdn::sm90 {

// How the work is cut: slices of 64 value columns in a block (two share the preparation of tiles, one each
// runs faster while there are multiprocessors to fill), and tiles of a segment; 0: sequences are not cut.
struct Cut {
  int slices;
  int64_t segment_tiles;
};

// The cut of least time by a model: waves of blocks, times tiles of a block, times the measured microseconds
// of a tile.
inline Cut choose_cut(ForwardParams const& p) {
  constexpr double kMultiprocessors = 132,
                   kStart = 8;  // blocks at a time; microseconds until a block runs at its rate
  constexpr double kOne = 2.4, kTwo = 3.5, kMap = 2.9, kJoin = 1.7;
  bool const pairs = p.value_dim % (2 * kTileSide) == 0 && p.key_dim <= 128;
  double const slices = double(p.sequences) * p.value_heads * (p.value_dim / kTileSide);
  // Sequences of unknown lengths count as equal ones.
  double const tiles = double(portable::ceil_div(p.batch * p.tokens, p.sequences * int64_t{kTileSide}));
  auto const waves = [](double blocks) { return std::ceil(blocks / kMultiprocessors); };
  Cut best{1, 0};
  double least = waves(slices) * (tiles * kOne + kStart);
  if (pairs && waves(slices / 2) * (tiles * kTwo + kStart) < least) {
    best.slices = 2;
    least = waves(slices / 2) * (tiles * kTwo + kStart);
  }
  int const width = pairs ? 2 : 1;
  for (int segments = 2; segments <= 64; segments *= 2) {
    double const length = std::ceil(tiles / segments);
    if (length < 8) break;
    // Half of the maps are taken to be cut short by decay.
    double const map_waves = slices / width * (segments - 1) * 2 / kMultiprocessors;
    double const outputs = waves(slices / width * segments) * (length * (pairs ? kTwo : kOne) + kStart);
    double const time =
        std::fmax(1., map_waves / 2) * (length * kMap + kStart) + segments * kJoin + 3 * kStart + outputs;
    if (time < least) {
      least = time;
      best = {width, static_cast<int64_t>(length)};
    }
  }
  return best;
}

// The parts of the workspace, and its size in floats.
inline Segments segment_layout(ForwardParams const& p, float* workspace, int64_t* floats) {
  Segments s{choose_cut(p).segment_tiles * kTileSide, nullptr, nullptr, nullptr, nullptr};
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
    if (Status const status = make_tensor_map(t.map, t.tensor, dtype, t.tile_tokens); status != kOk)
      return status;
  }
  int const slices = p.value_dim / kTileSide + (Traits::kPass == Pass::kMaps ? Traits::kKeyTiles : 0);
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
    Status const plan =
        launch(plan_segments<T>, heads, kPlanWarps * 32, 0, stream, Inputs(p), segments, kKeyDim);
    if (plan != kOk) return plan;
    constexpr int kMapSlices = (kKeyDim + kTileSide - 1) / kTileSide % kSlices == 0 ? kSlices : 1;
    Status const maps =
        launch_pass<ForwardTraits<T, kKeyDim, kMapSlices, Pass::kMaps>>(p, segments, kDtype, stream);
    if (maps != kOk) return maps;
    Status const join =
        launch(join_segments<kKeyDim>, p.sequences * p.value_heads * (p.value_dim / kJoinRows),
               kKeyDim * kJoinParts, 0, stream, Inputs(p), segments);
    if (join != kOk) return join;
  }
  return launch_pass<ForwardTraits<T, kKeyDim, kSlices>>(p, segments, kDtype, stream);
}

template <Dtype kDtype, int kKeyDim>
Status launch_forward(ForwardParams const& p, float* workspace, void* stream) {
  int64_t floats;
  Segments const segments = segment_layout(p, workspace, &floats);
  if constexpr (kKeyDim <= 128) {
    if (choose_cut(p).slices == 2) return launch_passes<kDtype, kKeyDim, true>(p, segments, stream);
  }
  return launch_passes<kDtype, kKeyDim, false>(p, segments, stream);
}

}  // namespace lt2::gdn::sm90
