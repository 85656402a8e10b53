// Gradients of the index operands out of slopes N dI of some query tiles, in two passes of one kernel. With x
// = q_j k^T anew and m = [x > 0] for each index head j:
//   queries stay, kHeads heads of them: dq_j = factor w_j sum over keys of (dI m) k;  dw_j = factor sum dI m
//   x keys stay: dk = factor sum over queries and kHeads heads of (dI w_j m) q_j, in fp32; a last kernel adds
//   up
// the groups of kHeads heads. No sum depends on scheduling.
#pragma once

#include "dsa/cuda/sm90/loss_pairs.cuh"

namespace lt2::dsa::sm90 {

template <class T_, int kDim_, bool kKeys_>
struct SlopeTraits {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr bool kKeys = kKeys_;  // keys stay
  static constexpr int kHeads = 128 / kDim, kStay = kKeys ? 1 : kHeads;
  static constexpr int kSums = kKeys ? 1 : kHeads;
  static constexpr int kThreads = 3 * kWarpgroup, kBytes = kDim / kTileSide * kColumnBytes;
  static constexpr int kPassing = kDim == 64 ? 4 : 3;

  struct Shared {
    alignas(1024) char stay[kStay][kBytes];  // then dq
    Ring<kPassing, kBytes> passing;
    Ring<2, kSlopeBytes> slopes;
    float weights[kPassing][kTile];  // of queries that pass
    Barrier loaded;
    int count;
    uint16_t tiles[kMaxTiles];
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

struct SlopeMaps {
  CUtensorMap index_q, index_k, dq;
};

struct SlopeLaunch {
  LossBackwardParams p;
  Masks masks;
  int64_t first, end;    // query tiles with slopes, counted over batch rows
  int64_t groups;        // of kHeads index heads
  uint4 const* slopes;   // as in PairLaunch
  float const* weights;  // [B, groups kHeads, query tiles 128]: 0 where a query has no key
  float* dk;             // [B, groups, S, DI]

  __device__ float factor() const { return p.index_scale * (*p.dmean / *p.rows); }
};

// What of a batch row's query tiles has slopes, and the tile of what stays.
struct SlopeUnit {
  int64_t row, begin, end, tile, group;

