// Third launch of the backward pass: everything that is left of a chunk once S, dS, r and rho are known. With
// U = b o r, dY = b o rho, M = K K^T and hats for normalised rows:
//   dP_ij = scale E_ij dO_i.U_j  (i >= j)          dM_ij = -E_ij dY_i.U_j  (i > j)
//   dQ^ = scale e^G dO S^T + dP K^                 dbeta_i = rho_i.r_i
//   dK^ = -e^G dY S^T + e^(G_last - G) U dS^T + dP^T Q^ + (dM + dM^T) K^
// dL/dg_m is what of the loss passes token m: from the chunk's start to tokens i >= m, from tokens j < m to
// its end, from j < m to i >= m, and from start to end; each is a sum of terms that carry the decay
// themselves.
//
// dV = dY, too: until here rho was in its place. Blocks stay and take (chunk, query/key head) after another.
// Four warpgroups compute, see Side; one thread of a fifth loads: slices of 64 value columns, kSliceStages
// ahead.
#pragma once

#include "gdn/cuda/sm90/backward_scan.cuh"

namespace lt2::gdn::sm90::backward_pass {

// kFollows: in the same grid as the scan.
template <class T_, int kKeyDim_, bool kFollows_>
struct GradientTraits {
  using T = T_;
  static constexpr bool kFollows = kFollows_;
  static constexpr int kKeyDim = kKeyDim_, kKeyTiles = key_tiles(kKeyDim);
  static_assert(kKeyTiles <= 2);
  static constexpr int kGroups = 4;                                 // warpgroups that compute
  static constexpr int kColumns = kKeyTiles == 1 ? 32 : kTileSide;  // of each, padded with zeros
  static constexpr int kWorkers = kGroups * kWarpgroup, kThreads = kWorkers + kWarpgroup;
  // Of 96 at launch.
  static constexpr int kLoadRegisters = kFollows ? 40 : 32, kQueryRegisters = 120,
                       kKeyRegisters = kFollows ? 96 : 104;
  static constexpr int kKeyStages = 2, kSliceStages = 2;
  static constexpr int kScalarStages = kSliceStages + 1;  // value heads that can be under way

