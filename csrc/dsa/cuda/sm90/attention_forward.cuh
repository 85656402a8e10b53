// Attention over a selection as dense attention with the selection's bits for a mask: a block takes 128
// queries of one head, two warpgroups of 64 each, through those tiles of 128 keys in which any of the queries
// selects any. A third warpgroup loads. Scores of the next tile are under way while the weights of this one
// multiply the values.
#pragma once

#include "common/cuda/sm90/wgmma.cuh"
#include "dsa/cuda/sm90/mask.cuh"
#include "dsa/cuda/sm90/union.cuh"
#include "dsa/cuda/sm90/window.cuh"

namespace lt2::dsa::sm90 {

using namespace cuda::sm90;

enum class Source { kMasks, kUnions, kWindow };  // of what a tile's rows see

template <class T_, int kDim_, Source kSource_>
struct ForwardTraits {
  using T = T_;
  static constexpr Source kSource = kSource_;
  static constexpr bool kGather = kSource == Source::kUnions, kWindow = kSource == Source::kWindow;
  static constexpr int kDim = kDim_, kColumns = kDim / kTileSide;  // tiles of 64 elements across
  static constexpr int kStages = 2, kConsumers = 2, kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kLoadRegisters = kGather ? 40 : 24, kRegisters = kGather ? 232 : 240;
  static constexpr int kColumnBytes = kTile * kTileSide * 2, kBytes = kColumns * kColumnBytes;  // of 128 rows

  struct Shared {
    alignas(1024) char q[kBytes];  // then the output
    char k[kStages][kBytes], v[kStages][kBytes];
    uint4 mask[kStages][kTile];
    Range ranges[kTile];  // of a window
    Barrier q_loaded, k_loaded[kStages], v_loaded[kStages], k_released[kStages], v_released[kStages];
    int count, first;
    uint16_t tiles[kMaxTiles];

    __device__ int tile(int i) const { return kWindow ? first + i : tiles[i]; }
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

struct ForwardMaps {
  CUtensorMap q, k, v, o;
};

// Whether what this kernel computes is of no use. One answer for all threads of the block.
__device__ inline bool is_idle(Masks const& masks) {
  return __syncthreads_or(threadIdx.x == 0 && (*static_cast<int volatile*>(masks.redo) != 0 ||
                                               portable::skipped(masks.condition)));
}

struct ForwardLaunch {
  AttentionForwardParams p;
  Masks masks;
  Unions unions;
};

struct ForwardUnit {
  int row, head, key_head, token, tile;  // first head and query
  int heads;                             // of a query, next to each other

