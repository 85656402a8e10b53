// Gradients of attention over a selection, with its bits for a mask, in two passes of one kernel. What a
// block keeps are 128 keys with their values (its results: dk, dv), or 128 queries with the gradients of
// their outputs (dq); what passes by are steps of 64 queries, or of 64 keys. With a, b the rows that stay, x,
// y those that pass:
//   s = a x^T;  p = e^(scale s - lse);  ds = p (b y^T - delta);  dk or dq = scale sum ds x;  dv = sum p y
// Two passes cost two more products than one would, but no sum depends on scheduling.
#pragma once

#include "dsa/cuda/sm90/attention_forward.cuh"

namespace lt2::dsa::sm90 {

inline constexpr int kStep = 64;

template <class T_, int kDim_, bool kKeys_, bool kWindow_>
struct BackwardTraits {
  using T = T_;
  static constexpr bool kKeys = kKeys_, kWindow = kWindow_;  // keys stay; bits are those of a window
  static constexpr int kDim = kDim_, kColumns = kDim / kTileSide,
                       kBytes = kColumns * kTileBytes;  // of 64 rows
  static constexpr int kStages = 4, kConsumers = 2, kThreads = (kConsumers + 1) * kWarpgroup;

  // Which step of a head's.
  static __device__ int step(int u, int steps) { return kKeys && kWindow ? u % steps : u; }

  struct Shared {
    alignas(1024) char a[kConsumers][kBytes];  // then dk or dq
    char b[kConsumers][kBytes];                // then dv
    char x[kStages][kBytes], y[kStages][kBytes];
    uint4 mask[kStages][kTile];
    Range ranges[kTile];                               // of a window
    float lse[kStages][kStep], delta[kStages][kStep];  // of queries that pass
    Barrier stay, loaded[kStages], released[kStages];
    int count, first;
    uint16_t tiles[kMaxTiles];

    __device__ int tile(int i) const { return kWindow ? first + i : tiles[i]; }
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

// Of [B, T, heads, D] tensors in tiles of 64 x 64.
struct BackwardMaps {
  CUtensorMap q, k, v, dout, dq, dk, dv;
};

struct BackwardLaunch {
  AttentionBackwardParams p;
  Masks masks;
  uint4 const* key_bits;     // [B, query tiles, key tiles, 128 keys]: as masks.bits, of queries
  float const *lse, *delta;  // [B, HQ, query tiles 128]: lse / ln 2, infinite where a query has no key
  float *dk, *dv;            // [B, HQ, S, D] where key heads have several query heads, else null
};

// Where a block is.
struct BackwardUnit {
  int row, head, heads, key_head, tile;  // query heads that pass or stay, tile of what stays

  template <class Traits>
  static __device__ BackwardUnit of(BackwardLaunch const& a, int64_t unit) {
    int const group = static_cast<int>(a.p.query_heads / a.p.key_heads), together = heads_of<Traits>(a.p);
    int64_t const units = a.p.query_heads / together, order = unit / (a.p.batch * units);
    int const head = static_cast<int>(unit % units) * together;
    // First those that have most to do under a causal selection: the first keys, the last queries.
    return {static_cast<int>(unit / units % a.p.batch), head, together, head / group,
            static_cast<int>(Traits::kKeys ? order : a.masks.query_tiles - 1 - order)};
  }