  struct Keys {
    char k[kKeyTiles * kTileBytes], q[kKeyTiles * kTileBytes];
  };
  struct alignas(1024) Slice {
    ForwardRecord<kKeyTiles> forward;
    ReverseRecord<kKeyTiles> reverse;
    char rho[kTileBytes], dout[kTileBytes];
    ForwardUnits forward_units;
    ReverseUnits reverse_units;
    static constexpr uint32_t kBytes = sizeof(forward) + sizeof(reverse) + sizeof(rho) + sizeof(dout) +
                                       sizeof(forward_units) + sizeof(reverse_units);
  };
  struct Shared {
    alignas(1024) Keys keys[kKeyStages];
    Slice slices[kSliceStages];
    alignas(1024) char dscores[kTileBytes], dgram[kTileBytes];  // dP and dM, times the norms of both rows
    ChunkScalars scalars[kScalarStages];
    float from_start[kGroups][kChunk], to_end[2][kChunk];  // parts of rows' sums
    float crossing_rows[2][kChunk], crossing_columns[2][4][kChunk];
    float dbeta[kChunk];
    int zero;
    float through[kGroups * 4];
    float norm_dots[kGroups][kChunk];
    struct {
      TileTokens tokens;  // none: there is no more work
      int qk_head;
    } work[kKeyStages];
    Barrier keys_loaded[kKeyStages], keys_released[kKeyStages];
    Barrier slice_loaded[kSliceStages], slice_released[kSliceStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= 227 * 1024);
};

inline constexpr int kWorkersBarrier = 1;

// A chunk: whose it is and which.
struct Place {
  TileTokens tokens;  // none: no chunk has this number
  int64_t sequence;
  int chunk, chunks;
};

__device__ inline Place find_place(Inputs const& p, int64_t number) {
  int64_t low = 0, high = p.sequences;
  while (high - low > 1) {
    int64_t const middle = (low + high) / 2;
    (portable::first_chunk(p, middle) <= number ? low : high) = middle;
  }
  portable::Sequence const s = portable::sequence(p, low);
  int const chunks = static_cast<int>((s.length + kChunk - 1) / kChunk);
  int64_t const chunk = number - portable::first_chunk(p, low);
  if (chunk < 0 || chunk >= chunks) return {{0, 0, 0}, 0, 0, 0};
  int const offset = static_cast<int>(chunk) * kChunk;
  return {{static_cast<int>(s.row), static_cast<int>(s.begin) + offset,
           min(static_cast<int>(s.length) - offset, kChunk)},
          low,
          static_cast<int>(chunk),
          chunks};
}

// f(place, chunk number, query/key head) for all work of this block. Behind a running scan the blocks take
// what is next, from the middle of the sequences outwards: that is the order in which both directions have
// passed.
template <bool kFollows, class F>
__device__ void for_work(BackwardLaunch const& a, F const& f) {
  int const H = a.p.heads;
  if constexpr (kFollows) {
    bool const dense = a.p.cu_seqlens == nullptr;
    int const chunks = static_cast<int>(dense ? portable::ceil_div(a.p.tokens, kChunk) : a.chunk_numbers);
    int const units = dense ? static_cast<int>(a.p.sequences) * H : H;
    for (;;) {
      int const taken = atomicAdd(a.w.progress, 1);
      if (taken >= chunks * units) return;
      int const step = taken / units, unit = taken % units;
      int const chunk = step % 2 == 0 ? chunks / 2 + step / 2 : chunks / 2 - (step + 1) / 2;
      int64_t const number = dense ? portable::first_chunk(a.p, unit / H) + chunk : chunk;
      Place const place = find_place(a.p, number);
      if (place.tokens.count > 0) f(place, number, unit % H);
    }
  } else {
    int const items = static_cast<int>(a.chunk_numbers) * H;  // prepare_kernel has more blocks
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      Place const place = find_place(a.p, item / H);
      if (place.tokens.count > 0) f(place, item / H, item % H);
    }
  }
}

// Until the scan has left `chunks` chunks; then what it left may be copied.
__device__ inline void await_chunks(int const* announced, int chunks) {
  for (;;) {
    int now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(announced) : "memory");
    if (now >= chunks) break;
    __nanosleep(500);
  }
  asm volatile("fence.proxy.async;" ::: "memory");
}

// A ring's position: slot and parity of the barriers.
template <int kStages>
struct Ring {
  int count = 0;

  __device__ int slot() const { return count % kStages; }
  __device__ int parity() const { return count / kStages & 1; }
  __device__ void advance() { ++count; }
};

