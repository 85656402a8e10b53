// Gradients of attention over a selection, for the keys that the queries of a tile select together
// (union.cuh). A block keeps a tile's 128 rows of queries and of gradients of their outputs while its keys
// pass by, 128 at a time; one pass adds up dq, another gives the tile's share of dk and dv of each key, in
// fp32. Pieces are 128 keys of a tile, in the order of tiles; the shares of a band of pieces are in memory
// together, and are added in that order.
#pragma once

#include "dsa/cuda/sm90/attention_backward.cuh"

namespace lt2::dsa::sm90 {

struct UnionMaps {
  CUtensorMap q, dout, dq;  // of 64 rows: queries with their heads
};

struct UnionBackwardLaunch {
  AttentionBackwardParams p;
  int* redo;
  int64_t tokens;  // of lse and delta
  Unions unions;
  uint4 const* key_bits;      // [B, tiles, capacity / 128, 128 keys]: as unions.bits, of rows
  float const *lse, *delta;   // as in BackwardLaunch
  int *starts, *full;         // [B, tiles + 1]: first pieces; set if there are more than `most` of a row
  int* firsts;                // [B, bands + 1]: tiles with the bands' first pieces
  int64_t bands, band, most;  // of a batch row; pieces
  float* shares;              // [pieces of a band, H, 128, 2, D]: of dk, then of dv
  float* sums;                // [S, H, 2, D]: of the bands of a batch row so far
  int64_t row, number;        // the band
};

// The tiles with pieces of a band.
struct Band {
  int begin, total;  // first piece; of the batch row
  int first, last;   // tiles
  bool is_first, is_last;

  __device__ explicit Band(UnionBackwardLaunch const& a) {
    int const tiles = static_cast<int>(a.unions.tiles), band = static_cast<int>(a.band);
    int const* const firsts = a.firsts + a.row * (a.bands + 1) + a.number;
    begin = static_cast<int>(a.number) * band;
    total = a.starts[a.row * (tiles + 1) + tiles];
    is_first = begin == 0;
    is_last = begin + band >= total;
    first = firsts[0];
    last = is_last ? tiles : firsts[1] + 1;  // the next band's first tile may have pieces in this one
    if (begin >= total) first = last;
  }
};

struct UnionUnit {
  int row, head, key_head, heads;  // first query head, of a key head
  int tile, token, size;           // of all; first query; keys
  int first, last, start;          // its pieces of the band, and the piece of the band that is its first

  static __device__ UnionUnit of(UnionBackwardLaunch const& a, int row, int tile, int key_head) {
    UnionUnit u;
    u.heads = static_cast<int>(a.p.query_heads / a.p.key_heads);
    u.key_head = key_head;
    u.head = key_head * u.heads;
    u.row = row;
    u.token = tile * a.unions.queries;
    u.tile = static_cast<int>(a.unions.tile(row, tile));
    u.size = a.unions.sizes[u.tile];
    u.first = 0;
    u.last = (u.size + kTile - 1) / kTile;
    return u;
  }
  // The last tile first: its queries may select from most keys. last: tile after those of the band.
  template <bool kKeys>
  static __device__ UnionUnit of(UnionBackwardLaunch const& a, int unit, int last) {
    int const key_heads = static_cast<int>(a.p.key_heads), batch = static_cast<int>(a.p.batch);
    int const order = unit / key_heads, key_head = unit % key_heads;
    if constexpr (!kKeys) return of(a, order % batch, last - 1 - order / batch, key_head);
    UnionUnit u = of(a, static_cast<int>(a.row), last - 1 - order, key_head);
    u.start = a.starts[u.tile + u.row] - static_cast<int>(a.number * a.band);
    u.first = max(0, -u.start);
    u.last = min(u.last, static_cast<int>(a.band) - u.start);
    return u;
  }
};

template <class T_, int kDim_, bool kKeys_>
struct UnionTraits {
  using T = T_;
  static constexpr bool kKeys = kKeys_;  // shares of dk and dv, else dq
  static constexpr int kDim = kDim_, kColumns = kDim / kTileSide, kBytes = kColumns * kTileBytes;
  static constexpr int kStages = 2, kConsumers = 2, kThreads = (kConsumers + 1) * kWarpgroup;
  // What a block is launched with is all that its warpgroups may have together.
  static constexpr bool kFew = kKeys && kDim == 128;
  static constexpr int kLoadRegisters = kFew ? 24 : 40, kRegisters = kFew ? 240 : 232, kUnroll = kFew ? 1 : 4;