  // The keys of a window meet few queries: those of all heads pass by.
  template <class Traits>
  static __host__ __device__ int heads_of(AttentionParams const& p) {
    return Traits::kKeys && Traits::kWindow ? static_cast<int>(p.query_heads / p.key_heads) : 1;
  }
};

template <class Traits>
__device__ void load_backward(typename Traits::Shared& shared, BackwardLaunch const& a,
                              BackwardMaps const& maps, BackwardUnit const& unit) {
  constexpr int kColumns = Traits::kColumns, kStages = Traits::kStages;
  constexpr bool kKeys = Traits::kKeys;
  int head = unit.head;
  auto const load = [&](char* to, CUtensorMap const& map, bool of_keys, int token, Barrier& loaded) {
    load_columns<kColumns, kTileBytes>(to, map, of_keys ? unit.key_head : head, token, unit.row, loaded);
  };
  shared.stay.arrive_expecting(2 * Traits::kConsumers * Traits::kBytes);
  for (int g = 0; g < Traits::kConsumers; ++g) {
    int const token = unit.tile * kTile + g * kTileSide;
    load(shared.a[g], kKeys ? maps.k : maps.q, kKeys, token, shared.stay);
    load(shared.b[g], kKeys ? maps.v : maps.dout, kKeys, token, shared.stay);
  }
  uint4 const* const bits = kKeys ? a.key_bits : a.masks.bits;
  int const steps = 2 * shared.count;
  for (int u = 0; u < steps * unit.heads; ++u) {
    int const stage = u % kStages, passing = shared.tile(Traits::step(u, steps) / 2),
              token = passing * kTile + u % 2 * kStep;
    head = unit.head + u / steps;
    int64_t const stats = (int64_t{unit.row} * a.p.query_heads + head) * a.masks.query_tiles * kTile;
    Barrier& loaded = shared.loaded[stage];
    if (u >= kStages) shared.released[stage].wait((u / kStages - 1) & 1);
    loaded.arrive_expecting(2 * Traits::kBytes + (Traits::kWindow ? 0 : kMaskBytes) +
                            (kKeys ? 2 * kStep * sizeof(float) : 0));
    load(shared.x[stage], kKeys ? maps.q : maps.k, !kKeys, token, loaded);
    if constexpr (!Traits::kWindow) {
      load_bytes(shared.mask[stage],
                 bits + (kKeys ? a.masks.tile(unit.row, passing, unit.tile)
                               : a.masks.tile(unit.row, unit.tile, passing)) *
                            kTile,
                 kMaskBytes, loaded);
    }
    load(shared.y[stage], kKeys ? maps.dout : maps.v, !kKeys, token, loaded);
    if constexpr (kKeys) {
      load_bytes(shared.lse[stage], a.lse + stats + token, kStep * sizeof(float), loaded);
      load_bytes(shared.delta[stage], a.delta + stats + token, kStep * sizeof(float), loaded);
    }
  }
}

// A thread's rows of the sum leave: to dk, dv, dq, or as fp32 to a part of dk or dv.
template <class Traits>
__device__ void store_gradient(float (&x)[Traits::kDim / 2], float factor, char* own, CUtensorMap const& map,
                               float* part, BackwardLaunch const& a, BackwardUnit const& unit, int group,
                               int thread) {
  constexpr int kDim = Traits::kDim;
  int const warp = thread / kWarp, lane = thread % kWarp, first = unit.tile * kTile + group * kTileSide;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) {
    finite &= fabsf(x[i]) < INFINITY;
    x[i] *= factor;
  }
  if (!finite) *a.masks.redo = 1;
  if (part != nullptr) {
    float* const head = part + (int64_t{unit.row} * a.p.query_heads + unit.head) * a.p.keys * kDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const key = first + 16 * warp + lane / 4 + 8 * half;
      if (key >= a.p.keys) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<float2*>(head + int64_t{key} * kDim + 8 * n + 2 * (lane % 4)) =
            float2{x[4 * n + 2 * half], x[4 * n + 2 * half + 1]};
      }
    }
    return;
  }
  store_fragments<typename Traits::T, kDim, kTileBytes>(own, x, warp, lane);
  fence_async_shared();
  named_barrier(1 + group, kWarpgroup);
  if (thread == 0) {
#pragma unroll
    for (int c = 0; c < Traits::kColumns; ++c) {
      store_tile(map, own + c * kTileBytes, c * kTileSide, Traits::kKeys ? unit.key_head : unit.head, first,
                 unit.row);
    }
    wait_stores_read();
  }
}

// What a warpgroup computes: 64 rows a, b against 64 rows x, y. With kKeys a, b are keys and values.
template <class T, int kDim, bool kKeys>
struct Gradients {
  float s[kStep / 2], dp[kStep / 2], sum[kDim / 2], values[kKeys ? kDim / 2 : 1];
  uint32_t weights[kStep / 4], slopes[kStep / 4];

  static __device__ __forceinline__ void multiply(float (&out)[kStep / 2], uint64_t stay,
                                                  char const* passing) {
    uint64_t const rows = k_major(passing);
    pin(out);
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) wgmma<T, kStep>(out, stay + k_step(j), rows + k_step(j), j > 0);
    wgmma_commit();
  }

  static __device__ __forceinline__ void accumulate(float (&to)[kDim / 2],
                                                    uint32_t const (&factors)[kStep / 4], char const* rows) {
    uint64_t const b = row_major(rows);
    pin(to);
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < kStep / 16; ++j) {
      wgmma<T, kDim, Major::MN>(to, factors + 4 * j, b + j * kRowStep, true);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& x : sum) x = 0.f;
