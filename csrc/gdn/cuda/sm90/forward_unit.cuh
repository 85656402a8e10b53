// What a block of the chunked forward pass works on, and its shared memory.
#pragma once

#include "common/cuda/cluster.cuh"
#include "gdn/cuda/sm90/segments.cuh"

namespace lt2::gdn::sm90 {

// What a launch computes: outputs and final states, or the maps of segments (segments.cuh).
enum class Pass { kOutputs, kMaps };

// Of segments and value heads: whose maps are of all tiles, and of the last ones only; and how many these
// are.
struct MapCounts {
  int whole, cut, cut_tiles;
};

// kCluster: how many blocks of a head share what their helpers prepare. Each has one, and together they have
// kSharedSlices slices; or all are in the last block (kAside), and the others have one slice each.
inline constexpr int kSharedSlices = 3;

template <class T_, int kKeyDim_, int kSlices_, Pass kPass_ = Pass::kOutputs, int kCluster_ = 1,
          bool kAside_ = false>
struct ForwardTraits {
  using T = T_;  // of q, k, v, o
  static constexpr Pass kPass = kPass_;
  static constexpr int kKeyDim = kKeyDim_;  // 64, 96, 128, 192
  static constexpr int kSlices = kSlices_;  // state warpgroups, at most
  static constexpr int kCluster = kCluster_;
  static constexpr bool kShares = kCluster > 1, kAside = kAside_;
  static constexpr int kStateBlocks = kCluster - kAside,
                       kClusterSlices = kAside ? kStateBlocks : kSharedSlices;
  static constexpr int kKeyTiles = (kKeyDim + kTileSide - 1) / kTileSide;
  // Warpgroups that prepare tiles, in turn.
  static constexpr int kHelpers = !kAside && (kShares || (kKeyDim == 192 && kSlices == 2)) ? 1 : 2;
  static constexpr int kTurns = kShares && !kAside ? kCluster : kHelpers;  // how many take tiles in turn
  // Whether k times what is left of a write lies in memory in fp16; there is no room for it beside long keys.
  static constexpr bool kFolds = kKeyDim <= 128 && std::is_same_v<T, __nv_bfloat16>;
  // Tiles of q and k, of what is prepared of them, and of k for what S gains.
  static constexpr int kStages = kShares ? 2 : 3;
  static constexpr int kPrepared = kShares && !kFolds ? 4 : kShares || kHelpers == 2 ? 3 : 2;
  static constexpr int kGains = kShares ? kPrepared : 2;
  static constexpr bool kCuts = !kShares || kSlices == 2;  // whether sequences may be cut into segments
  static_assert(kAside ? kShares && kSlices == 1
                       : !kShares || kCluster == (kSharedSlices + kSlices - 1) / kSlices);
  // Warps of one more warpgroup of a block that shares load q and k, for the states and for each helper.
  static constexpr int kGroups = kAside ? kHelpers + 1 : kSlices + kHelpers + kShares;
  static constexpr int kThreads = kGroups * kWarpgroup;
  // Registers a thread, where the helpers have to give up what the states need.
  static constexpr bool kMovesRegisters = kThreads > 256;
  static constexpr int kLoaderRegisters = kSlices == 1 ? 40 : 24;
  static constexpr int kHelperRegisters = kShares         ? kSlices == 1 ? 208 : 152
                                          : kSlices == 1  ? 144
                                          : kKeyDim == 64 ? 104
                                                          : 88;
  static constexpr int kStateRegisters = kShares && kSlices == 1    ? 256
                                         : kSlices == 1             ? 216
                                         : kKeyDim == 64            ? 152
                                         : kHelpers == 2 || kShares ? 168
                                                                    : 208;

