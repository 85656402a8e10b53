// The chunked forward pass: one block per segment of a sequence, value head and kSlices x 64 value columns.
// Helper warpgroups load k and q, and prepare tiles of two chunks (tile.cuh) ahead of time; each state
// warpgroup keeps S^T [64 x K] of its columns in the registers that wgmma accumulates in, and chains the
// products of a chunk through them:
//   W = V - e^G K S;  U = T~ W;  O = scale e^G Q S + P U;  S <- e^(G_last) S + (e^(G_last - G) K)^T U
// All of it is transposed (value columns are the rows of every product), so that S, W and U are operands from
// registers. Operands have the type of the inputs, which bounds their range, but for P U: it cancels where
// keys repeat, so it is in fp16, U times a power of two. So does what S gains: with bf16 inputs and kFolds it
// is a product of the same U with keys in fp16, which helpers have made, and S is kept times that power of
// two; without kFolds it is a pair of bf16 that add up.
#pragma once

#include "gdn/cuda/sm90/segments.cuh"

namespace lt2::gdn::sm90 {

// What a launch computes: outputs and final states, or the maps of segments (segments.cuh).
enum class Pass { kOutputs, kMaps };

// Of segments and value heads: whose maps are of all tiles, and of the last ones only; and how many these
// are.
struct MapCounts {
  int whole, cut, cut_tiles;
};

template <class T_, int kKeyDim_, int kSlices_, Pass kPass_ = Pass::kOutputs>
struct ForwardTraits {
  using T = T_;  // of q, k, v, o
  static constexpr Pass kPass = kPass_;
  static constexpr int kKeyDim = kKeyDim_;  // 64, 96, 128, 192
  static constexpr int kSlices = kSlices_;  // state warpgroups, at most
  static constexpr int kKeyTiles = (kKeyDim + kTileSide - 1) / kTileSide;
  static constexpr int kHelpers =
      kKeyDim == 192 && kSlices == 2 ? 1 : 2;  // warpgroups that prepare tiles, in turn
  // Tiles of q and k, and of what is prepared of them.
  static constexpr int kStages = 3, kPrepared = kHelpers == 2 ? 3 : 2;
  // Whether k times what is left of a write lies in memory in fp16; there is no room for it beside long keys.
  static constexpr bool kFolds = kKeyDim <= 128 && std::is_same_v<T, __nv_bfloat16>;
  static constexpr int kThreads = (kSlices + kHelpers) * kWarpgroup;
  // Registers a thread, where the helpers have to give up what the states need.
  static constexpr bool kMovesRegisters = kThreads > 256;
  static constexpr int kHelperRegisters = kSlices == 1 ? 144 : kKeyDim == 64 ? 104 : 88;
  static constexpr int kStateRegisters = kSlices == 1 ? 216 : kKeyDim == 64 ? 152 : kHelpers == 2 ? 168 : 208;