// One thread.
template <class Traits>
__device__ void load_work(typename Traits::Shared& shared, BackwardLaunch const& a,
                          BackwardMaps const& maps) {
  using T = typename Traits::T;
  int const heads = a.p.value_heads / a.p.heads, slices = a.p.value_dim / kTileSide;
  Ring<Traits::kKeyStages> keys;
  Ring<Traits::kSliceStages> ring;
  int scalars = 0;
  for_work<Traits::kFollows>(a, [&](Place const& place, int64_t number, int qk_head) {
    TileTokens const& c = place.tokens;
    Barrier& keys_loaded = shared.keys_loaded[keys.slot()];
    shared.keys_released[keys.slot()].wait(keys.parity() ^ 1);
    shared.work[keys.slot()] = {c, qk_head};
    keys_loaded.arrive_expecting(sizeof(typename Traits::Keys));
    request_tiles<Traits::kKeyTiles>(shared.keys[keys.slot()].k, maps.k, 0, qk_head, c, keys_loaded);
    request_tiles<Traits::kKeyTiles>(shared.keys[keys.slot()].q, maps.q, 0, qk_head, c, keys_loaded);
    keys.advance();
    // Slices of the value heads follow each other, in what the scan left and in what it announces.
    int64_t const index = number * a.p.value_heads + qk_head * heads;
    int64_t at = index * slices;
    auto const* record = a.w.record(index);
    int const* announced =
        a.w.progress + progress_index(a.p, false, place.sequence * a.p.value_heads + qk_head * heads, 0);
    for (int head = qk_head * heads; head < (qk_head + 1) * heads; ++head, ++record) {
      for (int slice = 0; slice < slices; ++slice, ++at, ++announced) {
        typename Traits::Slice& to = shared.slices[ring.slot()];
        Barrier& loaded = shared.slice_loaded[ring.slot()];
        shared.slice_released[ring.slot()].wait(ring.parity() ^ 1);
        if constexpr (Traits::kFollows) {
          await_chunks(announced, place.chunk + 1);
          await_chunks(announced + a.p.sequences * a.p.value_heads * slices, place.chunks - place.chunk);
        }
        loaded.arrive_expecting(Traits::Slice::kBytes + (slice == 0 ? kScalarBytes : 0));
        load_bytes(&to.forward, a.w.forward + at * sizeof(to.forward), sizeof(to.forward), loaded);
        load_bytes(&to.reverse, a.w.reverse + at * sizeof(to.reverse), sizeof(to.reverse), loaded);
        load_bytes(&to.forward_units, a.w.forward_units + at, sizeof(ForwardUnits), loaded);
        load_bytes(&to.reverse_units, a.w.reverse_units + at, sizeof(ReverseUnits), loaded);
        request_tiles<1>(to.rho, maps.dv, slice * kTileSide, head, c, loaded);
        request_tiles<1>(to.dout, maps.dout, slice * kTileSide, head, c, loaded);
        if (slice == 0) load_bytes(&shared.scalars[scalars], &record->scalars, kScalarBytes, loaded);
        ring.advance();
      }
      scalars = scalars + 1 == Traits::kScalarStages ? 0 : scalars + 1;
    }
  });
  shared.keys_released[keys.slot()].wait(keys.parity() ^ 1);
  shared.work[keys.slot()].tokens.count = 0;
  shared.keys_loaded[keys.slot()].arrive();
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// f(i, element, pair) for pairs of columns of [64 x kN] accumulators, rows lane / 4 + 8 i of a warp's: the
// pair of a tile that belongs to elements `element`, + 1, columns from `first` on.
template <class T, int kN, class F>
__device__ __forceinline__ void for_pairs(char const* tile, int first, int warp, int lane, F const& f) {
  uint32_t const address = row_address(tile, first, warp, lane);
#pragma unroll
  for (int n = 0; n < kN / 8; n += 2) {
    uint32_t x[4];
    load_matrices(x, address ^ n << 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) f(j % 2, 4 * (n + j / 2) + 2 * (j % 2), unpack<T>(x[j]));
  }
}

// Sums of eight values over the lanes that agree in l % 4: lane l gets that of x[l / 4].
__device__ __forceinline__ float sum_columns(float (&x)[8], int lane) {
#pragma unroll
  for (int kept = 4; kept > 0; kept /= 2) {
    bool const upper = lane & 4 * kept;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      float const away = upper ? x[i] : x[kept + i];
      x[i] = (upper ? x[kept + i] : x[i]) + __shfl_xor_sync(0xffffffffu, away, 4 * kept);
    }
  }
  return x[0];
}

// d [16 x 8] += a [16 x 16] b [16 x 8], in fp16.
__device__ __forceinline__ void mma_fp16(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A thread's part of the dot product of two [64 x kTiles 64] matrices in fp16, by four warpgroups: diagonals
// of products, which cost less than 8192 conversions. A warp has 16 rows and 16 kTiles columns.
template <int kTiles>
__device__ __forceinline__ float dot_of_states(char const* a, char const* b, int group, int thread) {
  int const warp = thread / 32, lane = thread % 32;
  int const row = warp * 16 + lane % 16, chunk = group * 2 + lane / 16;
  float upper[4] = {}, lower[4] = {};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    uint32_t x[4], y[4];
    load_matrices(x, shared_address(a) + tile * kTileBytes + tile_offset(row, chunk));
    load_matrices(y, shared_address(b) + tile * kTileBytes + tile_offset(row, chunk));
    mma_fp16(upper, x, y[0], y[2]);
    mma_fp16(lower, x, y[1], y[3]);
  }
  // Of the 8 x 8 corner, lane l holds row l / 4, columns 2 (l % 4) and + 1.
  float const even = upper[0] + lower[2], odd = upper[1] + lower[3];
  return lane / 4 / 2 == lane % 4 ? (lane / 4 % 2 == 0 ? even : odd) : 0.f;
}