#pragma unroll
    for (float& x : values) x = 0.f;
  }

  // Adds to the sums, which are still under way on return. `previous` is called
  // when those of the step before are complete. lse and delta are of the 64 rows that pass, or of the
  // thread's two rows.
  template <class F>
  __device__ __forceinline__ void add(char const* a, char const* b, char const* x, char const* y,
                                      uint32_t const (&bits)[2], float const* lse, float const* delta,
                                      float scale, int lane, F const& previous) {
    multiply(s, k_major(a), x);
    wgmma_wait<1>();
    pin(sum);
    if constexpr (kKeys) pin(values);
    previous();
    multiply(dp, k_major(b), y);
    wgmma_wait<1>();
    pin(s);
    auto const of = [&](float const* stats, int n, int half) {
      if constexpr (kKeys) return *reinterpret_cast<float2 const*>(stats + 8 * n + 2 * (lane % 4));
      return float2{stats[half], stats[half]};
    };
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 const l = of(lse, n, half);
        int const i = 4 * n + 2 * half;
        float const first = exp2_fast(s[i] * scale - l.x), second = exp2_fast(s[i + 1] * scale - l.y);
        s[i] = bits[half] & (1u << (2 * n)) ? first : 0.f;
        s[i + 1] = bits[half] & (1u << (2 * n + 1)) ? second : 0.f;
      }
    }
    pack_pairs<T>(weights, s);
    if constexpr (kKeys) {
      pin(weights);
      accumulate(values, weights, y);
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    pin(dp);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 const d = of(delta, n, half);
        int const i = 4 * n + 2 * half;
        float2 const p = unpack<T>(weights[i / 2]);
        slopes[i / 2] = pack<T>(p.x * (dp[i] - d.x), p.y * (dp[i + 1] - d.y));
      }
    }
    pin(slopes);
    accumulate(sum, slopes, x);
  }

  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
    pin(sum);
    if constexpr (kKeys) pin(values);
  }
};

template <class Traits>
__device__ void differentiate(typename Traits::Shared& shared, BackwardLaunch const& a,
                              BackwardMaps const& maps, BackwardUnit const& unit, int group, int thread) {
  constexpr int kDim = Traits::kDim, kStages = Traits::kStages;
  constexpr bool kKeys = Traits::kKeys;
  int const warp = thread / kWarp, lane = thread % kWarp, row = group * kTileSide + 16 * warp + lane / 4;
  float const scale = a.p.scale * portable::kLog2E;
  float row_lse[2], row_delta[2];
  if constexpr (!kKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t const at =
          ((int64_t{unit.row} * a.p.query_heads + unit.head) * a.masks.query_tiles + unit.tile) * kTile +
          row + 8 * half;
      row_lse[half] = a.lse[at];
      row_delta[half] = a.delta[at];
    }
  }
  Gradients<typename Traits::T, kDim, kKeys> g;
  g.clear();
  Range ranges[2];
  if constexpr (Traits::kWindow) ranges[0] = shared.ranges[row], ranges[1] = shared.ranges[row + 8];
  shared.stay.wait(0);
  int const steps = 2 * shared.count;
  for (int u = 0; u < steps * unit.heads; ++u) {
    int const stage = u % kStages;
    shared.loaded[stage].wait((u / kStages) & 1);
    uint32_t bits[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t const word =
          Traits::kWindow ? bits_of(ranges[half], shared.tile(Traits::step(u, steps) / 2), lane % 4)
                          : reinterpret_cast<uint32_t const*>(shared.mask[stage] + row + 8 * half)[lane % 4];
      bits[half] = word >> (u % 2 * 16);
    }
    g.add(shared.a[group], shared.b[group], shared.x[stage], shared.y[stage], bits,
          kKeys ? shared.lse[stage] : row_lse, kKeys ? shared.delta[stage] : row_delta, scale, lane, [&] {
            if (u > 0 && lane == 0) shared.released[(u - 1) % kStages].arrive();
          });
  }
  g.finish();
  store_gradient<Traits>(g.sum, a.p.scale, shared.a[group], kKeys ? maps.dk : maps.dq, kKeys ? a.dk : nullptr,
                         a, unit, group, thread);
  if constexpr (kKeys) {
    store_gradient<Traits>(g.values, 1.f, shared.b[group], maps.dv, a.dv, a, unit, group, thread);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(BackwardLaunch const a, __grid_constant__ BackwardMaps const maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  BackwardUnit const unit = BackwardUnit::of<Traits>(a, blockIdx.x);
  if constexpr (Traits::kWindow) {
    int const i = threadIdx.x, own = unit.tile * kTile + i;
    if (i < kTile)
      shared.ranges[i] = Traits::kKeys ? queries_of(a.p, unit.row, own) : keys_of(a.p, unit.row, own);
    __syncthreads();
  } else if (is_idle(a.masks)) {
    return;
  }
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    shared.stay.init(1);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      shared.loaded[stage].init(1);
      shared.released[stage].init(Traits::kConsumers * kWarpgroup / kWarp);
    }
    fence_barrier_init();
  }
  if (threadIdx.x / kWarp == 1) {
    Masks const& m = a.masks;
    int count;
    if constexpr (Traits::kWindow) {
      Range const tiles = tiles_of(shared.ranges);
      count = tiles.end - tiles.first;
      shared.first = tiles.first;
    } else {
      count = Traits::kKeys ? list_used(m.used + m.tile(unit.row, 0, unit.tile), m.key_tiles,
                                        static_cast<int>(m.query_tiles), shared.tiles)
                            : list_used(m.used + m.tile(unit.row, unit.tile, 0), 1,
                                        static_cast<int>(m.key_tiles), shared.tiles);
    }
    if (threadIdx.x % kWarp == 0) shared.count = count;
  }
  __syncthreads();
  if (group == Traits::kConsumers) {
    shrink_registers<24>();
    if (thread == 0) load_backward<Traits>(shared, a, maps, unit);
  } else {
    grow_registers<240>();
    differentiate<Traits>(shared, a, maps, unit, group, thread);
  }
}