  static constexpr int kChunkBytes = kKeyTiles * kTileBytes;  // of q and k
  static constexpr int kGainBytes = kFolds ? kKeyTiles * kTileBytes : 0;
  struct Shared {
    alignas(1024) char qk[kStages][kTileChunks][kChunkBytes];
    // Of the tile that the helper prepares; in a block of helpers in qk.
    char own_qk[kTileChunks][kShares && !kAside ? kChunkBytes : 512];
    char v[kSlices][2][kTileBytes];                 // then the output of the same tile
    char gains[kGains][kFolds ? kGainBytes : 512];  // of tile i % kGains
    PreparedTile tiles[kPrepared];
    TileScratch scratch[kShares && !kAside ? 1 : 2];  // of tile i % 2
    MapCounts counts;
    // read: of q and k; released: of all that is prepared of a tile, in a cluster by the states of all
    // blocks.
    Barrier loaded[kStages], read[kStages], released[kPrepared], prepared[kPrepared], v_loaded[kSlices][2];
    // In a cluster q and k come by chunks for the states, by tiles for a helper.
    Barrier chunk_loaded[kStages][kTileChunks], chunk_read[kStages][kTileChunks], own_loaded[kHelpers],
        own_read[kHelpers], tail_loaded;
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

struct ForwardMaps {
  CUtensorMap q, k, v, o;
};

struct ForwardLaunch {
  Inputs p;
  Strided o;
  float* final_state;
  Segments segments;
  int units;           // sequences or segments, times value heads
  int pairs, singles;  // blocks of a unit with two slices, and with one
  // Of all units, with helpers aside: slices that the launch before has. If any, this one runs beside it.
  int first_slice;
};

// What a block works on: tiles of a segment, for a value head and some rows of S^T.
struct ForwardUnit {
  int row, begin, tokens;     // from the first tile on; no tiles where tokens is 0
  int head, qk_head, column;  // value head, its query/key head, first value column; from V on they are of M
  int slices;                 // of 64 columns
  int tiles;
  float const* initial;  // or null: zero, or the identity for M
  float* final;          // or null
  int before;            // segment and head before, whose end is the start if it has no map; or -1
  bool initial_v_first, final_v_first;