  struct Shared {
    alignas(1024) char qk[kStages][kKeyTiles * kQkBytes];
    char v[kSlices][2][kTileBytes];  // then the output of the same tile
    char inverse[kPrepared][kTileBytes];
    char scores[(kPrepared + 1) / 2][kTileBytes];        // of two tiles
    char gains[2][kFolds ? kKeyTiles * kTileBytes : 1];  // of tile i % 2
    TileScratch scratch[2];                              // of tile i % 2
    TileScalars scalars[kPrepared];
    MapCounts counts;
    // read: of q and k; released: of all that is prepared of a tile.
    Barrier loaded[kStages], read[kStages], released[kStages], prepared[kPrepared], v_loaded[kSlices][2];
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
};

// What a block works on: tiles of a segment, for a value head and some rows of S^T.
struct ForwardUnit {
  int row, begin, tokens;     // from the first tile on; no tiles where tokens is 0
  int head, qk_head, column;  // value head, its query/key head, first value column; from V on they are of M
  int slices;                 // of 64 columns
  int tiles;
  float const* initial;  // or null: zero, or the identity for M
  float* final;          // or null
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
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&counts.whole, whole);
    atomicAdd(&counts.cut, cut);
    atomicAdd(&counts.cut_tiles, cut_tiles);
  }
  __syncthreads();
  float const rest = value_groups * (counts.cut * kStartTime + counts.cut_tiles * kTwoTime);
  auto const time = [&](int blocks, float tile) {
    float const one = tiles * tile + kStartTime;
    return fmaxf(one, (counts.whole * blocks * one + rest) / kMultiprocessors);
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
  if constexpr (kMaps) {
    auto const groups_of = [](int n, int width) { return (n + width - 1) / width; };
    int const value_groups = groups_of(value_slices, kSlices), all = value_slices + kKeyTiles;
    bool const singles =
        kSlices > 1 &&
        single_maps<Traits>(a, counts, all, value_groups + groups_of(kKeyTiles, kSlices), value_groups);
    // Whole segments first: the others fill what they leave.
    int block = blockIdx.x;
    of_whole = block < a.units * all;
    if (!of_whole) block -= a.units * all;
    int const width = of_whole && singles ? 1 : kSlices, of_values = groups_of(value_slices, width);
    int const groups = of_values + (of_whole ? groups_of(kKeyTiles, width) : 0);
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
  bool initial_v_first = p.state_v_first, final_v_first = true;
  if (segment.index == 0 && p.initial_state != nullptr) initial = p.initial_state + sequence_state;
  if constexpr (!kMaps) {
    if (segment.index > 0) {
      initial = a.segments.starts + segment_state;
      initial_v_first = true;
    }
    if (last && a.final_state != nullptr) final = a.final_state + sequence_state;
    final_v_first = p.state_v_first;
    if (segment.tokens < 0) final = nullptr;
  } else {
    bool const there = unit < a.units && segment.tokens >= 0 && !last;
    int const first_tile = there ? a.segments.first_tiles[segment_head] : 0;
    if (!there || (first_tile == kWhole) != of_whole || (of_keys && segment.index == 0)) {
      tokens = 0;
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
          initial_v_first,
          final_v_first};
}

// A helper warpgroup: tiles `helper`, + kHelpers, ...
template <class Traits>
__device__ void prepare_tiles(typename Traits::Shared& shared, ForwardLaunch const& a,
                              ForwardMaps const& maps, ForwardUnit const& unit, int helper, int thread) {
  using T = typename Traits::T;
  constexpr int kTiles = Traits::kKeyTiles, kStages = Traits::kStages, kPrepared = Traits::kPrepared,
                kHelpers = Traits::kHelpers;
  constexpr bool kOutputs = Traits::kPass == Pass::kOutputs, kFolds = Traits::kFolds;
  auto const load_qk = [&](int i) {
    TileTokens const t = unit.tile(i);
    Barrier& loaded = shared.loaded[i % kStages];
    loaded.arrive_expecting(kTiles * (kOutputs ? kQkBytes : kTileBytes));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      char* to = shared.qk[i % kStages] + tile * kQkBytes;
#pragma unroll 1
      for (int c = 0; c < kTileChunks; ++c) {
        load_tile(to, maps.k, tile * kTileSide, unit.qk_head, t.begin + c * kChunk, t.row, loaded);
        if constexpr (kOutputs) {
          load_tile(to + kHalfTileBytes, maps.q, tile * kTileSide, unit.qk_head, t.begin + c * kChunk, t.row,
                    loaded);
        }
        to += kTileBytes;
      }
    }
  };
  auto const wait_read = [&](int i) { shared.read[i % kStages].wait((i / kStages) & 1); };
  auto const wait_released = [&](int i) {
    if (i >= 0) shared.released[i % kStages].wait((i / kStages) & 1);
  };
  if (helper >= unit.tiles) return;
  bool const has_k = thread < kTileSide;
  auto const request = [&](int i) {
    TileScratch& scratch = shared.scratch[i % 2];
    request_gate(has_k ? a.p.beta : a.p.g, unit.tile(i), unit.head, thread % kTileSide,
                 has_k ? scratch.beta : scratch.g);
    if constexpr (kFolds) {  // and its row of q or k, which the copy engine then finds in the L2 cache
      int const token = thread % kTileSide;
      TileTokens const t = unit.tile(i);
      if (token < t.count && (has_k || kOutputs)) {
        auto const* const row = reinterpret_cast<char const*>(
            portable::token_row<T const>(has_k ? a.p.k : a.p.q, t.row, t.begin + token, unit.qk_head));
#pragma unroll
        for (int line = 0; line < kTiles; ++line)
          asm volatile("prefetch.global.L2 [%0];" ::"l"(row + line * 128));
      }
    }
  };
  request(helper);
  if (thread == 0) {
    load_qk(helper);
    if (kHelpers == 1 && unit.tiles > 1) load_qk(1);
  }
  for (int i = helper; i < unit.tiles; i += kHelpers) {
    int const stage = i % kStages, prepared = i % kPrepared, next = i + kHelpers;
    // What follows from the thread's number is cheaper to compute again than to keep from tile to tile in the
    // few registers there are.
    asm volatile("" : "+r"(thread));
    wait_released(i - kPrepared);
    shared.loaded[stage].wait((i / kStages) & 1);
    prepare_tile<T, Traits::kKeyDim, kOutputs, kFolds>(
        a.p, unit.tile(i).count, shared.qk[stage], shared.scalars[prepared], shared.scratch[i % 2],
        shared.inverse[prepared], shared.scores[prepared / 2], prepared % 2, shared.gains[i % 2],
        1 + kTileBarriers * helper, thread, unit.head,
        [&] {
          if (next < unit.tiles) request(next);
        },
        [&] { wait_released(i - 2); });
    shared.prepared[prepared].arrive();
    static_assert(kStages == 3);
    if (i + 2 < unit.tiles) {
      if (i > 0) wait_read(i - 1);
      if (thread == 0) load_qk(i + 2);
    }
  }
}

// Element (lane's row of the slice, column pair) of a state in global memory.
template <int kKeyDim, class F>
__device__ void for_state_elements(int column, int thread, F const& f) {
  int const row = column + thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
#pragma unroll
  for (int n = 0; n < kKeyDim / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) f(4 * n + 2 * half, row + 8 * half, 8 * n + 2 * t);
  }
}

template <int kKeyDim>
__device__ void load_state(float (&s)[kKeyDim / 2], float const* state, bool v_first, int value_dim,
                           int column, int thread) {
  for_state_elements<kKeyDim>(column, thread, [&](int i, int v, int k) {
    if (v_first) {
      float2 const x = *reinterpret_cast<float2 const*>(state + int64_t{v} * kKeyDim + k);
      s[i] = x.x;
      s[i + 1] = x.y;
    } else {
      s[i] = state[int64_t{k} * value_dim + v];
      s[i + 1] = state[int64_t{k + 1} * value_dim + v];
    }
  });
}

template <int kKeyDim>
__device__ void store_state(float const (&s)[kKeyDim / 2], float* state, bool v_first, int value_dim,
                            int column, int thread) {
  for_state_elements<kKeyDim>(column, thread, [&](int i, int v, int k) {
    if (v_first) {
      *reinterpret_cast<float2*>(state + int64_t{v} * kKeyDim + k) = float2{s[i], s[i + 1]};
    } else {
      state[int64_t{k} * value_dim + v] = s[i];
      state[int64_t{k + 1} * value_dim + v] = s[i + 1];
    }
  });
}

// Byte offset, in a tile [tokens x 64 values], of the matrix rows that lane `lane` names for the fragments of
// tokens 8 n .. 8 n + 15 and the warp's 16 values.
__device__ __forceinline__ int value_offset(int token, int warp, int lane) {
  return tile_offset(token + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);
}

// Without a branch, so that it can stand among products.
__device__ __forceinline__ void store_matrices_transposed_if(bool puts, uint32_t address, uint32_t r0,
                                                             uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0;"
      "@p stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};}" ::"r"(address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3), "r"(static_cast<uint32_t>(puts))
      : "memory");
}