  static constexpr int kReleases = kKeys ? 1 : 2;  // of a stage by each warp

  struct Shared {
    alignas(1024) char q[2][kBytes];  // 64 rows each; then dq
    char dout[2][kBytes];
    char k[kStages][2][kBytes], v[kStages][2][kBytes];
    uint4 mask[kStages][kTile];
    float lse[kTile], delta[kTile];
    UnionUnit unit;
    int units, last, met;  // units of all blocks; tile after theirs; pieces of this block before this unit
    Barrier stay, loaded[kStages], released[kStages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

// dq is always of use.
__device__ inline bool is_idle(UnionBackwardLaunch const& a, bool of_keys) {
  return __syncthreads_or(threadIdx.x == 0 && (*static_cast<int volatile*>(a.redo) != 0 ||
                                               (of_keys && *static_cast<int volatile*>(a.full) != 0)));
}

// A warpgroup copies the keys and values of the tile, 128 at a time.
template <class Traits>
__device__ void gather_backward(typename Traits::Shared& shared, UnionBackwardLaunch const& a, int thread) {
  using T = typename Traits::T;
  constexpr int kStages = Traits::kStages;
  Unions const& unions = a.unions;
  UnionUnit const& unit = shared.unit;  // stays there: a loader has few registers
  int const lane = thread % kWarp, half = thread / kTileSide, first = thread % kTileSide - lane;
  auto const key_of = [&](int i) {
    int const at = (unit.first + i) * kTile + thread;
    return at < unit.size ? unions.keys[unit.tile * unions.capacity + at] : -1;
  };
  int next = key_of(0);
  for (int i = 0; i < unit.last - unit.first; ++i) {
    int const now = shared.met + i, stage = now % kStages, key = next;
    Barrier& loaded = shared.loaded[stage];
    if (now >= kStages) shared.released[stage].wait((now / kStages - 1) & 1);
    if (thread == 0) {
      uint32_t const bytes = (Traits::kKeys ? kTile : unions.queries) * sizeof(uint4);
      loaded.arrive_expecting(bytes);
      load_bytes(shared.mask[stage],
                 Traits::kKeys ? a.key_bits + unit.tile * unions.capacity + (unit.first + i) * kTile
                               : unions.bits + unions.bits_of(unit.tile, i),
                 bytes, loaded);
    }
    for (int which = 0; which < 2; ++which) {
      Heads const& x = which == 0 ? a.p.k : a.p.v;
      gather_rows<Traits::kDim, kTileBytes, Traits::kUnroll>(
          which == 0 ? shared.k[stage][half] : shared.v[stage][half], first,
          portable::row_of<T const>(x, unit.row, 0, unit.key_head), x.token, key, lane);
    }
    arrive_when_copied(loaded);
    next = key_of(i + 1);
  }
}

// A thread's fragments of 64 keys to rows of `share`, 2 kDim apart. Returns whether they are finite.
template <int kDim>
__device__ __forceinline__ bool store_share(float const (&x)[kDim / 2], float factor, float* share, int row,
                                            int lane) {
  bool finite = true;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const to = share + int64_t{row + 8 * half} * 2 * kDim + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      float2 const pair = {x[4 * n + 2 * half] * factor, x[4 * n + 2 * half + 1] * factor};
      finite &= fabsf(pair.x) < INFINITY && fabsf(pair.y) < INFINITY;
      *reinterpret_cast<float2*>(to + 8 * n) = pair;
    }
  }
  return finite;
}

template <class Traits>
__device__ void differentiate_union(typename Traits::Shared& shared, UnionBackwardLaunch const& a,
                                    UnionMaps const& maps, int turn, int group, int thread) {
  constexpr int kDim = Traits::kDim, kStages = Traits::kStages;
  constexpr bool kKeys = Traits::kKeys;
  UnionUnit const& unit = shared.unit;
  int const warp = thread / kWarp, lane = thread % kWarp, row = group * kTileSide + 16 * warp + lane / 4;
  float const scale = a.p.scale * portable::kLog2E;
  int const mask_rows[2] = {kKeys ? row : row / unit.heads, kKeys ? row + 8 : (row + 8) / unit.heads};
  int const count = unit.last - unit.first, met = shared.met;
  bool finite = true;
  Gradients<typename Traits::T, kDim, kKeys> g;
  g.clear();
  shared.stay.wait(turn & 1);
  auto const wait_for = [&](int now) {
    shared.loaded[now % kStages].wait((now / kStages) & 1);
    fence_async_shared();
  };
  auto const word_of = [&](int stage, int half) {
    return reinterpret_cast<uint32_t const*>(shared.mask[stage] + mask_rows[half])[lane % 4];
  };
  if constexpr (kKeys) {
    int64_t const piece = kTile * 2 * kDim;
    float* share = a.shares + (int64_t{unit.start + unit.first} * a.p.key_heads + unit.key_head) * piece;
    for (int i = 0; i < count; ++i, share += a.p.key_heads * piece) {
      int const stage = (met + i) % kStages;
      wait_for(met + i);
      char const *const k = shared.k[stage][group], *const v = shared.v[stage][group];
      uint32_t const words[2] = {word_of(stage, 0), word_of(stage, 1)};
      g.clear();
      g.add(k, v, shared.q[0], shared.dout[0], words, shared.lse, shared.delta, scale, lane, [] {});
      uint32_t const others[2] = {words[0] >> 16, words[1] >> 16};
      g.add(k, v, shared.q[1], shared.dout[1], others, shared.lse + kStep, shared.delta + kStep, scale, lane,
            [] {});
      g.finish();
      if (lane == 0) shared.released[stage].arrive();
      finite &= store_share<kDim>(g.sum, a.p.scale, share, row, lane);
      finite &= store_share<kDim>(g.values, 1.f, share + kDim, row, lane);
    }
  } else {
    float const row_lse[2] = {shared.lse[row], shared.lse[row + 8]};
    float const row_delta[2] = {shared.delta[row], shared.delta[row + 8]};
    if (count > 0) {  // else copies of the sums come before the end of the products (ptxas C7515)
      for (int u = 0; u < 2 * count; ++u) {
        int const now = met + u / 2, half = u % 2, stage = now % kStages;
        wait_for(now);
        uint32_t const words[2] = {word_of(stage, 0) >> (16 * half), word_of(stage, 1) >> (16 * half)};
        g.add(shared.q[group], shared.dout[group], shared.k[stage][half], shared.v[stage][half], words,
              row_lse, row_delta, scale, lane, [&] {
                if (u > 0 && lane == 0) shared.released[(met + (u - 1) / 2) % kStages].arrive();
              });
      }
      g.finish();
      if (lane == 0) shared.released[(met + count - 1) % kStages].arrive();
    }
#pragma unroll
    for (float& x : g.sum) {
      finite &= fabsf(x) < INFINITY;
      x *= a.p.scale;
    }
    store_fragments<typename Traits::T, kDim, kTileBytes>(shared.q[group], g.sum, warp, lane);
    fence_async_shared();
    named_barrier(1 + group, kWarpgroup);
    if (thread == 0) {
      int const token = unit.token + group * kTileSide / unit.heads;
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        store_tile(maps.dq, shared.q[group] + c * kTileBytes, c * kTileSide, unit.head, token, unit.row);
      }
      wait_stores_read();
    }
  }
  if (!finite) *a.redo = 1;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    union_backward_kernel(__grid_constant__ UnionBackwardLaunch const a,
                          __grid_constant__ UnionMaps const maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  if (is_idle(a, Traits::kKeys)) return;
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    shared.stay.init(1);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      shared.loaded[stage].init(1 + kWarpgroup);
      shared.released[stage].init(Traits::kReleases * Traits::kConsumers * kWarpgroup / kWarp);
    }
    fence_barrier_init();
  }
  UnionUnit const& unit = shared.unit;
  if (threadIdx.x == 0) {
    int first = 0, last = static_cast<int>(a.unions.tiles);
    if constexpr (Traits::kKeys) {
      Band const band(a);
      first = band.first;
      last = band.last;
    }
    shared.units = static_cast<int>((last - first) * a.p.key_heads * (Traits::kKeys ? 1 : a.p.batch));
    shared.last = last;
    shared.met = 0;
    shared.unit.last = shared.unit.first = 0;
  }
  __syncthreads();
  if (group == Traits::kConsumers) {
    shrink_registers<Traits::kLoadRegisters>();
    for (int u = blockIdx.x; u < shared.units; u += gridDim.x) {
      named_barrier(0, Traits::kThreads);
      named_barrier(0, Traits::kThreads);
      if (thread == 0) {
        shared.stay.arrive_expecting(4 * Traits::kBytes);
        for (int half = 0; half < 2; ++half) {
          int const first = unit.token + half * kTileSide / unit.heads;
          load_columns<Traits::kColumns, kTileBytes>(shared.q[half], maps.q, unit.head, first, unit.row,
                                                     shared.stay);
          load_columns<Traits::kColumns, kTileBytes>(shared.dout[half], maps.dout, unit.head, first, unit.row,
                                                     shared.stay);
        }
      }
      gather_backward<Traits>(shared, a, thread);
      named_barrier(0, Traits::kThreads);
    }
  } else {
    grow_registers<Traits::kRegisters>();
    int turn = 0;
    for (int u = blockIdx.x; u < shared.units; u += gridDim.x, ++turn) {
      if (threadIdx.x == 0) {
        shared.met += max(unit.last - unit.first, 0);
        shared.unit = UnionUnit::of<Traits::kKeys>(a, u, shared.last);
      }
      named_barrier(0, Traits::kThreads);
      if (group == 0) {
        int const head = unit.head + thread % unit.heads;
        int64_t const at = (unit.row * a.p.query_heads + head) * a.tokens + unit.token + thread / unit.heads;
        shared.lse[thread] = a.lse[at];
        shared.delta[thread] = a.delta[at];
      }
      named_barrier(0, Traits::kThreads);
      differentiate_union<Traits>(shared, a, maps, turn, group, thread);
      named_barrier(0, Traits::kThreads);
    }
  }
}