  __device__ TileTokens tile(int i) const {
    return {row, begin + i * kTileSide, min(tokens - i * kTileSide, kTileSide)};
  }
};

// Whether the maps of whole segments take a block for each slice, `slices` a unit, or one for two, `groups` a
// unit: what ends earlier, beside the ends of the other segments. By all threads of a block.
template <class Traits>
__device__ bool single_maps(ForwardLaunch const& a, MapCounts& counts, int slices, int groups,
                            int value_groups) {
  if (threadIdx.x == 0) counts = {};
  __syncthreads();
  int const tiles = static_cast<int>(a.segments.span / kTileSide);
  int whole = 0, cut = 0, cut_tiles = 0;
  for (int i = threadIdx.x; i < a.units; i += Traits::kThreads) {
    int const first = a.segments.first_tiles[i];
    whole += first == kWhole;
    bool const cuts = first >= 0 && first < tiles;
    cut += cuts;
    cut_tiles += cuts ? tiles - first : 0;
  }
  whole = __reduce_add_sync(0xffffffffu, whole);
  cut = __reduce_add_sync(0xffffffffu, cut);
  cut_tiles = __reduce_add_sync(0xffffffffu, cut_tiles);
  if (threadIdx.x % 32 == 0 && whole + cut > 0) {
    atomicAdd(&counts.whole, whole);
    atomicAdd(&counts.cut, cut);
    atomicAdd(&counts.cut_tiles, cut_tiles);
  }
  __syncthreads();
  float const rest = value_groups * (counts.cut * kStartTime + counts.cut_tiles * kTwoTime);
  float const last = kStartTime + kTwoTime * counts.cut_tiles / max(counts.cut, 1);
  auto const time = [&](int blocks, float tile) {
    float const one = tiles * tile + kStartTime;
    bool const waits = counts.whole * blocks + counts.cut * value_groups > kMultiprocessors;
    float const all = (counts.whole * blocks * one + rest) / kMultiprocessors;
    return fmaxf(one, waits ? all + last : 0.f);  // the others end up to one of them later than on average
  };
  return time(slices, kOneTime) < time(groups, kTwoTime);
}

template <class Traits>
__device__ ForwardUnit forward_unit(ForwardLaunch const& a, MapCounts& counts) {
  Inputs const& p = a.p;
  constexpr int kKeyDim = Traits::kKeyDim, kSlices = Traits::kSlices, kKeyTiles = Traits::kKeyTiles;
  constexpr bool kMaps = Traits::kPass == Pass::kMaps;
  int const value_slices = p.value_dim / kTileSide;
  int unit, first, slices;
  bool of_keys = false, of_whole = false;
  if constexpr (Traits::kAside) {
    int const slice = a.first_slice + blockIdx.x / Traits::kCluster * Traits::kClusterSlices;
    unit = slice / value_slices;
    first = slice % value_slices + cluster_rank();
    slices = 1;
  } else if constexpr (Traits::kShares && kSlices > 1) {
    int const blocks = a.pairs + a.singles, block = blockIdx.x % blocks, rank = block % Traits::kCluster;
    unit = blockIdx.x / blocks;
    first = block / Traits::kCluster * kSharedSlices + rank * kSlices;
    slices = min(kSharedSlices - rank * kSlices, kSlices);
  } else if constexpr (kMaps) {
    auto const groups_of = [](int n, int width) { return (n + width - 1) / width; };
    int const value_groups = groups_of(value_slices, kSlices), all = value_slices + kKeyTiles;
    bool const singles =
        kSlices > 1 &&
        single_maps<Traits>(a, counts, all, value_groups + groups_of(kKeyTiles, kSlices), value_groups);
    // Whole segments first: the others fill what they leave.
    int block = blockIdx.x, width = singles ? 1 : kSlices, of_values = groups_of(value_slices, width);
    int groups = of_values + groups_of(kKeyTiles, width);
    of_whole = block < a.units * groups;
    if (!of_whole) {
      block -= a.units * groups;
      width = kSlices;
      groups = of_values = value_groups;
    }
    unit = block / groups;
    of_keys = block % groups >= of_values;
    first = (block % groups - (of_keys ? of_values : 0)) * width;
    slices = min(width, (of_keys ? kKeyTiles : value_slices) - first);
  } else if (int const block = blockIdx.x - a.units * a.pairs; block < 0) {
    unit = blockIdx.x / a.pairs;
    first = blockIdx.x % a.pairs * kSlices;
    slices = kSlices;
  } else {
    unit = block / a.singles;
    first = a.pairs * kSlices + block % a.singles;
    slices = 1;
  }
  int const column = (of_keys ? p.value_dim : 0) + first * kTileSide;
  int const head = unit % p.value_heads, number = unit / p.value_heads;
  Segment const segment = find_segment(p, a.segments.span, number);
  int64_t const sequence_state = (int64_t{segment.sequence} * p.value_heads + head) * kKeyDim * p.value_dim;
  int64_t const segment_head = int64_t{number} * p.value_heads + head;
  int64_t const segment_state = segment_head * kKeyDim * p.value_dim;
  bool const last = segment.index == segment.count - 1;
  int begin = segment.begin, tokens = max(segment.tokens, 0);
  float const* initial = nullptr;
  float* final = nullptr;
  int before = -1;
  bool initial_v_first = p.state_v_first, final_v_first = true;
  if (segment.index == 0 && p.initial_state != nullptr) initial = p.initial_state + sequence_state;
  if constexpr (!kMaps) {
    if (segment.index > 0) {
      before = static_cast<int>(segment_head) - p.value_heads;
      initial = a.segments.starts + segment_state;
      if (segment.index == 1) {  // after the sequence's first, whose end is a state
        initial = a.segments.ends + int64_t{before} * kKeyDim * p.value_dim;
        before = -1;
      }
      initial_v_first = true;
    }
    if (last && a.final_state != nullptr) final = a.final_state + sequence_state;
    final_v_first = p.state_v_first;
    if (segment.tokens < 0) {
      initial = nullptr;
      final = nullptr;
      before = -1;
    }
  } else {
    bool const there = unit < a.units && segment.tokens >= 0 && !last;
    int const first_tile = there ? a.segments.first_tiles[segment_head] : 0;
    if (!there || (first_tile == kWhole) != of_whole || (of_keys && segment.index == 0)) {
      tokens = 0;
      initial = nullptr;  // columns of M are beyond those of a state
    } else if (of_keys) {
      initial = nullptr;
      final = a.segments.maps + segment_head * Traits::kKeyTiles * kTileSide * kKeyDim;
    } else {
      final = a.segments.ends + segment_state;
      if (first_tile > 0) {
        begin += first_tile * kTileSide;
        tokens -= first_tile * kTileSide;
        initial = nullptr;
      }
    }
  }
  return {segment.row,
          begin,
          tokens,
          head,
          head / (p.value_heads / p.heads),
          column,
          slices,
          (tokens + kTileSide - 1) / kTileSide,
          initial,
          final,
          before,
          initial_v_first,
          final_v_first};
}

}  // namespace lt2::gdn::sm90