// The first `count` rows of a tile, where a tensor map would also write the sequence that follows.
template <class T>
__device__ void store_rows(char const* tile, Strided const& o, TileTokens const& t, int head, int column,
                           int thread) {
#pragma unroll 1
  for (int i = thread; i < t.count * 8; i += kWarpgroup) {
    T* const row = portable::token_row<T>(o, t.row, t.begin + i / 8, head);
    *reinterpret_cast<uint4*>(row + column + i % 8 * 8) =
        *reinterpret_cast<uint4 const*>(tile + tile_offset(i / 8, i % 8));
  }
}

// Values and k_in of a chunk whose first token in the tile is `first`, as fragments.
struct ChunkValues {
  uint32_t v[kChunk / 4];
  float2 k_in[kChunk / 8];
};

__device__ __forceinline__ void load_values(ChunkValues& x, char const* v_tile, float const* k_in, int first,
                                            int warp, int lane) {
  uint32_t const address = shared_address(v_tile);
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    uint32_t v[4];
    load_matrices_transposed(v, address + value_offset(first + 8 * n, warp, lane));
#pragma unroll
    for (int i = 0; i < 4; ++i) x.v[2 * n + i] = v[i];
  }
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n)
    x.k_in[n] = *reinterpret_cast<float2 const*>(k_in + first + 8 * n + 2 * (lane % 4));
}