  template <bool kKeys>
  static __device__ SlopeUnit of(SlopeLaunch const& a, int64_t block) {
    int64_t const tiles = a.masks.query_tiles, order = block / a.groups;
    SlopeUnit u{0, 0, 0, 0, block % a.groups};
    if constexpr (kKeys) {
      // The first keys have most queries.
      int64_t const first_row = a.first / tiles, rows = (a.end - 1) / tiles - first_row + 1;
      u.row = first_row + order % rows;
      u.tile = order / rows;
    } else {
      int64_t const unit = a.end - 1 - order;
      u.row = unit / tiles;
      u.tile = unit % tiles;
    }
    u.begin = max(a.first - u.row * tiles, int64_t{0});
    u.end = min(a.end - u.row * tiles, tiles);
    return u;
  }
};

template <class Traits>
__device__ void load_slopes(typename Traits::Shared& shared, SlopeLaunch const& a, SlopeMaps const& maps,
                            SlopeUnit const& unit) {
  constexpr int kDim = Traits::kDim, kHeads = Traits::kHeads;
  int const row = static_cast<int>(unit.row), first_head = static_cast<int>(unit.group) * kHeads;
  shared.loaded.arrive_expecting(Traits::kStay * Traits::kBytes);
  for (int i = 0; i < Traits::kStay; ++i) {
    load_rows<kDim>(shared.stay[i], Traits::kKeys ? maps.index_k : maps.index_q,
                    Traits::kKeys ? 0 : first_head + i, unit.tile, row, shared.loaded);
  }
  for (int i = 0, use = 0; i < shared.count; ++i) {
    int64_t const passing = (Traits::kKeys ? unit.begin : 0) + shared.tiles[i];
    int64_t const query_tile = Traits::kKeys ? passing : unit.tile,
                  key_tile = Traits::kKeys ? unit.tile : passing;
    int64_t const at = (unit.row * a.masks.query_tiles + query_tile - a.first) * a.masks.key_tiles + key_tile;
    int const slot = shared.slopes.reserve(i, kSlopeBytes);
    load_bytes(shared.slopes.data[slot], a.slopes + at * (kSlopeBytes / sizeof(uint4)), kSlopeBytes,
               shared.slopes.loaded[slot]);
    for (int h = 0; h < (Traits::kKeys ? kHeads : 1); ++h) {
      constexpr uint32_t kWeightBytes = Traits::kKeys ? kTile * sizeof(float) : 0;
      int const to = shared.passing.reserve(use++, Traits::kBytes + kWeightBytes);
      Barrier& loaded = shared.passing.loaded[to];
      load_rows<kDim>(shared.passing.data[to], Traits::kKeys ? maps.index_q : maps.index_k,
                      Traits::kKeys ? first_head + h : 0, passing, row, loaded);
      if constexpr (Traits::kKeys) {
        int64_t const head = unit.row * a.groups * kHeads + first_head + h;
        load_bytes(shared.weights[to], a.weights + (head * a.masks.query_tiles + passing) * kTile,
                   kWeightBytes, loaded);
      }
    }
  }
}

// A thread's fragments of a tile of slopes, or of its transpose.
template <bool kTransposed>
__device__ __forceinline__ void read_slopes(uint32_t (&d)[kTile / 4], char const* tile, int group, int warp,
                                            int lane) {
  auto const* const words = reinterpret_cast<uint32_t const*>(tile);
  int const block = 8 * group + 2 * warp;
  if constexpr (kTransposed) {
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
      uint2 const x = *reinterpret_cast<uint2 const*>(words + slope_word(n, block, lane));
      d[2 * n] = transposed(x.x);
      d[2 * n + 1] = transposed(x.y);
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        uint4 const x = *reinterpret_cast<uint4 const*>(words + slope_word(block + half, 4 * c, lane));
        d[8 * c + half] = x.x;
        d[8 * c + 2 + half] = x.y;
        d[8 * c + 4 + half] = x.z;
        d[8 * c + 6 + half] = x.w;
      }
    }
  }
}

template <class Traits>
__device__ void apply_slopes(typename Traits::Shared& shared, SlopeLaunch const& a, SlopeMaps const& maps,
                             SlopeUnit const& unit, int group, int thread) {
  using T = typename Traits::T;
  constexpr int kDim = Traits::kDim, kHeads = Traits::kHeads;
  constexpr bool kKeys = Traits::kKeys;
  LossBackwardParams const& p = a.p;
  int const warp = thread / kWarp, lane = thread % kWarp, own = group * kTileSide + 16 * warp + lane / 4;
  float sums[Traits::kSums][kDim / 2] = {}, dw[kHeads][2] = {};
  float s[kTile / 2];
  uint32_t d[kTile / 4], factors[kTile / 4] = {};
  shared.loaded.wait(0);
  int use = 0;
  for (int i = 0; i < shared.count; ++i) {
    read_slopes<kKeys>(d, shared.slopes.wait(i), group, warp, lane);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      bool const next = kKeys || h == 0;  // another tile passes
      char const* const passing = shared.passing.wait(use);
      float const* const weights = shared.weights[use % Traits::kPassing];
      multiply_rows<T, kDim>(s, shared.stay[kKeys ? 0 : h] + group * kTileBytes, passing);
      pin(factors);
      pin(sums[kKeys ? 0 : (h + kHeads - 1) % kHeads]);
      if (next && use > 0 && lane == 0) shared.passing.release(use - 1);
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        float2 w{1.f, 1.f};
        if constexpr (kKeys) w = *reinterpret_cast<float2 const*>(weights + 8 * n + 2 * (lane % 4));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const at = 4 * n + 2 * half;
          float2 const slope = unpack<T>(d[at / 2]);
          float const x0 = s[at] > 0.f ? slope.x : 0.f, x1 = s[at + 1] > 0.f ? slope.y : 0.f;
          if constexpr (!kKeys) {
            dw[h][half] += x0 * fmaxf(s[at], 0.f);
            dw[h][half] += x1 * fmaxf(s[at + 1], 0.f);
          }
          factors[at / 2] = kKeys ? pack<T>(x0 * w.x, x1 * w.y) : pack<T>(x0, x1);
        }
      }
      float (&sum)[kDim / 2] = sums[kKeys ? 0 : h];
      uint64_t const rows = row_major<kColumnBytes>(passing);
      pin(factors);
      pin(sum);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kTile / 16; ++j) {
        wgmma<T, kDim, Major::MN>(sum, factors + 4 * j, rows + j * kRowStep, true);
      }
      wgmma_commit();
      // Not before the slopes are in use: an arrival may overtake loads that are under way.
      if (h == 0 && lane == 0) shared.slopes.release(i);
      if (kKeys || h + 1 == kHeads) ++use;
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (auto& sum : sums) pin(sum);

  bool finite = true;