  // The last queries first: they may see most keys.
  template <bool kGather>
  static __device__ ForwardUnit of(ForwardLaunch const& a, int64_t unit) {
    int64_t const group = a.p.query_heads / a.p.key_heads, units = kGather ? a.p.key_heads : a.p.query_heads;
    int64_t const order = unit / (a.p.batch * units), head = unit % units;
    int64_t const tile = (kGather ? a.unions.tiles : a.masks.query_tiles) - 1 - order;
    return {static_cast<int>(unit / units % a.p.batch),
            static_cast<int>(kGather ? head * group : head),
            static_cast<int>(kGather ? head : head / group),
            static_cast<int>(tile * (kGather ? a.unions.queries : kTile)),
            static_cast<int>(tile),
            static_cast<int>(kGather ? group : 1)};
  }
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One tile of `rows` x kColumns x 64 elements.
template <int kColumns, int kColumnBytes>
__device__ void load_columns(char* to, CUtensorMap const& map, int head, int token, int row,
                             Barrier& loaded) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    load_tile(to + c * kColumnBytes, map, c * kTileSide, head, token, row, loaded);
  }
}

template <class Traits>
__device__ void load_forward(typename Traits::Shared& shared, ForwardLaunch const& a, ForwardMaps const& maps,
                             ForwardUnit const& unit) {
  constexpr int kColumns = Traits::kColumns, kColumnBytes = Traits::kColumnBytes;
  for (int i = 0; i < shared.count; ++i) {
    int const stage = i % Traits::kStages, parity = (i / Traits::kStages - 1) & 1, tile = shared.tile(i);
    if (i >= Traits::kStages) shared.k_released[stage].wait(parity);
    shared.k_loaded[stage].arrive_expecting(Traits::kBytes + (Traits::kWindow ? 0 : kMaskBytes));
    load_columns<kColumns, kColumnBytes>(shared.k[stage], maps.k, unit.key_head, tile * kTile, unit.row,
                                         shared.k_loaded[stage]);
    if constexpr (!Traits::kWindow) {
      load_bytes(shared.mask[stage], a.masks.bits + a.masks.tile(unit.row, unit.tile, tile) * kTile,
                 kMaskBytes, shared.k_loaded[stage]);
    }
    if (i >= Traits::kStages) shared.v_released[stage].wait(parity);
    shared.v_loaded[stage].arrive_expecting(Traits::kBytes);
    load_columns<kColumns, kColumnBytes>(shared.v[stage], maps.v, unit.key_head, tile * kTile, unit.row,
                                         shared.v_loaded[stage]);
  }
}

// By all threads of the warpgroup: a row of a tile each, fetched by the lanes of its warp together.
template <class Traits>
__device__ void gather_forward(typename Traits::Shared& shared, ForwardLaunch const& a,
                               ForwardUnit const& unit, int thread) {
  using T = typename Traits::T;
  constexpr int kStages = Traits::kStages;
  Unions const& unions = a.unions;
  int64_t const tile = unions.tile(unit.row, unit.tile);
  int const size = unions.sizes[tile];
  int32_t const* const list = unions.keys + tile * unions.capacity;
  uint32_t const mask_bytes = unions.queries * sizeof(uint4);
  auto const key_of = [&](int i) { return i * kTile + thread < size ? list[i * kTile + thread] : -1; };
  auto const k = portable::row_of<T const>(a.p.k, unit.row, 0, unit.key_head);
  auto const v = portable::row_of<T const>(a.p.v, unit.row, 0, unit.key_head);
  int const lane = thread % kWarp, first = thread - lane;
  int next = key_of(0);
  for (int i = 0; i < shared.count; ++i) {
    int const stage = i % kStages, parity = (i / kStages - 1) & 1, key = next;
    if (i >= kStages) shared.k_released[stage].wait(parity);
    if (thread == 0) {
      shared.k_loaded[stage].arrive_expecting(mask_bytes);
      load_bytes(shared.mask[stage], unions.bits + unions.bits_of(tile, i), mask_bytes,
                 shared.k_loaded[stage]);
    }
    gather_rows<Traits::kDim, Traits::kColumnBytes>(shared.k[stage], first, k, a.p.k.token, key, lane);
    arrive_when_copied(shared.k_loaded[stage]);
    next = key_of(i + 1);
    if (i >= kStages) shared.v_released[stage].wait(parity);
    gather_rows<Traits::kDim, Traits::kColumnBytes>(shared.v[stage], first, v, a.p.v.token, key, lane);
    arrive_when_copied(shared.v_loaded[stage]);
  }
}

// -infinity where the bit is not set. Elements are a thread's fragments of 64 rows x 128 keys, with a word
// for each of its two rows.
__device__ __forceinline__ void apply_mask(float (&s)[kTile / 2], uint32_t const (&words)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * n + 2 * half + e];
        x = words[half] & (1u << (2 * n + e)) ? x : -INFINITY;
      }
    }
  }
}

// The two rows of a thread.
struct RowState {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // sum: this thread's share

  // Scores become weights relative to the new top; returns the factors for what was summed before.
  __device__ __forceinline__ float2 weigh(float (&s)[kTile / 2], float scale) {
    float decay[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = top[half];
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        highest = fmaxf(highest, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      float const base = highest == -INFINITY ? 0.f : highest * scale;
      decay[half] = exp2_fast(top[half] * scale - base);
      top[half] = highest;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * n + 2 * half + e];
          x = exp2_fast(x * scale - base);
          total += x;
        }
      }
      sum[half] = sum[half] * decay[half] + total;
    }
    return {decay[0], decay[1]};
  }
};