// W = V - k_in (K S) of that chunk; tokens from `count` on write nothing.
template <class T>
__device__ __forceinline__ void residuals(uint32_t (&w)[kChunk / 4], float const* ks,
                                          ChunkValues const& values, int first, int count, int lane) {
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    float2 const g = values.k_in[n];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 const x = unpack<T>(values.v[2 * n + half]);
      int const i = 4 * n + 2 * half;
      w[2 * n + half] = pack<T>(x.x - g.x * ks[i], x.y - g.y * ks[i + 1]);
    }
  }
  if (count < first + kChunk) {
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      int const token = first + 8 * n + 2 * (lane % 4);
      uint32_t const mask = (token < count ? 0xffffu : 0u) | (token + 1 < count ? 0xffff0000u : 0u);
      w[2 * n] &= mask;
      w[2 * n + 1] &= mask;
    }
  }
}

// x[.., token] *= factor[token].
__device__ __forceinline__ void scale_tokens(float* x, float const* factor, int lane) {
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    float2 const f = *reinterpret_cast<float2 const*>(factor + 8 * n + 2 * (lane % 4));
    x[4 * n] *= f.x;
    x[4 * n + 1] *= f.y;
    x[4 * n + 2] *= f.x;
    x[4 * n + 3] *= f.y;
  }
}

template <class T, int kCount>
__device__ __forceinline__ void pack_all(uint32_t (&a)[kCount / 2], float const (&x)[kCount],
                                         float factor = 1.f) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) a[i] = pack<T>(x[2 * i] * factor, x[2 * i + 1] * factor);
}