// 8 elements times `factor`, in another type.
template <class From, class To>
__device__ __forceinline__ void convert(uint4& x, float factor) {
  auto const pair = [&](uint32_t& y) {
    float2 const z = unpack<From>(y);
    y = pack<To>(factor * z.x, factor * z.y);
  };
  pair(x.x);
  pair(x.y);
  pair(x.z);
  pair(x.w);
}

// dg and dbeta of a chunk, by one warp: lane l has tokens 2 l and 2 l + 1.
template <class Traits>
__device__ void store_scalars(typename Traits::Shared const& shared, ChunkScalars const& scalars,
                              BackwardParams const& p, TileTokens const& c, int head, int lane) {
  if (p.dbeta.data != nullptr) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int const i = 2 * lane + j;
      if (i >= c.count) continue;
      float x = shared.dbeta[i];
      if (p.beta_sigmoid) {
        float const raw = *portable::token_row<float const>(p.beta, c.row, c.begin + i, head);
        float const b = __fdividef(1.f, 1.f + expf(-raw));  // without the call that a division is
        x *= b * (1.f - b) * (p.neg_eigval ? 2.f : 1.f);
      }
      *portable::token_row<float>(p.dbeta, c.row, c.begin + i, head) = x;
    }
  }
  if (p.dg.data == nullptr) return;
  float after[2], before[2];  // sums from a token on; sums until before a token
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int const i = 2 * lane + j;
    after[j] = shared.crossing_rows[0][i] + shared.crossing_rows[1][i];
    float columns = 0.f;
#pragma unroll
    for (int w = 0; w < 8; ++w) columns += shared.crossing_columns[w / 4][w % 4][i];
    after[j] -= columns;
#pragma unroll
    for (int group = 0; group < Traits::kGroups; ++group) after[j] += shared.from_start[group][i];
    before[j] = shared.to_end[0][i] + shared.to_end[1][i];
  }
  float through = 0.f;
#pragma unroll
  for (int w = 0; w < Traits::kGroups * 4; ++w) through += shared.through[w];
  through *= scalars.decay;
  float suffix = after[0] + after[1], prefix = before[0] + before[1];
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float const next = __shfl_down_sync(0xffffffffu, suffix, d),
                previous = __shfl_up_sync(0xffffffffu, prefix, d);
    if (lane + d < 32) suffix += next;
    if (lane >= d) prefix += previous;
  }
  float const earlier = __shfl_up_sync(0xffffffffu, prefix, 1),
              later = __shfl_down_sync(0xffffffffu, suffix, 1);
  float const start = lane > 0 ? earlier : 0.f, end = lane < 31 ? later : 0.f;
  float const dg[2] = {through + start + suffix, through + (start + before[0]) + (after[1] + end)};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int const i = 2 * lane + j;
    if (i >= c.count) continue;
    float const decay = scalars.log2_decay[i] - (i > 0 ? scalars.log2_decay[i - 1] : 0.f);
    // Nothing passes a reset; the sums above leave a rounding error there.
    *portable::token_row<float>(p.dg, c.row, c.begin + i, head) = decay < kLeastLog2Decay + 1.f ? 0.f : dg[j];
  }
}

// What follows from a thread's number is cheaper to compute again than to keep: x, in a way that no compiler
// sees through.
__device__ __forceinline__ int forget(int x, int const& zero) {
  int y;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(y) : "r"(shared_address(&zero)));
  return x + y;
}

// Two warpgroups have dq, and dP or dM; two have dk. Of each, one half of the columns.
enum class Side { kQueries, kKeys };

// What 1 stands for in accumulators: a product, which alone might not be a float.
struct Units {
  float first, second;

  // What brings accumulators in these units to `now`.
  __device__ float to(Units const& now) const {
    return first * inverse(now.first) * (second * inverse(now.second));
  }
};