template <class T, int kCount>
__device__ __forceinline__ void pack_pairs(uint32_t (&a)[kCount / 2], float const (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) a[i] = pack<T>(x[2 * i], x[2 * i + 1]);
}

// Fragments [64, kDim] into the swizzled rows of a warpgroup, kColumnBytes between tiles of 64 columns.
template <class T, int kDim, int kColumnBytes>
__device__ __forceinline__ void store_fragments(char* tile, float const (&x)[kDim / 2], int warp, int lane) {
  int const row = 16 * warp + lane % 16;
#pragma unroll
  for (int n = 0; n < kDim / 8; n += 2) {
    int const chunk = n + lane / 16;
    store_matrices(shared_address(tile) + chunk / 8 * kColumnBytes + tile_offset(row, chunk % 8),
                   pack<T>(x[4 * n], x[4 * n + 1]), pack<T>(x[4 * n + 2], x[4 * n + 3]),
                   pack<T>(x[4 * n + 4], x[4 * n + 5]), pack<T>(x[4 * n + 6], x[4 * n + 7]));
  }
}

template <class Traits>
__device__ void attend(typename Traits::Shared& shared, ForwardLaunch const& a, ForwardMaps const& maps,
                       ForwardUnit const& unit, int group, int thread) {
  AttentionForwardParams const& p = a.p;
  using T = typename Traits::T;
  constexpr int kDim = Traits::kDim, kStages = Traits::kStages, kColumnBytes = Traits::kColumnBytes;
  int const warp = thread / kWarp, lane = thread % kWarp, row = 16 * warp + lane / 4;
  float const scale = p.scale * portable::kLog2E;
  char* const own = shared.q + group * kTileBytes;
  uint64_t const q = k_major(own);
  RowState rows;
  int const first = group * kTileSide + row, queries[2] = {first / unit.heads, (first + 8) / unit.heads};
  Range ranges[2];
  if constexpr (Traits::kWindow) ranges[0] = shared.ranges[first], ranges[1] = shared.ranges[first + 8];
  float s[kTile / 2], o[kDim / 2] = {};
  uint32_t weights[kTile / 4];
  auto const start_scores = [&](int i) {
    shared.k_loaded[i % kStages].wait((i / kStages) & 1);
    if constexpr (Traits::kGather) fence_async_shared();
    uint64_t const k = k_major(shared.k[i % kStages]);
    pin(s);
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      wgmma<T, kTile>(s, q + k_step<kColumnBytes>(j), k + k_step<kColumnBytes>(j), j > 0);
    }
    wgmma_commit();
  };
  auto const start_values = [&](int i) {
    shared.v_loaded[i % kStages].wait((i / kStages) & 1);
    if constexpr (Traits::kGather) fence_async_shared();
    uint64_t const v = row_major<kColumnBytes>(shared.v[i % kStages]);
    pin(weights);
    pin(o);
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j) {
      wgmma<T, kDim, Major::MN>(o, weights + 4 * j, v + j * kRowStep, true);
    }
    wgmma_commit();
  };
  // Masks scores that are there.
  auto const finish_scores = [&](int i) {
    pin(s);
    uint32_t words[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (Traits::kWindow) {
        words[half] = bits_of(ranges[half], shared.first + i, lane % 4);
      } else {
        words[half] = reinterpret_cast<uint32_t const*>(shared.mask[i % kStages] + queries[half])[lane % 4];
      }
    }
    if (!Traits::kWindow || (words[0] & words[1]) != 0xffffffffu) apply_mask(s, words);
    if (lane == 0) shared.k_released[i % kStages].arrive();
  };

  shared.q_loaded.wait(0);
  int const count = shared.count;
  if (count > 0) {
    start_scores(0);
    wgmma_wait<0>();
    finish_scores(0);
    rows.weigh(s, scale);
    pack_pairs<T>(weights, s);
  }
  for (int i = 1; i < count; ++i) {
    start_scores(i);
    start_values(i - 1);
    wgmma_wait<1>();
    finish_scores(i);
    float2 const decay = rows.weigh(s, scale);
    wgmma_wait<0>();
    pin(o);
    pin(weights);
    if (lane == 0) shared.v_released[(i - 1) % kStages].arrive();
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      o[4 * n] *= decay.x;
      o[4 * n + 1] *= decay.x;
      o[4 * n + 2] *= decay.y;
      o[4 * n + 3] *= decay.y;
    }
    pack_pairs<T>(weights, s);
  }
  if (count > 0) {
    start_values(count - 1);
    wgmma_wait<0>();
    pin(o);
  }

  bool finite = true;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    float const inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = o[4 * n + 2 * half + e];
        finite &= fabsf(x) < INFINITY;
        x *= inverse;
      }
    }
    int64_t const token = unit.token + queries[half];
    int const head = unit.head + (first + 8 * half) % unit.heads;
    if (lane % 4 == 0 && token < p.tokens) {
      p.lse[(unit.row * p.tokens + token) * p.query_heads + head] = rows.top[half] * p.scale + logf(sum);
    }
  }
  if (!Traits::kWindow && !finite) *a.masks.redo = 1;
  store_fragments<T, kDim, kColumnBytes>(own, o, warp, lane);
  fence_async_shared();
  named_barrier(1 + group, kWarpgroup);
  if (thread == 0) {
#pragma unroll
    for (int c = 0; c < Traits::kColumns; ++c) {
      store_tile(maps.o, own + c * kColumnBytes, c * kTileSide, unit.head,
                 unit.token + group * kTileSide / unit.heads, unit.row);
    }
    wait_stores_read();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(ForwardLaunch const a, __grid_constant__ ForwardMaps const maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  ForwardUnit const unit = ForwardUnit::of<Traits::kGather>(a, blockIdx.x);
  if constexpr (Traits::kWindow) {
    if (threadIdx.x < kTile) shared.ranges[threadIdx.x] = keys_of(a.p, unit.row, unit.token + threadIdx.x);
    __syncthreads();
  } else if (is_idle(a.masks)) {
    return;
  }
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    int const copies = Traits::kGather ? kWarpgroup : 0;
    shared.q_loaded.init(1);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      shared.k_loaded[stage].init(1 + copies);
      shared.v_loaded[stage].init(Traits::kGather ? copies : 1);
      shared.k_released[stage].init(Traits::kConsumers * kWarpgroup / kWarp);
      shared.v_released[stage].init(Traits::kConsumers * kWarpgroup / kWarp);
    }
    fence_barrier_init();
  }
  if (threadIdx.x / kWarp == 1) {
    int count;
    if constexpr (Traits::kGather) {
      count = (a.unions.sizes[a.unions.tile(unit.row, unit.tile)] + kTile - 1) / kTile;
    } else if constexpr (Traits::kWindow) {
      Range const tiles = tiles_of(shared.ranges);
      count = tiles.end - tiles.first;
      shared.first = tiles.first;
    } else {
      count = list_used(a.masks.used + a.masks.tile(unit.row, unit.tile, 0), 1,
                        static_cast<int>(a.masks.key_tiles), shared.tiles);
    }
    if (threadIdx.x % kWarp == 0) shared.count = count;
  }
  __syncthreads();
  if (group == Traits::kConsumers) {
    shrink_registers<Traits::kLoadRegisters>();
    if (thread == 0) {
      shared.q_loaded.arrive_expecting(Traits::kBytes);
      load_columns<Traits::kColumns, Traits::kColumnBytes>(shared.q, maps.q, unit.head, unit.token, unit.row,
                                                           shared.q_loaded);
    }
    if constexpr (Traits::kGather) {
      gather_forward<Traits>(shared, a, unit, thread);
    } else if (thread == 0) {
      load_forward<Traits>(shared, a, maps, unit);
    }
  } else {
    grow_registers<Traits::kRegisters>();
    attend<Traits>(shared, a, maps, unit, group, thread);
  }
}

}  // namespace lt2::dsa::sm90