// starts and firsts of a batch row, a block each.
inline constexpr int kStartThreads = 1024;
__global__ void __launch_bounds__(kStartThreads) start_kernel(__grid_constant__ UnionBackwardLaunch const a) {
  __shared__ int sums[kStartThreads / kWarp];
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t const row = blockIdx.x, tiles = a.unions.tiles;
  int* const starts = a.starts + row * (tiles + 1);
  int* const firsts = a.firsts + row * (a.bands + 1);
  for (int64_t i = threadIdx.x; i <= a.bands; i += kStartThreads) firsts[i] = static_cast<int>(tiles);
  __syncthreads();
  int64_t total = 0;
  for (int64_t begin = 0; begin < tiles; begin += kStartThreads) {
    int64_t const tile = begin + threadIdx.x;
    int const own = tile < tiles ? (a.unions.sizes[a.unions.tile(row, tile)] + kTile - 1) / kTile : 0;
    int sum = own;
    for (int d = 1; d < kWarp; d *= 2) {
      int const before = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += before;
    }
    if (lane == kWarp - 1) sums[warp] = sum;
    __syncthreads();
    int64_t last = total + sum;
    for (int w = 0; w < kStartThreads / kWarp; ++w) {
      if (w < warp) last += sums[w];
      total += sums[w];
    }
    if (tile < tiles) {
      starts[tile] = static_cast<int>(last - own);
      for (int64_t i = portable::ceil_div(last - own, a.band); i * a.band < last && i <= a.bands; ++i)
        firsts[i] = static_cast<int>(tile);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    starts[tiles] = static_cast<int>(total);
    if (total > a.most) *a.full = 1;
  }
}

inline constexpr int kAddThreads = 1024;

// Adds a band's shares of dk and dv, in the order of its pieces, to what the bands before gave; the last
// band's sums are the results. A block takes a word's 32 keys of one key head, a warp each.
template <class T, int kDim>
__global__ void __launch_bounds__(kAddThreads, 1) add_shares(__grid_constant__ UnionBackwardLaunch const a) {
  constexpr int kEach = 2 * kDim / kWarp, kWarps = kAddThreads / kWarp, kBatch = 4;
  static_assert(kWarps == kWarp);
  struct alignas(16) Part {
    float x[kEach];
  };
  struct Entry {
    uint2 word;
    int start;  // of the tile, in the band
  };
  __shared__ Entry entries[kAddThreads];
  __shared__ int warp_sums[kWarps];
  if (is_idle(a, true)) return;
  AttentionBackwardParams const& p = a.p;
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int const* const starts = a.starts + a.row * (a.unions.tiles + 1);
  Band const band(a);
  if (band.begin >= band.total && !band.is_first) return;
  for (int64_t unit = blockIdx.x; unit < a.unions.word_count * p.key_heads; unit += gridDim.x) {
    int64_t const number = unit / p.key_heads, key_head = unit % p.key_heads;
    Part sum = {};
    bool touched = false;
    for (int tile = band.first; tile < band.last; tile += kAddThreads) {
      int const own = tile + threadIdx.x;
      uint2 const word = own < band.last
                             ? a.unions.words[a.unions.tile(a.row, own) * a.unions.word_count + number]
                             : uint2{};
      uint32_t const ballot = __ballot_sync(0xffffffffu, word.x != 0);
      __syncthreads();  // the last round's entries are done with
      if (lane == 0) warp_sums[warp] = __popc(ballot);
      __syncthreads();
      int const before = warp_sums[lane];
      int const found = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(before)));
      int const at = static_cast<int>(__reduce_add_sync(0xffffffffu, lane < warp ? before : 0u)) +
                     __popc(ballot & ((1u << lane) - 1));
      if (word.x != 0) entries[at] = {word, starts[own] - band.begin};
      __syncthreads();
      touched |= found > 0;
      for (int first = 0; first < found; first += kWarp) {
        Entry const e = first + lane < found ? entries[first + lane] : Entry{};
        int const rank = e.word.y + __popc(e.word.x & ((1u << warp) - 1)), piece = e.start + rank / kTile;
        int64_t const from = (piece * p.key_heads + key_head) * kTile + rank % kTile;
        uint32_t left =
            __ballot_sync(0xffffffffu, (e.word.x >> warp & 1) != 0 && piece >= 0 && piece < a.band);
        while (left != 0) {
          Part parts[kBatch] = {};
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            int64_t const share = __shfl_sync(0xffffffffu, from, left == 0 ? 0 : __ffs(left) - 1);
            if (left != 0) parts[b] = *(reinterpret_cast<Part const*>(a.shares + share * 2 * kDim) + lane);
            left &= left - 1;
          }
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
#pragma unroll
            for (int i = 0; i < kEach; ++i) sum.x[i] += parts[b].x[i];
          }
        }
      }
    }
    int64_t const key = number * kWarp + warp;
    if (key >= p.keys) continue;
    auto* const kept = reinterpret_cast<Part*>(a.sums + (key * p.key_heads + key_head) * 2 * kDim) + lane;
    if (!band.is_first && (touched || band.is_last)) {
      Part const so_far = *kept;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum.x[i] += so_far.x[i];
    }
    if (!band.is_last) {
      if (band.is_first || touched) *kept = sum;
      continue;
    }
    T* const to = portable::row_of<T>(lane < kWarp / 2 ? p.dk : p.dv, a.row, key, key_head) +
                  lane % (kWarp / 2) * kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[i] = from_float<T>(sum.x[i]);
  }
}

}  // namespace lt2::dsa::sm90