// The biased exponent of the largest of a warp's |x|.
template <int kCount>
__device__ __forceinline__ uint32_t warp_exponent(float const (&x)[kCount]) {
  float largest[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest[i % 4] = fmaxf(largest[i % 4], fabsf(x[i]));
  float const most = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
  return __reduce_max_sync(0xffffffffu, __float_as_uint(most)) >> 23;
}

// The power of two that brings the largest of a warp's |x| to 128..256, but at most 2^96.
template <int kCount>
__device__ __forceinline__ float range_factor(float const (&x)[kCount]) {
  return __uint_as_float((254 + 7 - max(warp_exponent(x), 254u + 7 - 127 - 96)) << 23);
}

__device__ __forceinline__ float power_of_two(int biased) { return __uint_as_float(biased << 23); }

inline constexpr int kScaleSlack = 4;  // how far below the most a scale may be

// The largest scale of S (biased exponent) at which a warp's |U| = |T~ W| is at most 2^15 where S is
// kGainUnit times as large: from the packed bf16 W and the largest |T~|. Without a finite W there is nothing
// to fit.
__device__ __forceinline__ int most_scale(uint32_t const (&w)[kChunk / 4], float most, int otherwise) {
  uint32_t largest[2] = {w[0], w[1]};
#pragma unroll
  for (int i = 2; i < kChunk / 4; ++i)
    asm("max.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(largest[i % 2]) : "r"(w[i]));
  asm("max.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(largest[0]) : "r"(largest[1]));
  uint32_t bits = largest[0] & 0x7fff7fffu;
  bits = max(bits, bits << 16);
  int const exponent = __reduce_max_sync(0xffffffffu, bits < 0x7f800000u ? bits : 0) >> 23;
  // 32 products, each less than 2^(exponent + 1) times 2^(that of T~ + 1).
  int const fits =
      15 + kGainExponent - 7 + 3 * 127 - exponent - static_cast<int>(__float_as_uint(most) >> 23);
  return exponent == 0 ? otherwise : min(max(fits, 20), 240);
}

// A state warpgroup.
template <class Traits>
__device__ void scan_tiles(typename Traits::Shared& shared, ForwardLaunch const& a, ForwardMaps const& maps,
                           ForwardUnit const& unit, int slice, int thread) {
  using T = typename Traits::T;
  constexpr int kKeyDim = Traits::kKeyDim, kKeySteps = kKeyDim / 16, kStages = Traits::kStages;
  constexpr int kPrepared = Traits::kPrepared;
  constexpr int kChunkSteps = kChunk / 16;
  int const warp = thread / 32, lane = thread % 32;
  int const barrier = 1 + kTileBarriers * Traits::kHelpers + slice;
  int const column = unit.column + slice * kTileSide;
  constexpr bool kOutputs = Traits::kPass == Pass::kOutputs;
  constexpr bool kFolds = Traits::kFolds;
  // A column past the values is one of the identity, and has no values: its tiles of v stay zero.
  bool const of_keys = !kOutputs && column >= a.p.value_dim;
  auto const load_v = [&](int i) {
    Barrier& loaded = shared.v_loaded[slice][i % 2];
    TileTokens const t = unit.tile(i);
    loaded.arrive_expecting(kTileBytes);
    load_tile(shared.v[slice][i % 2], maps.v, column, unit.head, t.begin, t.row, loaded);
  };
  if (of_keys) {
    for (int i = thread; i < 2 * kTileBytes / 16; i += kWarpgroup) {
      reinterpret_cast<uint4*>(shared.v[slice])[i] = uint4{};
    }
    named_barrier(barrier, kWarpgroup);
  } else if (thread == 0) {
    if (unit.tiles > 0) load_v(0);
    if (unit.tiles > 1) load_v(1);
  }

  float s[kKeyDim / 2];
  if (unit.initial != nullptr) {
    load_state<kKeyDim>(s, unit.initial, unit.initial_v_first, a.p.value_dim, column, thread);
  } else {
    int const diagonal = column - a.p.value_dim;
    for_state_elements<kKeyDim>(diagonal, thread, [&](int i, int v, int k) {
      s[i] = of_keys && v == k ? 1.f : 0.f;
      s[i + 1] = of_keys && v == k + 1 ? 1.f : 0.f;
    });
  }

  // S is kept times a power of two, by which U (times kGainUnit) fits into fp16; this is its biased exponent.
  int scale = 127;
  uint32_t packed[kChunk / 4];  // of the output of a chunk, which goes where its values were
  auto const put_output = [&](int i, int part, bool puts) {
    uint32_t const tile = shared_address(shared.v[slice][i % 2]);
#pragma unroll
    for (int n = 0; n < kChunk / 8; n += 2) {
      store_matrices_transposed_if(puts, tile + value_offset(part * kChunk + 8 * n, warp, lane),
                                   packed[2 * n], packed[2 * n + 1], packed[2 * n + 2], packed[2 * n + 3]);
    }
  };
  auto const send_output = [&](int i) {  // a tile's, after its last chunk
    char* const tile = shared.v[slice][i % 2];
    fence_async_shared();
    named_barrier(barrier, kWarpgroup);
    TileTokens const t = unit.tile(i);
    if (t.count < kTileSide) [[unlikely]] {
      store_rows<T>(tile, a.o, t, unit.head, column, thread);
    } else if (thread == 0) {
      store_tile(maps.o, tile, column, unit.head, t.begin, t.row);
    }
  };
  uint32_t fragments[kKeyDim / 4];  // of S^T
  pack_all<T>(fragments, s);

  auto const wait_prepared = [&](int i) { shared.prepared[i % kPrepared].wait((i / kPrepared) & 1); };
  auto const release = [&](Barrier* barriers, int i) {
    __syncwarp();  // the reads of all lanes
    if (lane == 0) barriers[i % kStages].arrive();
  };
  auto const chunk = [&](int i, int part) {
    int const first = part * kChunk, stage = i % kStages, prepared = i % kPrepared;
    uint64_t const rows = part * (kChunk * 128 >> 4);    // of descriptors: the chunk's rows of a tile
    uint64_t const block = rows + k_step(2) * part;      // and its diagonal block
    uint64_t const low = rows + k_step(2) * (1 - part);  // and the other block there
    TileScalars const& scalars = shared.scalars[prepared];
    if (!kFolds && part == 0) wait_prepared(i);
    constexpr int kRows = kOutputs ? 2 * kChunk : kChunk;
    float sums[kRows / 2];  // K S, then Q S
    {
      uint64_t const qk = k_major(shared.qk[stage]) + part * (kTileBytes >> 4);
      pin(fragments);
      pin(sums);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kKeySteps; ++j) {
        wgmma<T, kRows>(sums, fragments + 4 * j, qk + k_step<kQkBytes>(j), j > 0);
        if constexpr (kOutputs && !kFolds) {
          if (j == 1) put_output(part == 0 ? i - 1 : i, 1 - part, i + part > 0);
        }
      }
      wgmma_commit();
    }
    float const decay = scalars.decay[part];
    if constexpr (kOutputs) {
      if (part == 0 && i > 0) send_output(i - 1);
    }
    if (part == 0 && !of_keys) shared.v_loaded[slice][i % 2].wait((i / 2) & 1);
    ChunkValues values;
    load_values(values, shared.v[slice][i % 2], scalars.k_in, first, warp, lane);
    if constexpr (kFolds) {
      float const inverse = power_of_two(254 - scale);
#pragma unroll
      for (float2& x : values.k_in) x = {x.x * inverse, x.y * inverse};
    }
    wgmma_wait<0>();
    pin(sums);
    uint32_t w[kChunk / 4];
    residuals<T>(w, sums, values, first, unit.tile(i).count, lane);

    float u[kChunk / 2];
    {
      uint64_t const inverse = k_major(shared.inverse[prepared]);
      pin(w);
      pin(u);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kChunkSteps; ++j)
        wgmma<T, kChunk>(u, w + 4 * j, inverse + block + k_step(j), j > 0);
#pragma unroll
      for (int j = 0; j < kChunkSteps; ++j) wgmma<T, kChunk>(u, w + 4 * j, inverse + low + k_step(j), true);
      wgmma_commit();
    }
    float o[kChunk / 2];
    if constexpr (kOutputs) {
#pragma unroll
      for (int j = 0; j < kChunk / 2; ++j) o[j] = sums[kChunk / 2 + j];
      scale_tokens(o, scalars.q_in + first, lane);
    }
#pragma unroll
    for (float& x : s) x *= decay;
    pin(s);
    pin(o);
    if constexpr (kFolds) {
      float2 const most = scalars.most[part];
      int const fits = most_scale(w, fmaxf(most.x, most.y), scale);
      if (scale > fits || scale < fits - kScaleSlack) [[unlikely]] {
        // But S stays finite.
        int const goal = min(fits - 1, scale + 245 - static_cast<int>(warp_exponent(s)));
        while (scale != goal) {
          int const step = max(min(goal - scale, 120), -120);
          scale += step;
#pragma unroll
          for (float& x : s) x *= power_of_two(127 + step);
          if constexpr (kOutputs) {
#pragma unroll
            for (float& x : o) x *= power_of_two(127 + step);
          }
        }
      }
    }
    if (kFolds && part == kTileChunks - 1) release(shared.read, i);
    float2 k_out[kChunk / 8];
    if constexpr (!kFolds) {
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n)
        k_out[n] = *reinterpret_cast<float2 const*>(scalars.k_out + first + 8 * n + 2 * (lane % 4));
    }
    wgmma_wait<0>();
    pin(u);
    uint32_t written[kChunk / 4];
    float unrange = 1.f;  // of o
    auto const gain = [&] {
      if constexpr (kFolds) {
        uint64_t const k = row_major(shared.gains[i % 2]) + rows;
#pragma unroll
        for (int j = 0; j < kChunkSteps; ++j)
          wgmma<__half, kKeyDim, Major::MN>(s, written + 4 * j, k + j * kRowStep, true);
      } else {
        float left[kChunk / 2];
#pragma unroll
        for (int j = 0; j < kChunk / 2; ++j) left[j] = u[j] * (j % 2 == 0 ? k_out[j / 4].x : k_out[j / 4].y);
        uint64_t const k = row_major<kQkBytes>(shared.qk[stage]) + part * (kTileBytes >> 4);
        auto const multiply = [&](uint32_t (&x)[kChunk / 4]) {
          pin(x);
          pin(s);
          wgmma_begin();
#pragma unroll
          for (int j = 0; j < kChunkSteps; ++j)
            wgmma<T, kKeyDim, Major::MN>(s, x + 4 * j, k + j * kRowStep, true);
        };
        uint32_t high[kChunk / 4], rest[kChunk / 4];
        if constexpr (std::is_same_v<T, __half>) {
          pack_all<T>(high, left);
          multiply(high);
        } else {  // the first of two parts is cut off rather than rounded
          auto const cut = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xffff0000u); };
#pragma unroll
          for (int j = 0; j < kChunk / 4; ++j)
            high[j] = __byte_perm(__float_as_uint(left[2 * j]), __float_as_uint(left[2 * j + 1]), 0x7632);
          multiply(high);
#pragma unroll
          for (int j = 0; j < kChunk / 4; ++j)
            rest[j] = pack<T>(left[2 * j] - cut(left[2 * j]), left[2 * j + 1] - cut(left[2 * j + 1]));
          multiply(rest);
        }
      }
      wgmma_commit();
    };
    auto const look = [&] {
      uint64_t const scores =
          k_major(shared.scores[prepared / 2]) + rows + k_step(2) * ((part + prepared) % 2);
#pragma unroll
      for (int j = 0; j < kChunkSteps; ++j)
        wgmma<__half, kChunk>(o, written + 4 * j, scores + k_step(j), true);
      wgmma_commit();
    };
    if constexpr (kFolds) {
      pack_all<__half>(written, u, power_of_two(scale - kGainExponent));
      unrange = power_of_two(254 - scale + kGainExponent);
      pin(written);
      pin(s);
      pin(o);
      wgmma_begin();
      if constexpr (kOutputs) look();
      gain();
    } else {
      gain();
      // What follows stays behind the products, which would wait for it.
      wait_prepared(i);
      if constexpr (kOutputs) {
        pin(u);
        float const range = range_factor(u);
        unrange = __uint_as_float((254u << 23) - __float_as_uint(range));  // 1 / range, a power of two
        pack_all<__half>(written, u, range);
#pragma unroll
        for (float& x : o) x *= range;
        pin(written);
        pin(o);
        wgmma_begin();
        look();
      }
    }
    if (kFolds && part == kTileChunks - 1 && i + 1 < unit.tiles) wait_prepared(i + 1);
    if constexpr (kFolds && kOutputs) {
      wgmma_wait<1>();
      pin(o);
      pack_all<T>(packed, o, unrange);
      put_output(i, part, true);
      wgmma_wait<0>();
    } else {
      wgmma_wait<kOutputs ? 1 : 0>();
    }
    pin(s);
    pack_all<T>(fragments, s);
    pin(fragments);
    if constexpr (!kFolds && kOutputs) {
      wgmma_wait<0>();
      pin(o);
      pack_all<T>(packed, o, unrange);
    }
    if constexpr (kOutputs) {
      if (thread == 0 && part == 0 && i > 0 && i + 1 < unit.tiles) {
        wait_stores_read();
        load_v(i + 1);
      }
    } else if (part == kTileChunks - 1 && !of_keys && i + 2 < unit.tiles) {
      named_barrier(barrier, kWarpgroup);  // the values have been read
      if (thread == 0) load_v(i + 2);
    }
    if (part == kTileChunks - 1) {
      if (!kFolds) release(shared.read, i);
      release(shared.released, i);
    }
  };
  if (kFolds && unit.tiles > 0) wait_prepared(0);
  for (int c = 0; c < unit.tiles * kTileChunks; ++c) chunk(c / kTileChunks, c % kTileChunks);
  if constexpr (kOutputs) {
    if (unit.tiles > 0) {
      if constexpr (!kFolds) put_output(unit.tiles - 1, kTileChunks - 1, true);
      send_output(unit.tiles - 1);
    }
  }
  if (unit.final != nullptr) {
    if constexpr (kFolds) {
      float const inverse = power_of_two(254 - scale);
#pragma unroll
      for (float& x : s) x *= inverse;
    }
    store_state<kKeyDim>(s, unit.final, unit.final_v_first, a.p.value_dim,
                         of_keys ? column - a.p.value_dim : column, thread);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(ForwardLaunch const a, __grid_constant__ ForwardMaps const maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  // The window of shared memory, once: asked for anew at every use it would be waited for.
  uint32_t window = shared_address(dynamic_shared);
  asm volatile("" : "+r"(window));
  auto& shared = *static_cast<typename Traits::Shared*>(__cvta_shared_to_generic(window));
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  let_next_kernel_start();
  wait_for_previous_kernel();
  ForwardUnit const unit = forward_unit<Traits>(a, shared.counts);
  if (threadIdx.x == 0) {
    for (Barrier& b : shared.loaded) b.init(1);
    for (Barrier& b : shared.read) b.init(unit.slices * 4);
    for (Barrier& b : shared.released) b.init(unit.slices * 4);
    for (Barrier& b : shared.prepared) b.init(kWarpgroup);
    for (auto& slice : shared.v_loaded) {
      for (Barrier& b : slice) b.init(1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (group < Traits::kHelpers) {
    if constexpr (Traits::kMovesRegisters) shrink_registers<Traits::kHelperRegisters>();
    prepare_tiles<Traits>(shared, a, maps, unit, group, thread);
  } else {
    if constexpr (Traits::kMovesRegisters) grow_registers<Traits::kStateRegisters>();
    if (group - Traits::kHelpers >= unit.slices) return;
    scan_tiles<Traits>(shared, a, maps, unit, group - Traits::kHelpers, thread);
  }
}

}  // namespace lt2::gdn::sm90