// lse and delta = o . do - dlse as in BackwardLaunch, kDim / 8 lanes a query and head; queries that fill up
// the last tile have no key.
template <class T, int kDim>
__global__ void __launch_bounds__(portable::kThreads)
    row_kernel(AttentionBackwardParams const p, int64_t tokens, float* lse, float* delta) {
  constexpr int kLanes = kDim / portable::kElements, kGroups = portable::kThreads / kLanes;
  int const lane = threadIdx.x % kLanes;
  int64_t const rows = p.batch * tokens * p.query_heads;
  int64_t const i = int64_t{blockIdx.x} * kGroups + threadIdx.x / kLanes;
  int64_t const head = i % p.query_heads, token = i / p.query_heads % tokens,
                row = i / p.query_heads / tokens;
  bool const present = i < rows && token < p.tokens;
  float dout[portable::kElements];
  portable::load_floats(dout, portable::row_of<T const>(p.dout, row, token, head), lane, kDim, present);
  auto const o = portable::load_piece(portable::row_of<T const>(p.o, row, token, head), lane, kDim, present);
  float const sum = lane_sum<kLanes>(portable::dot(dout, o));
  if (lane != 0 || i >= rows) return;
  int64_t const from = (row * p.tokens + token) * p.query_heads + head;
  int64_t const to = (row * p.query_heads + head) * tokens + token;
  float const own = present ? p.lse[from] : -INFINITY;
  lse[to] = own == -INFINITY ? INFINITY : own * portable::kLog2E;
  delta[to] = sum - (present && p.dlse != nullptr ? p.dlse[from] : 0.f);
}

// dk and dv as sums of the parts of a key head's query heads; 8 elements a thread.
template <class T, int kDim>
__global__ void __launch_bounds__(portable::kThreads) sum_parts(BackwardLaunch const a) {
  constexpr int kPieces = kDim / portable::kElements;
  AttentionBackwardParams const& p = a.p;
  if (portable::skipped(a.masks.condition)) return;
  int64_t const i = int64_t{blockIdx.x} * portable::kThreads + threadIdx.x;
  int64_t const rows = i / kPieces, key = rows / p.key_heads % p.keys, row = rows / p.key_heads / p.keys;
  if (row >= p.batch) return;
  int const lane = static_cast<int>(i % kPieces);
  int64_t const key_head = rows % p.key_heads, heads = p.query_heads / p.key_heads;
  auto const reduce = [&](float const* parts, Heads const& to) {
    float sum[portable::kElements] = {};
    for (int64_t h = 0; h < heads; ++h) {
      int64_t const head = row * p.query_heads + key_head * heads + h;
      auto const part = portable::load_piece(parts + (head * p.keys + key) * kDim, lane, kDim);
      portable::add_scaled(sum, 1.f, part);
    }
    portable::store_floats(sum, portable::row_of<T>(to, row, key, key_head), lane, kDim);
  };
  reduce(a.dk, p.dk);
  reduce(a.dv, p.dv);
}

}  // namespace lt2::dsa::sm90
