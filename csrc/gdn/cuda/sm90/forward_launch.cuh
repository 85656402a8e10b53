#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "common/cuda/overlap.cuh"
#include "gdn/cuda/sm90/forward.cuh"
#include "gdn/cuda/sm90/forward_launch.h"

namespace lt2::gdn::sm90 {

// How the work is cut: for each head, blocks of two slices of 64 value columns (which share the preparation
// of tiles) and of one (which run faster while there are multiprocessors to fill), and tiles of a segment; 0:
// sequences are not cut. Blocks may share the preparation in clusters of three slices: one each, or two and
// one.
struct Cut {
  int pairs, singles;
  int64_t segment_tiles;
  bool shares = false;
};

// Whether blocks of one slice share, or those of two and of one; with other keys the states have less to wait
// for.
inline constexpr bool shares_singles(int64_t key_dim) { return key_dim >= 192; }
inline constexpr bool shares_pairs(int64_t key_dim) { return key_dim == 96; }

template <int kBlocks>
__global__ void fill_multiprocessor() {}

// How many clusters of kBlocks are resident, a block on each multiprocessor; GPUs of one kind differ in this.
template <int kBlocks>
int resident_clusters() {
  constexpr int kDevices = 64, kBytes = 200 << 10;
  static std::atomic<int> known[kDevices];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  if (known[device] > 0) return known[device];
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(kWarpgroup);
  config.dynamicSmemBytes = kBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (allow_shared(fill_multiprocessor<kBlocks>, kBytes) != kOk ||
      cudaOccupancyMaxActiveClusters(&count, fill_multiprocessor<kBlocks>, &config) != cudaSuccess) {
    return 0;
  }
  return known[device] = count;
}

// Blocks of one slice with helpers aside: clusters of kSharedSlices of them, as many as are resident, and
// beside these the other slices, each with a block of helpers. None where these do not fit.
struct AsideLaunches {
  int64_t clusters, slices;
};
inline AsideLaunches aside_launches(ForwardParams const& p) {
  int64_t const slices = p.sequences * p.value_heads * (p.value_dim / kTileSide);
  int64_t const resident = resident_clusters<kSharedSlices + 1>();
  int64_t const clusters = std::min(slices / kSharedSlices, resident),
                rest = slices - clusters * kSharedSlices;
  bool const fits = clusters * (kSharedSlices + 1) + 2 * rest <= kMultiprocessors;
  return fits ? AsideLaunches{clusters, rest} : AsideLaunches{};
}

// The cut of least time by a model: waves of blocks, times tiles of a block, times the time of a tile.
inline Cut choose_cut(ForwardParams const& p) {
  constexpr double kJoin = 1.7, kPasses = 24;
  // Measured microseconds of a tile with one slice, with two, in a cluster and in the maps, and until a block
  // runs at that rate.
  struct Times {
    double one, two, shared, map, start;
  };
  Times const t = p.key_dim == 96 ? Times{2.05, 3, 2.6, 1.9, 12}
                                  : Times{kOneTime, kTwoTime, kSharedTime, 2.9, kStartTime};
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
  int const clusters = slices / kSharedSlices;
  bool const pairs_share = shares_pairs(p.key_dim), divides = slices % kSharedSlices == 0;
  auto const shared_time = [&](double units, double length) {
    double const resident =
        pairs_share ? kMultiprocessors / 2 : std::max(resident_clusters<kSharedSlices>(), 1);
    return std::ceil(units * clusters / resident) * (length * t.shared + t.start);
  };
  Cut best{0, slices, 0};
  double least = time(0, heads, tiles);
  auto const consider = [&](Cut const& cut, double total) {
    if (total < least) {
      best = cut;
      least = total;
    }
  };
  if (shares_singles(p.key_dim) && divides) {
    bool const aside = aside_launches(p).clusters > 0;
    consider({0, slices, 0, true}, aside ? tiles * kAsideTime + t.start : shared_time(heads, tiles));
  }
  if (pairs_share && divides) consider({clusters, clusters, 0, true}, shared_time(heads, tiles));
  for (int pairs = 1; pairs <= most; ++pairs)
    consider({pairs, slices - 2 * pairs, 0}, time(pairs, heads, tiles));
  for (int segments = 2; segments <= 64; segments *= 2) {
    double const length = std::ceil(tiles / segments);
    if (length < 8) break;
    // Half of the maps are taken to be cut short by decay.
    double const map_waves = heads * (slices - most) * (segments - 1) * 2 / kMultiprocessors;
    double const maps = std::fmax(1., map_waves / 2) * (length * t.map + t.start);
    double const before = maps + segments * kJoin + kPasses;
    int64_t const span = static_cast<int64_t>(length);
    consider({most, slices - 2 * most, span}, before + time(most, heads * segments, length));
    if (pairs_share && divides)
      consider({clusters, clusters, span, true}, before + shared_time(heads * segments, length));
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
                   void* stream, AsideLaunches const& aside = {}, bool beside = false) {
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
      : Traits::kAside ? (beside ? aside.slices : aside.clusters) * Traits::kCluster
                       : units * (cut.pairs + cut.singles);
  if (blocks > INT32_MAX) return "too many sequences, heads and slices for one launch (2^31 - 1 blocks)";
  return launch_overlapped(
      forward_kernel<Traits>, dim3(static_cast<unsigned>(blocks)), Traits::kThreads,
      sizeof(typename Traits::Shared), Traits::kCluster, stream,
      ForwardLaunch{p, p.o, p.final_state, segments, static_cast<int>(units), cut.pairs, cut.singles,
                    static_cast<int>(beside ? aside.clusters * kSharedSlices : 0)},
      maps);
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
  if constexpr (kPairs && shares_pairs(kKeyDim)) {
    using Traits = ForwardTraits<T, kKeyDim, kSlices, Pass::kOutputs, 2>;
    if (cut.shares) return launch_pass<Traits>(p, cut, segments, kDtype, stream);
  }
  return launch_pass<ForwardTraits<T, kKeyDim, kSlices>>(p, cut, segments, kDtype, stream);
}

template <Dtype kDtype, int kKeyDim>
Status launch_forward(ForwardParams const& p, float* workspace, void* stream) {
  int64_t floats;
  Segments const segments = segment_layout(p, workspace, &floats);
  Cut const cut = choose_cut(p);
  if constexpr (shares_singles(kKeyDim)) {
    using T = Element<kDtype>;
    if (AsideLaunches const aside = aside_launches(p); cut.shares && aside.clusters > 0) {
      using Clusters = ForwardTraits<T, kKeyDim, 1, Pass::kOutputs, kSharedSlices + 1, true>;
      using Others = ForwardTraits<T, kKeyDim, 1, Pass::kOutputs, 2, true>;
      Status const first = launch_pass<Clusters>(p, cut, segments, kDtype, stream, aside);
      if (first != kOk || aside.slices == 0) return first;
      return launch_pass<Others>(p, cut, segments, kDtype, stream, aside, true);
    }
    if (cut.shares)
      return launch_pass<ForwardTraits<T, kKeyDim, 1, Pass::kOutputs, kSharedSlices>>(p, cut, segments,
                                                                                      kDtype, stream);
  }
  return cut.pairs > 0 ? launch_passes<kDtype, kKeyDim, true>(p, cut, segments, stream)
                       : launch_passes<kDtype, kKeyDim, false>(p, cut, segments, stream);
}

}  // namespace lt2::gdn::sm90