#pragma unroll
  for (auto const& x : dw) finite &= fabsf(x[0] + x[1]) < INFINITY;
#pragma unroll
  for (auto const& sum : sums) {
#pragma unroll
    for (float x : sum) finite &= fabsf(x) < INFINITY;
  }
  if (!finite) *a.masks.redo = 1;
  float const factor = a.factor() * (1.f / kSlopeScale<T>);
  if constexpr (kKeys) {
    bool const is_first = unit.begin == 0;
    float* const dk = a.dk + (unit.row * a.groups + unit.group) * p.keys * kDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t const k = unit.tile * kTile + own + 8 * half;
      if (k >= p.keys) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        auto* const to = reinterpret_cast<float2*>(dk + k * kDim + 8 * n + 2 * (lane % 4));
        float2 const before = is_first ? float2{0.f, 0.f} : *to;
        *to = {before.x + factor * sums[0][4 * n + 2 * half],
               before.y + factor * sums[0][4 * n + 2 * half + 1]};
      }
    }
  } else {
    named_barrier(1 + group, kWarpgroup);  // all products have read what stayed
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      int64_t const head = unit.group * kHeads + h;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t const token = unit.tile * kTile + own + 8 * half;
        float const w =
            factor * a.weights[((unit.row * a.groups * kHeads + head) * a.masks.query_tiles) * kTile + token];
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          sums[h][4 * n + 2 * half] *= w;
          sums[h][4 * n + 2 * half + 1] *= w;
        }
        float sum = dw[h][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (p.dweights.data != nullptr && lane % 4 == 0 && token < p.tokens && head < p.index_heads) {
          *portable::row_of<float>(p.dweights, unit.row, token, head) = factor * sum;
        }
      }
      store_fragments<T, kDim, kColumnBytes>(shared.stay[h] + group * kTileBytes, sums[h], warp, lane);
    }
    fence_async_shared();
    named_barrier(1 + group, kWarpgroup);
    if (thread != 0) return;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int c = 0; c < kDim / kTileSide; ++c) {
        store_tile(maps.dq, shared.stay[h] + group * kTileBytes + c * kColumnBytes, c * kTileSide,
                   static_cast<int>(unit.group) * kHeads + h,
                   static_cast<int>(unit.tile) * kTile + group * kTileSide, static_cast<int>(unit.row));
      }
    }
    wait_stores_read();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    slope_kernel(__grid_constant__ SlopeLaunch const a, __grid_constant__ SlopeMaps const maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  if (is_idle(a.masks)) return;
  SlopeUnit const unit = SlopeUnit::of<Traits::kKeys>(a, blockIdx.x);
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    shared.passing.init();
    shared.slopes.init();
    shared.loaded.init(1);
    fence_barrier_init();
  }
  if (threadIdx.x / kWarp == 1) {
    Masks const& m = a.masks;
    int const count = Traits::kKeys ? list_used(m.used + m.tile(unit.row, unit.begin, unit.tile), m.key_tiles,
                                                static_cast<int>(unit.end - unit.begin), shared.tiles)
                                    : list_used(m.used + m.tile(unit.row, unit.tile, 0), 1,
                                                static_cast<int>(m.key_tiles), shared.tiles);
    if (threadIdx.x % kWarp == 0) shared.count = count;
  }
  __syncthreads();
  if (group == 2) {
    shrink_registers<24>();
    if (thread == 0) load_slopes<Traits>(shared, a, maps, unit);
  } else {
    grow_registers<240>();
    apply_slopes<Traits>(shared, a, maps, unit, group, thread);
  }
}

// dk of a key out of the groups' parts, kDim / 8 lanes a key.
template <class T, int kDim>
__global__ void __launch_bounds__(portable::kThreads) add_groups(__grid_constant__ SlopeLaunch const a) {
  constexpr int kLanes = kDim / portable::kElements;
  int64_t const i = int64_t{blockIdx.x} * portable::kThreads + threadIdx.x, key = i / kLanes % a.p.keys,
                row = i / kLanes / a.p.keys;
  if (row >= a.p.batch) return;
  int const lane = static_cast<int>(i % kLanes);
  float sum[portable::kElements] = {};
  for (int64_t g = 0; g < a.groups; ++g) {
    auto const part = portable::load_piece(a.dk + ((row * a.groups + g) * a.p.keys + key) * kDim, lane, kDim);
    portable::add_scaled(sum, 1.f, part);
  }
  portable::store_floats(sum, portable::row_of<T>(a.p.dk, row, key, 0), lane, kDim);
}

}  // namespace lt2::dsa::sm90