template <class Traits, Side kSide>
__device__ void compute_work(typename Traits::Shared& shared, BackwardLaunch const& a, int half,
                             int const own_thread) {
  using T = typename Traits::T;
  constexpr int kKeyTiles = Traits::kKeyTiles, kN = Traits::kColumns;
  constexpr bool kKeys = kSide == Side::kKeys;
  int const heads = a.p.value_heads / a.p.heads, slices = a.p.value_dim / kTileSide;
  int const group = 2 * kKeys + half;
  int const tile = kN == kTileSide ? half * kTileBytes : 0;  // of its columns, and where in it
  int const first = kN == kTileSide ? 0 : half * kN;
  uint64_t const first_step = first / 8;
  Ring<Traits::kKeyStages> keys;
  Ring<Traits::kSliceStages> ring;
  int scalar_slot = 0;

  for (;; keys.advance()) {
    char* const k = shared.keys[keys.slot()].k;
    char* const q = shared.keys[keys.slot()].q;
    char* const own = (kKeys ? k : q) + tile;
    shared.keys_loaded[keys.slot()].wait(keys.parity());
    auto const& work = shared.work[keys.slot()];
    TileTokens const& c = work.tokens;
    if (c.count == 0) break;
    if (c.count < kChunk) {
      if (half == 0) clear_tail<kKeyTiles>(kKeys ? k : q, c.count, own_thread);
      named_barrier(kWorkersBarrier, Traits::kWorkers);
    }
    for (int h = 0; h < heads; ++h) {
      ChunkScalars const& s = shared.scalars[scalar_slot];
      // dq or dk through S; then dO U^T or dV U^T, or dk through dS.
      float d[kN / 2], more[kKeys ? kN / 2 : kChunk / 2];
      float through = 0.f;
      Units d_units, more_units;
      for (int slice = 0; slice < slices; ++slice) {
        int const thread = forget(own_thread, shared.zero);
        typename Traits::Slice& x = shared.slices[ring.slot()];
        shared.slice_loaded[ring.slot()].wait(ring.parity());
        float const state_unit = x.forward_units.state, dstate_unit = x.reverse_units.dstate;
        float const r_unit = x.forward_units.r, rho_unit = x.reverse_units.rho;
        float const dout_unit = x.reverse_units.dout;
        // dO in fp16 as well; dV takes the place of rho in global memory. The rows that follow the sequence
        // are zero.
        static_assert(Traits::kWorkers == kChunk * 8);
        {
          int const e = group * kWarpgroup + thread, row = e / 8, offset = tile_offset(row, e % 8);
          auto* const y = reinterpret_cast<uint4*>(x.dout + offset);
          auto* const rho = reinterpret_cast<uint4*>(x.rho + offset);
          if (row >= c.count) {
            *y = uint4{};
            *rho = uint4{};
          } else {
            convert<T, __half>(*y, inverse(dout_unit));
            uint4 dv = *rho;
            convert<__half, T>(dv, s.strength[row] * rho_unit);
            T* const to = portable::token_row<T>(a.p.dv, c.row, c.begin + row, work.qk_head * heads + h);
            *reinterpret_cast<uint4*>(to + slice * kTileSide + e % 8 * 8) = dv;
          }
        }
        fence_async_shared();
        bool const of_rho = kKeys || half == 1;
        Units const d_now{kKeys ? rho_unit : dout_unit, state_unit};
        Units const more_now{kKeys ? dstate_unit : of_rho ? rho_unit : dout_unit, r_unit};
        if (slice > 0) {
          scale_all(d, d_units.to(d_now));
          scale_all(more, more_units.to(more_now));
        }
        d_units = d_now;
        more_units = more_now;
        named_barrier(kWorkersBarrier, Traits::kWorkers);
        uint64_t const dout = k_major(x.dout), rho = k_major(x.rho), r = k_major(x.forward.r);
        uint64_t const state = row_major(x.forward.state + tile) + first_step;
        uint64_t const dstate = row_major(x.reverse.dstate + tile) + first_step;
        uint64_t const left = of_rho ? rho : dout;
        bool const add = slice > 0;
        pin(d);
        pin(more);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < kTileSide / 16; ++j) {
          if constexpr (kKeys) {
            wgmma<__half, kN, Major::MN>(d, rho + k_step(j), state + j * kRowStep, add || j > 0);
            wgmma<__half, kN, Major::MN>(more, r + k_step(j), dstate + j * kRowStep, add || j > 0);
          } else {
            wgmma<__half, kN, Major::MN>(d, dout + k_step(j), state + j * kRowStep, add || j > 0);
            wgmma<__half, kChunk>(more, left + k_step(j), r + k_step(j), add || j > 0);
          }
        }
        wgmma_commit();
        float const sum = dot_of_states<kKeyTiles>(x.forward.state, x.reverse.dstate, group, thread);
        through += state_unit * (dstate_unit * sum);
        wgmma_wait<0>();
        pin(d);
        pin(more);
        shared.slice_released[ring.slot()].arrive();
        ring.advance();
      }

      // Row dots of what goes through S and dS, for dg; then dq or dk of these, times the row's norm.
      {
        int const thread = forget(own_thread, shared.zero), warp = thread / 32, lane = thread % 32;
        through = lane_sum(through);
        if (lane == 0) shared.through[group * 4 + warp] = through;
        float from_start[2] = {}, to_end[2] = {}, factor[2], more_factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int const row = warp * 16 + lane / 4 + 8 * i;
          float const b = s.strength[row];
          factor[i] = (kKeys ? -s.k_in[row] * b : s.q_in[row]) * d_units.first * d_units.second;
          if constexpr (kKeys) more_factor[i] = s.k_out[row] * b * more_units.first * more_units.second;
        }
        for_pairs<T, kN>(own, first, warp, lane, [&](int i, int e, float2 x) {
          d[e] *= factor[i];
          d[e + 1] *= factor[i];
          from_start[i] += d[e] * x.x + d[e + 1] * x.y;
          if constexpr (kKeys) {
            float const y = more_factor[i] * more[e], z = more_factor[i] * more[e + 1];
            to_end[i] += y * x.x + z * x.y;
            d[e] += y;
            d[e + 1] += z;
          }
        });
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int const row = warp * 16 + lane / 4 + 8 * i;
          float const start = lane_sum<4>(from_start[i]);
          if (lane % 4 == 0) shared.from_start[group][row] = start;
          if constexpr (kKeys) {
            float const end = lane_sum<4>(to_end[i]);
            if (lane % 4 == 0) shared.to_end[half][row] = end;
          }
        }
      }
      if constexpr (!kKeys) {
        float rows[2] = {}, diagonal[2];
        auto const& now = shared.keys[forget(keys.slot(), shared.zero)];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          // Of q and k, or of k and k; half of the columns at a time, for want of registers.
          float products[kChunk / 4];
          multiply_rows<T, Traits::kKeyDim>(products, half == 0 ? now.q : now.k,
                                            now.k + part * kTileBytes / 2);
          int const thread = forget(own_thread, shared.zero), warp = thread / 32, lane = thread % 32;
          int const row = warp * 16 + lane / 4;
          float const unit = more_units.first * more_units.second;
          float const g[2] = {s.log2_decay[row], s.log2_decay[row + 8]};
          float const factor[2] = {
              unit * (half == 0 ? a.p.scale * s.q_norm[row] : -s.strength[row] * s.k_norm[row]),
              unit * (half == 0 ? a.p.scale * s.q_norm[row + 8] : -s.strength[row + 8] * s.k_norm[row + 8])};
          float columns[kChunk / 8] = {};
#pragma unroll
          for (int n = 0; n < kChunk / 16; ++n) {
            int const block = part * kChunk / 16 + n, column = 8 * block + 2 * (lane % 4);
            auto const weigh = [&](auto crosses_diagonal) {
              float2 const gs = pair_at(s.log2_decay, column), b = pair_at(s.strength, column),
                           norm = pair_at(s.k_norm, column);
              float const by_column[2] = {b.x * norm.x, b.y * norm.y};
#pragma unroll
              for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  int const e = 4 * n + 2 * i + j;
                  float& x = more[part * kChunk / 4 + e];
                  float const weight = factor[i] * exp2_fast(g[i] - (j == 0 ? gs.x : gs.y)) * by_column[j];
                  if constexpr (decltype(crosses_diagonal)::value) {
                    int const ahead = column + j - (row + 8 * i);
                    if (ahead == 0) diagonal[i] = x;
                    // dP has a diagonal, which crosses no token.
                    float const crossing = ahead < 0 ? x * weight : 0.f;
                    x = ahead == 0 && half == 0 ? x * weight : crossing;
                    rows[i] += crossing * products[e];
                    columns[2 * n + j] += crossing * products[e];
                  } else {
                    x *= weight;
                    rows[i] += x * products[e];
                    columns[2 * n + j] += x * products[e];
                  }
                }
              }
            };
            if (block < 2 * warp) {  // left of the diagonal of a warp's 16 rows
              weigh(std::false_type{});
            } else {
              weigh(std::true_type{});
            }
          }
          float const sum = sum_columns(columns, lane);
          shared.crossing_columns[half][warp]
                                 [part * kChunk / 2 + lane / 8 * 8 + 2 * (lane % 4) + lane / 4 % 2] = sum;
        }
        int const thread = forget(own_thread, shared.zero), warp = thread / 32, lane = thread % 32;
        // The lane that has the diagonal element of a row.
        if (half == 1 && lane % 4 == lane / 8) {
          float const unit = more_units.first * more_units.second;
          shared.dbeta[warp * 16 + lane / 4] = unit * diagonal[0];
          shared.dbeta[warp * 16 + lane / 4 + 8] = unit * diagonal[1];
        }
        put_rows<T, kChunk>(more, half == 0 ? shared.dscores : shared.dgram, 0, warp, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float const sum = lane_sum<4>(rows[i]);
          if (lane % 4 == 0) shared.crossing_rows[half][warp * 16 + lane / 4 + 8 * i] = sum;
        }
      }
      fence_async_shared();
      named_barrier(kWorkersBarrier, Traits::kWorkers);
      {
        auto const& now = shared.keys[forget(keys.slot(), shared.zero)];
        uint64_t const dscores = k_major(shared.dscores), dscores_t = row_major(shared.dscores);
        uint64_t const dgram = k_major(shared.dgram), dgram_t = row_major(shared.dgram);
        uint64_t const k_rows = row_major(now.k + tile) + first_step,
                       q_rows = row_major(now.q + tile) + first_step;
        pin(d);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < kChunk / 16; ++j) {
          if constexpr (kKeys) {
            wgmma<T, kN, Major::MN, Major::MN>(d, dscores_t + j * kRowStep, q_rows + j * kRowStep, true);
            wgmma<T, kN, Major::MN>(d, dgram + k_step(j), k_rows + j * kRowStep, true);
            wgmma<T, kN, Major::MN, Major::MN>(d, dgram_t + j * kRowStep, k_rows + j * kRowStep, true);
          } else {
            wgmma<T, kN, Major::MN>(d, dscores + k_step(j), k_rows + j * kRowStep, true);
          }
        }
        wgmma_commit();
      }
      if (!kKeys && half == 1 && own_thread < 32)
        store_scalars<Traits>(shared, s, a.p, c, work.qk_head * heads + h, own_thread);
      wgmma_wait<0>();
      pin(d);
      // The sum over the value heads of a query/key head; each thread reads what it wrote.
      float* const partial =
          a.w.partial +
          ((int64_t{blockIdx.x} - a.first_block) * Traits::kGroups + group) * (kN / 2 * kWarpgroup) +
          own_thread;
      if (h > 0) {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) d[i] += partial[i * kWarpgroup];
      }
      if (h + 1 < heads) {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) partial[i * kWarpgroup] = d[i];
      } else {
        int const thread = forget(own_thread, shared.zero), warp = thread / 32, lane = thread % 32;
        // Through the norm: dx = n (dx^ - x^ (x^ . dx^)), where d is n dx^ already.
        if (a.p.qk_l2norm) {
          float dots[2] = {};
          for_pairs<T, kN>(own, first, warp, lane,
                           [&](int i, int e, float2 x) { dots[i] += d[e] * x.x + d[e + 1] * x.y; });
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float const x = lane_sum<4>(dots[i]);
            if (lane % 4 == 0) shared.norm_dots[group][warp * 16 + lane / 4 + 8 * i] = x;
          }
        }
        // Nobody reads q and k any more, but for the norms their own.
        named_barrier(kWorkersBarrier, Traits::kWorkers);
        if (a.p.qk_l2norm) {
          float along[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            int const row = warp * 16 + lane / 4 + 8 * i;
            float const norm = (kKeys ? s.k_norm : s.q_norm)[row];
            along[i] =
                (shared.norm_dots[2 * kKeys][row] + shared.norm_dots[2 * kKeys + 1][row]) * (norm * norm);
          }
          for_pairs<T, kN>(own, first, warp, lane, [&](int i, int e, float2 x) {
            d[e] -= along[i] * x.x;
            d[e + 1] -= along[i] * x.y;
          });
        }
        // The places of q and k take dq and dk. Only this warp has to do with its rows and columns.
        __syncwarp();
        put_rows<T, kN>(d, own, first, warp, lane);
        __syncwarp();
        gdn::Strided const& to = kKeys ? a.p.dk : a.p.dq;
        for (int e = lane; e < 16 * (kN / 8); e += 32) {
          int const row = warp * 16 + e / (kN / 8), chunk = first / 8 + e % (kN / 8);
          if (row >= c.count) break;
          int const column = tile / kTileBytes * kTileSide + chunk * 8;
          if (column >= Traits::kKeyDim) continue;
          *reinterpret_cast<uint4*>(portable::token_row<T>(to, c.row, c.begin + row, work.qk_head) + column) =
              *reinterpret_cast<uint4 const*>(own + tile_offset(row, chunk));
        }
        fence_async_shared();
        shared.keys_released[keys.slot()].arrive();
      }
      scalar_slot = scalar_slot + 1 == Traits::kScalarStages ? 0 : scalar_slot + 1;
    }
  }
}

