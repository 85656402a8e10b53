#pragma once

#include <cmath>
#include <cstdint>

#include "common/cuda/overlap.cuh"
#include "gdn/cuda/sm90/forward.cuh"
#include "gdn/cuda/sm90/forward_launch.h"

namespace lt2::gdn::sm90 {

// How the work is cut: for each head, blocks of two slices of 64 value columns (which share the preparation
// of tiles) and of one (which run faster while there are multiprocessors to fill), and tiles of a segment; 0:
// sequences are not cut. Blocks of one slice may share the preparation in clusters.
struct Cut {
  int pairs, singles;
  int64_t segment_tiles;
  bool shares = false;
};

// Blocks of a cluster that shares; how many clusters are resident, a block on each multiprocessor, if 6 of a
// GPU's parts have 16 of these and 2 have 18 (a guess, which only the choice depends on); and from which key
// dimension on: with shorter keys the states have less to wait for.
inline constexpr int kSharers = 3, kResidentClusters = 42, kLeastSharedKey = 192;

// The cut of least time by a model: waves of blocks, times tiles of a block, times the time of a tile.
inline Cut choose_cut(ForwardParams const& p) {
  constexpr double kJoin = 1.7, kPasses = 24;
  // Measured microseconds of a tile with one slice, with two and in the maps, and until a block runs at that
  // rate.
  struct Times {
    double one, two, map, start;
  };
  Times const t = p.key_dim == 96 ? Times{2.05, 3, 1.9, 12} : Times{kOneTime, kTwoTime, 2.9, kStartTime};
  double const heads = double(p.sequences) * p.value_heads;
  int const slices = p.value_dim / kTileSide, most = slices / 2;
  // Sequences of unknown lengths count as equal ones.
  double const tiles = double(portable::ceil_div(p.batch * p.tokens, p.sequences * int64_t{kTileSide}));
  auto const waves = [](double blocks) { return std::ceil(blocks / kMultiprocessors); };
  auto const time = [&](int pairs, double units, double length) {
    double const one = length * t.one + t.start, two = length * t.two + t.start;
    int const singles = slices - 2 * pairs;
    if (units * (pairs + singles) <= kMultiprocessors) return pairs > 0 ? two : one;
    return waves(units * pairs) * two + waves(units * singles) * one;
  };
  Cut best{0, slices, 0};
  double least = time(0, heads, tiles);
  auto const consider = [&](Cut const& cut, double total) {
    if (total < least) {
      best = cut;
      least = total;
    }
  };
  if (p.key_dim >= kLeastSharedKey && slices % kSharers == 0) {
    double const rounds = std::ceil(heads * slices / kSharers / kResidentClusters);
    consider({0, slices, 0, true}, rounds * (tiles * kSharedTime + kStartTime));
  }
  for (int pairs = 1; pairs <= most; ++pairs)
    consider({pairs, slices - 2 * pairs, 0}, time(pairs, heads, tiles));
  for (int segments = 2; segments <= 64; segments *= 2) {
    double const length = std::ceil(tiles / segments);
    if (length < 8) break;
    // Half of the maps are taken to be cut short by decay.
    double const map_waves = heads * (slices - most) * (segments - 1) * 2 / kMultiprocessors;
    double const maps = std::fmax(1., map_waves / 2) * (length * t.map + t.start);
    consider({most, slices - 2 * most, static_cast<int64_t>(length)},
             maps + segments * kJoin + kPasses + time(most, heads * segments, length));
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
Status launch_pass(ForwardParams const& p, Cut const& cut, Segments const& segments, Dtype dtype,
                   void* stream) {
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
  int const slices = p.value_dim / kTileSide;
  int64_t const units = segment_numbers(p, segments.span) * p.value_heads;
  int64_t const blocks =
      Traits::kPass == Pass::kMaps
          ? units * (slices + Traits::kKeyTiles + portable::ceil_div(slices, Traits::kSlices))
          : units * (cut.pairs + cut.singles);
  if (blocks > INT32_MAX) return "too many sequences, heads and slices for one launch (2^31 - 1 blocks)";
  return launch_overlapped(
      forward_kernel<Traits>, dim3(static_cast<unsigned>(blocks)), Traits::kThreads,
      sizeof(typename Traits::Shared), Traits::kCluster, stream,
      ForwardLaunch{p, p.o, p.final_state, segments, static_cast<int>(units), cut.pairs, cut.singles}, maps);
}

// kPairs: two slices in a block, which share the preparation of tiles.
template <Dtype kDtype, int kKeyDim, bool kPairs>
Status launch_passes(ForwardParams const& p, Cut const& cut, Segments const& segments, void* stream) {
  using T = Element<kDtype>;
  constexpr int kSlices = kPairs ? 2 : 1;
  if (segments.span != 0) {
    int64_t const heads = segment_numbers(p, segments.span) * p.value_heads;
    Status const plan =
        launch(plan_segments<T>, heads, kPlanWarps * 32, 0, stream, Inputs(p), segments, kKeyDim);
    if (plan != kOk) return plan;
    Status const maps =
        launch_pass<ForwardTraits<T, kKeyDim, kSlices, Pass::kMaps>>(p, cut, segments, kDtype, stream);
    if (maps != kOk) return maps;
    Status const join = launch_overlapped(
        join_segments<kKeyDim>,
        dim3(static_cast<unsigned>(p.sequences * p.value_heads * (p.value_dim / kJoinRows))),
        kJoinThreads<kKeyDim>, 0, 1, stream, Inputs(p), segments);
    if (join != kOk) return join;
  }
  return launch_pass<ForwardTraits<T, kKeyDim, kSlices>>(p, cut, segments, kDtype, stream);
}

template <Dtype kDtype, int kKeyDim>
Status launch_forward(ForwardParams const& p, float* workspace, void* stream) {
  int64_t floats;
  Segments const segments = segment_layout(p, workspace, &floats);
  Cut const cut = choose_cut(p);
  if constexpr (kKeyDim >= kLeastSharedKey) {
    using Traits = ForwardTraits<Element<kDtype>, kKeyDim, 1, Pass::kOutputs, kSharers>;
    if (cut.shares) return launch_pass<Traits>(p, cut, segments, kDtype, stream);
  }
  return cut.pairs > 0 ? launch_passes<kDtype, kKeyDim, true>(p, cut, segments, stream)
                       : launch_passes<kDtype, kKeyDim, false>(p, cut, segments, stream);
}

}  // namespace lt2::gdn::sm90