template <class Traits>
__device__ void compute_gradients(char* dynamic_shared, BackwardLaunch const& a, BackwardMaps const& maps) {
  auto& shared = aligned_shared<typename Traits::Shared>(dynamic_shared);
  if (threadIdx.x == 0) {
    shared.zero = 0;
    for (int i = 0; i < Traits::kKeyStages; ++i) {
      shared.keys_loaded[i].init(1);
      shared.keys_released[i].init(Traits::kWorkers);
    }
    for (int i = 0; i < Traits::kSliceStages; ++i) {
      shared.slice_loaded[i].init(1);
      shared.slice_released[i].init(Traits::kWorkers);
    }
    fence_barrier_init();
  }
  __syncthreads();
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (group == Traits::kGroups) {
    shrink_registers<Traits::kLoadRegisters>();
    if (thread == 0) load_work<Traits>(shared, a, maps);
  } else if (group < 2) {
    grow_registers<Traits::kQueryRegisters>();
    compute_work<Traits, Side::kQueries>(shared, a, group, thread);
  } else {
    constexpr int kRegisters = Traits::kKeyRegisters;
    if constexpr (kRegisters > 96) {
      grow_registers<kRegisters>();
    } else {
      shrink_registers<kRegisters>();
    }
    compute_work<Traits, Side::kKeys>(shared, a, group - 2, thread);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    gradient_kernel(__grid_constant__ BackwardLaunch const a, __grid_constant__ BackwardMaps const maps) {
  extern __shared__ char dynamic_shared[];
  compute_gradients<Traits>(dynamic_shared, a, maps);
}

// The scan in the first blocks of a grid, gradients in the others, chunk by chunk as both directions have
// passed. The scan waits for nobody, and its blocks are there first.
template <class Scan, class Gradients>
__global__ void __launch_bounds__(Gradients::kThreads, 1)
    followed_scan_kernel(__grid_constant__ BackwardLaunch const a,
                         __grid_constant__ BackwardMaps const maps) {
  static_assert(Gradients::kThreads >= Scan::kThreads);
  extern __shared__ char dynamic_shared[];
  if (blockIdx.x >= a.first_block) {
    compute_gradients<Gradients>(dynamic_shared, a, maps);
    return;
  }
  ScanUnit const unit = scan_unit(a, Scan::kSlices * kTileSide);
  if (unit.reverse) {
    scan<Scan, typename Scan::ReverseStage, true>(dynamic_shared, a, maps, unit);
  } else {
    scan<Scan, typename Scan::ForwardStage, true>(dynamic_shared, a, maps, unit);
  }
}

}  // namespace lt2::gdn::sm90::backward_pass
