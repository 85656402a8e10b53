// Third launch of the backward pass: everything that is left of a chunk once S, dS, r and rho are known. With
// U = b o r, dY = b o rho, M = K K^T and hats for normalised rows:
//   dP_ij = scale E_ij dO_i.U_j  (i >= j)          dM_ij = -E_ij dY_i.U_j  (i > j)
//   dQ^ = scale e^G dO S^T + dP K^                 dK^ = -e^G dY S^T + e^(G_last - G) U dS^T + dP^T Q^ + (dM
//   + dM^T) K^ dbeta_i = rho_i.r_i
// dL/dg_m is what of the loss passes token m: from the chunk's start to tokens i >= m, from tokens j < m to
// its end, from j < m to i >= m, and from start to end; each is a sum of terms that carry the decay
// themselves.
//
// Blocks stay and take (chunk, query/key head) after another; a warpgroup owns kColumns columns of dq and dk,
// the first one also dP, the second dM. One thread loads: slices of 64 value columns, kSliceStages ahead.
#pragma once

#include "gdn/cuda/sm90/backward_scan.cuh"

namespace lt2::gdn::sm90::backward_pass {

template <class T_, int kKeyDim_>
struct GradientTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_, kKeyTiles = key_tiles(kKeyDim);
  static constexpr int kGroups = kKeyTiles > 2 ? kKeyTiles : 2;     // warpgroups that compute
  static constexpr int kColumns = kKeyTiles == 1 ? 32 : kTileSide;  // of each, padded with zeros
  static constexpr int kWorkers = kGroups * kWarpgroup, kThreads = kWorkers + kWarpgroup;
  static constexpr int kLoadRegisters = 40, kWorkRegisters = 232;
  static constexpr int kKeyStages = kKeyTiles > 2 ? 1 : 2, kSliceStages = 2;
  static constexpr int kScalarStages = kSliceStages + 1;  // value heads that can be under way

  struct Keys {
    char k[kKeyTiles * kTileBytes], q[kKeyTiles * kTileBytes];
  };
  struct Slice {
    SliceRecord<kKeyTiles> forward, reverse;
    char dout[kTileBytes];
    static constexpr uint32_t kBytes = 2 * kSliceBytes<kKeyTiles> + kTileBytes;
  };
  struct Shared {
    alignas(1024) Keys keys[kKeyStages];
    Slice slices[kSliceStages];
    alignas(1024) char dscores[kTileBytes], dgram[kTileBytes];  // dP and dM, times the norms of both rows
    ChunkScalars scalars[kScalarStages];
    float from_start[kGroups][kChunk], to_end[kGroups][kChunk];  // parts of rows' sums
    float crossing_rows[2][kChunk], crossing_columns[2][4][kChunk];
    float dbeta[kChunk];
    float through[kGroups * 4];
    float q_dots[kGroups][kChunk], k_dots[kGroups][kChunk];
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
template <class Traits, bool kFollows>
__device__ void load_work(typename Traits::Shared& shared, BackwardLaunch const& a,
                          BackwardMaps const& maps) {
  using T = typename Traits::T;
  int const heads = a.p.value_heads / a.p.heads, slices = a.p.value_dim / kTileSide;
  Ring<Traits::kKeyStages> keys;
  Ring<Traits::kSliceStages> ring;
  int scalars = 0;
  for_work<kFollows>(a, [&](Place const& place, int64_t number, int qk_head) {
    TileTokens const& c = place.tokens;
    Barrier& keys_loaded = shared.keys_loaded[keys.slot()];
    shared.keys_released[keys.slot()].wait(keys.parity() ^ 1);
    shared.work[keys.slot()] = {c, qk_head};
    keys_loaded.arrive_expecting(sizeof(typename Traits::Keys));
    request_tiles<Traits::kKeyTiles>(shared.keys[keys.slot()].k, maps.k, 0, qk_head, c, keys_loaded);
    request_tiles<Traits::kKeyTiles>(shared.keys[keys.slot()].q, maps.q, 0, qk_head, c, keys_loaded);
    keys.advance();
    // Slices of the value heads follow each other, in what the scan left and in what it announces.
    using Record = SliceRecord<Traits::kKeyTiles>;
    int64_t const index = number * a.p.value_heads + qk_head * heads;
    auto const* forward = reinterpret_cast<Record const*>(a.w.forward) + index * slices;
    auto const* record = a.w.record<T>(index);
    int const* announced =
        a.w.progress + progress_index(a.p, false, place.sequence * a.p.value_heads + qk_head * heads, 0);
    for (int head = qk_head * heads; head < (qk_head + 1) * heads; ++head, ++record) {
      for (int slice = 0; slice < slices; ++slice, ++forward, ++announced) {
        typename Traits::Slice& to = shared.slices[ring.slot()];
        Barrier& loaded = shared.slice_loaded[ring.slot()];
        shared.slice_released[ring.slot()].wait(ring.parity() ^ 1);
        if constexpr (kFollows) {
          await_chunks(announced, place.chunk + 1);
          await_chunks(announced + a.p.sequences * a.p.value_heads * slices, place.chunks - place.chunk);
        }
        loaded.arrive_expecting(Traits::Slice::kBytes + (slice == 0 ? kScalarBytes : 0));
        load_bytes(&to.forward, forward, kSliceBytes<Traits::kKeyTiles>, loaded);
        load_bytes(&to.reverse, reinterpret_cast<char const*>(forward) + (a.w.reverse - a.w.forward),
                   kSliceBytes<Traits::kKeyTiles>, loaded);
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

// f(row, column, element) for pairs of columns of [64 x kN] accumulators.
template <int kN, class F>
__device__ __forceinline__ void for_pairs(int warp, int lane, F const& f) {
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f(half, warp * 16 + lane / 4 + 8 * half, 8 * n + 2 * (lane % 4), 4 * n + 2 * half);
    }
  }
}

// The pair of elements (row, column), (row, column + 1) of a tile.
template <class T>
__device__ __forceinline__ float2 tile_pair(char const* tile, int row, int column) {
  return unpack<T>(*reinterpret_cast<uint32_t const*>(tile + tile_offset(row, column / 8) + column % 8 * 2));
}

template <int kN>
__device__ __forceinline__ void clear(float (&x)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) x[i] = 0.f;
}

__device__ __forceinline__ float dot_product(uint4 const& a, uint4 const& b) {
  float sum = 0.f;
  uint32_t const x[] = {a.x, a.y, a.z, a.w}, y[] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 const u = unpack<__half>(x[i]), v = unpack<__half>(y[i]);
    sum += u.x * v.x + u.y * v.y;
  }
  return sum;
}

// 8 elements in T -> in fp16 times a unit.
template <class T>
__device__ __forceinline__ void convert(uint4& x, float factor) {
  auto const half = [&](uint32_t& y) {
    float2 const z = unpack<T>(y);
    y = pack<__half>(factor * z.x, factor * z.y);
  };
  half(x.x);
  half(x.y);
  half(x.z);
  half(x.w);
}

// What 1 stands for in a slice's operands; in the accumulators it is a product of two.
struct Units {
  float state, dstate, r, rho, dout, left;
};

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
    before[j] = 0.f;
    float columns = 0.f;
#pragma unroll
    for (int w = 0; w < 8; ++w) columns += shared.crossing_columns[w / 4][w % 4][i];
    after[j] -= columns;
#pragma unroll
    for (int group = 0; group < Traits::kGroups; ++group) {
      after[j] += shared.from_start[group][i];
      before[j] += shared.to_end[group][i];
    }
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

// What follows from a thread's number is cheaper to compute again than to keep through loops.
__device__ __forceinline__ int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Warpgroup `group` of those that compute.
template <class Traits>
__device__ void compute_work(typename Traits::Shared& shared, BackwardLaunch const& a, int group,
                             int const own_thread) {
  using T = typename Traits::T;
  constexpr int kKeyTiles = Traits::kKeyTiles, kN = Traits::kColumns;
  int const heads = a.p.value_heads / a.p.heads, slices = a.p.value_dim / kTileSide;
  int const tile = kN == kTileSide ? group * kTileBytes : 0;  // of its columns, and where in it
  int const first = kN == kTileSide ? 0 : group * kN;
  uint64_t const first_step = first / 8;
  Ring<Traits::kKeyStages> keys;
  Ring<Traits::kSliceStages> ring;
  int scalar_slot = 0;

  for (;; keys.advance()) {
    char* const k = shared.keys[keys.slot()].k;
    char* const q = shared.keys[keys.slot()].q;
    shared.keys_loaded[keys.slot()].wait(keys.parity());
    TileTokens const& c = shared.work[keys.slot()].tokens;
    int const qk_head = shared.work[keys.slot()].qk_head;
    if (c.count == 0) break;
    if (c.count < kChunk) {
      if (group == 0) {
        clear_tail<kKeyTiles>(k, c.count, own_thread);
        clear_tail<kKeyTiles>(q, c.count, own_thread);
      }
      named_barrier(kWorkersBarrier, Traits::kWorkers);
    }
    for (int h = 0; h < heads; ++h) {
      int const head = qk_head * heads + h;
      ChunkScalars const& s = shared.scalars[scalar_slot];
      float dq[kN / 2], dk[kN / 2], written[kN / 2], pairs[kChunk / 2];
      float through = 0.f;
      Units units;
      for (int slice = 0; slice < slices; ++slice) {
        int const thread = forget(own_thread), lane = thread % 32;
        typename Traits::Slice& x = shared.slices[ring.slot()];
        shared.slice_loaded[ring.slot()].wait(ring.parity());
        // dO in fp16 as well, the rows that follow the sequence zero.
        float const state_unit = x.forward.units[kStateUnit], dstate_unit = x.reverse.units[kStateUnit];
        float const r_unit = x.forward.units[kTokenUnit], rho_unit = x.reverse.units[kTokenUnit];
        float const dout_unit = x.reverse.units[kDoutUnit];
        for (int e = group * kWarpgroup + thread; e < kChunk * 8; e += Traits::kWorkers) {
          auto* const y = reinterpret_cast<uint4*>(x.dout + tile_offset(e / 8, e % 8));
          if (e / 8 >= c.count) {
            *y = uint4{};
          } else {
            convert<T>(*y, inverse(dout_unit));
          }
        }
        fence_async_shared();
        float const left_unit = group == 0 ? dout_unit : rho_unit;
        if (slice > 0) {
          float const by_state = units.state * inverse(state_unit), by_r = units.r * inverse(r_unit);
          scale_all(dq, units.dout * inverse(dout_unit) * by_state);
          scale_all(dk, units.rho * inverse(rho_unit) * by_state);
          scale_all(written, by_r * (units.dstate * inverse(dstate_unit)));
          scale_all(pairs, units.left * inverse(left_unit) * by_r);
        }
        units = {state_unit, dstate_unit, r_unit, rho_unit, dout_unit, left_unit};
        named_barrier(kWorkersBarrier, Traits::kWorkers);
        uint64_t const dout = k_major(x.dout), rho = k_major(x.reverse.tokens), r = k_major(x.forward.tokens);
        uint64_t const state = row_major(x.forward.state + tile) + first_step;
        uint64_t const dstate = row_major(x.reverse.state + tile) + first_step;
        uint64_t const left = group == 0 ? dout : rho;
        bool const more = slice > 0;
        pin(dq);
        pin(dk);
        pin(written);
        pin(pairs);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < kTileSide / 16; ++j) {
          wgmma<__half, kN, Major::MN>(dq, dout + k_step(j), state + j * kRowStep, more || j > 0);
          wgmma<__half, kN, Major::MN>(dk, rho + k_step(j), state + j * kRowStep, more || j > 0);
          wgmma<__half, kN, Major::MN>(written, r + k_step(j), dstate + j * kRowStep, more || j > 0);
          wgmma<__half, kChunk>(pairs, left + k_step(j), r + k_step(j), more || j > 0);
        }
        wgmma_commit();
        float sum = 0.f;
#pragma unroll
        for (int e = thread; e < kTileSide * kN / 8; e += kWarpgroup) {
          int const offset = tile + tile_offset(e / (kN / 8), first / 8 + e % (kN / 8));
          sum += dot_product(*reinterpret_cast<uint4 const*>(x.forward.state + offset),
                             *reinterpret_cast<uint4 const*>(x.reverse.state + offset));
        }
        through += state_unit * (dstate_unit * sum);
        wgmma_wait<0>();
        pin(dq);
        pin(dk);
        pin(written);
        pin(pairs);
        if (lane == 0) shared.slice_released[ring.slot()].arrive();
        ring.advance();
      }

      int const thread = forget(own_thread), warp = thread / 32, lane = thread % 32;
      // Row dots of what goes through S and dS, for dg; then dq and dk of these, times the row's norm.
      float from_start[2] = {}, to_end[2] = {};
      for_pairs<kN>(warp, lane, [&](int half, int row, int column, int i) {
        float2 const q2 = tile_pair<T>(q + tile, row, first + column),
                     k2 = tile_pair<T>(k + tile, row, first + column);
        float const b = s.strength[row], q_in = s.q_in[row] * units.dout * units.state,
                    k_in = -s.k_in[row] * b * units.rho * units.state,
                    k_out = s.k_out[row] * b * units.r * units.dstate;
        dq[i] *= q_in;
        dq[i + 1] *= q_in;
        dk[i] *= k_in;
        dk[i + 1] *= k_in;
        from_start[half] += dq[i] * q2.x + dq[i + 1] * q2.y + dk[i] * k2.x + dk[i + 1] * k2.y;
        float const y = k_out * written[i], z = k_out * written[i + 1];
        to_end[half] += y * k2.x + z * k2.y;
        dk[i] += y;
        dk[i + 1] += z;
      });
      through = lane_sum(through);
      if (lane == 0) shared.through[group * 4 + warp] = through;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const start = lane_sum<4>(from_start[half]), end = lane_sum<4>(to_end[half]);
        int const row = warp * 16 + lane / 4 + 8 * half;
        if (lane % 4 == 0) {
          shared.from_start[group][row] = start;
          shared.to_end[group][row] = end;
        }
      }
      if (group < 2) {
        int const again = forget(own_thread), warp = again / 32, lane = again % 32;
        float products[kChunk / 2];  // of q and k, or of k and k
        multiply_rows<T, Traits::kKeyDim>(products, group == 0 ? q : k, k);
        float rows[2] = {}, columns[kChunk / 4] = {}, diagonal[2], factor[2], g[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const row = warp * 16 + lane / 4 + 8 * half;
          g[half] = s.log2_decay[row];
          factor[half] = units.left * units.r *
                         (group == 0 ? a.p.scale * s.q_norm[row] : -s.strength[row] * s.k_norm[row]);
        }
        int const last = group == 0 ? 0 : -1;  // column that a row sees, relative to it
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n) {
          int const column = 8 * n + 2 * (lane % 4);
          float2 const gs = pair_at(s.log2_decay, column), b = pair_at(s.strength, column),
                       norm = pair_at(s.k_norm, column);
          float const by_column[2] = {b.x * norm.x, b.y * norm.y};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              int const i = 4 * n + 2 * half + j, ahead = column + j - (warp * 16 + lane / 4 + 8 * half);
              if (ahead == 0) diagonal[half] = pairs[i];
              float const decay = ahead <= last ? exp2_fast(g[half] - (j == 0 ? gs.x : gs.y)) : 0.f;
              pairs[i] *= factor[half] * decay * by_column[j];
              float const crossing = ahead < 0 ? pairs[i] * products[i] : 0.f;
              rows[half] += crossing;
              columns[2 * n + j] += crossing;
            }
          }
        }
        // The lane that has the diagonal element of a row.
        if (group == 1 && lane % 4 == lane / 8) {
          shared.dbeta[warp * 16 + lane / 4] = units.left * units.r * diagonal[0];
          shared.dbeta[warp * 16 + lane / 4 + 8] = units.left * units.r * diagonal[1];
        }
        put_rows<T, kChunk>(pairs, group == 0 ? shared.dscores : shared.dgram, 0, warp, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float const sum = lane_sum<4>(rows[half]);
          if (lane % 4 == 0) shared.crossing_rows[group][warp * 16 + lane / 4 + 8 * half] = sum;
        }
#pragma unroll
        for (int i = 0; i < kChunk / 4; ++i) {
          float sum = columns[i];
#pragma unroll
          for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
          if (lane < 4) shared.crossing_columns[group][warp][i / 2 * 8 + 2 * lane + i % 2] = sum;
        }
      }
      fence_async_shared();
      named_barrier(kWorkersBarrier, Traits::kWorkers);
      {
        uint64_t const dscores = k_major(shared.dscores), dscores_t = row_major(shared.dscores);
        uint64_t const dgram = k_major(shared.dgram), dgram_t = row_major(shared.dgram);
        uint64_t const k_rows = row_major(k + tile) + first_step, q_rows = row_major(q + tile) + first_step;
        pin(dq);
        pin(dk);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < kChunk / 16; ++j) {
          wgmma<T, kN, Major::MN>(dq, dscores + k_step(j), k_rows + j * kRowStep, true);
          wgmma<T, kN, Major::MN, Major::MN>(dk, dscores_t + j * kRowStep, q_rows + j * kRowStep, true);
          wgmma<T, kN, Major::MN>(dk, dgram + k_step(j), k_rows + j * kRowStep, true);
          wgmma<T, kN, Major::MN, Major::MN>(dk, dgram_t + j * kRowStep, k_rows + j * kRowStep, true);
        }
        wgmma_commit();
      }
      if (group == Traits::kGroups - 1 && warp == 0) store_scalars<Traits>(shared, s, a.p, c, head, lane);
      wgmma_wait<0>();
      pin(dq);
      pin(dk);
      // The sum over the value heads of a query/key head; each thread reads what it wrote.
      float* const partial =
          a.w.partial +
          ((int64_t{blockIdx.x} - a.first_block) * Traits::kGroups + group) * (kN * kWarpgroup) + own_thread;
      if (h > 0) {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) {
          dq[i] += partial[2 * i * kWarpgroup];
          dk[i] += partial[(2 * i + 1) * kWarpgroup];
        }
      }
      if (h + 1 < heads) {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) {
          partial[2 * i * kWarpgroup] = dq[i];
          partial[(2 * i + 1) * kWarpgroup] = dk[i];
        }
        named_barrier(kWorkersBarrier, Traits::kWorkers);
      } else {
        int const thread = forget(own_thread), warp = thread / 32, lane = thread % 32;
        // Through the norms: dx = n (dx^ - x^ (x^ . dx^)), where dq and dk are n dx^ already.
        if (a.p.qk_l2norm) {
          float q_dots[2] = {}, k_dots[2] = {};
          for_pairs<kN>(warp, lane, [&](int half, int row, int column, int i) {
            float2 const q2 = tile_pair<T>(q + tile, row, first + column),
                         k2 = tile_pair<T>(k + tile, row, first + column);
            q_dots[half] += dq[i] * q2.x + dq[i + 1] * q2.y;
            k_dots[half] += dk[i] * k2.x + dk[i + 1] * k2.y;
          });
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float const x = lane_sum<4>(q_dots[half]), y = lane_sum<4>(k_dots[half]);
            int const row = warp * 16 + lane / 4 + 8 * half;
            if (lane % 4 == 0) {
              shared.q_dots[group][row] = x;
              shared.k_dots[group][row] = y;
            }
          }
        }
        named_barrier(kWorkersBarrier, Traits::kWorkers);
        if (a.p.qk_l2norm) {
          for_pairs<kN>(warp, lane, [&](int, int row, int column, int i) {
            float2 const q2 = tile_pair<T>(q + tile, row, first + column),
                         k2 = tile_pair<T>(k + tile, row, first + column);
            float q_dot = 0.f, k_dot = 0.f;
#pragma unroll
            for (int other = 0; other < Traits::kGroups; ++other) {
              q_dot += shared.q_dots[other][row];
              k_dot += shared.k_dots[other][row];
            }
            q_dot *= s.q_norm[row] * s.q_norm[row];
            k_dot *= s.k_norm[row] * s.k_norm[row];
            dq[i] -= q_dot * q2.x;
            dq[i + 1] -= q_dot * q2.y;
            dk[i] -= k_dot * k2.x;
            dk[i + 1] -= k_dot * k2.y;
          });
        }
        // q and k have been read: their places take dq and dk. Only this warp has to do with its rows and
        // columns.
        __syncwarp();
        put_rows<T, kN>(dq, q + tile, first, warp, lane);
        put_rows<T, kN>(dk, k + tile, first, warp, lane);
        __syncwarp();
        for (int e = lane; e < 16 * (kN / 8); e += 32) {
          int const row = warp * 16 + e / (kN / 8), chunk = first / 8 + e % (kN / 8);
          if (row >= c.count) break;
          int const column = tile / kTileBytes * kTileSide + chunk * 8,
                    offset = tile + tile_offset(row, chunk);
          if (column >= Traits::kKeyDim) continue;
          *reinterpret_cast<uint4*>(portable::token_row<T>(a.p.dq, c.row, c.begin + row, qk_head) + column) =
              *reinterpret_cast<uint4 const*>(q + offset);
          *reinterpret_cast<uint4*>(portable::token_row<T>(a.p.dk, c.row, c.begin + row, qk_head) + column) =
              *reinterpret_cast<uint4 const*>(k + offset);
        }
        fence_async_shared();
        __syncwarp();
        if (lane == 0) shared.keys_released[keys.slot()].arrive();
      }
      scalar_slot = scalar_slot + 1 == Traits::kScalarStages ? 0 : scalar_slot + 1;
    }
  }
}

template <class Traits, bool kFollows>
__device__ void compute_gradients(char* dynamic_shared, BackwardLaunch const& a, BackwardMaps const& maps) {
  auto& shared = aligned_shared<typename Traits::Shared>(dynamic_shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kKeyStages; ++i) {
      shared.keys_loaded[i].init(1);
      shared.keys_released[i].init(Traits::kGroups * 4);
    }
    for (int i = 0; i < Traits::kSliceStages; ++i) {
      shared.slice_loaded[i].init(1);
      shared.slice_released[i].init(Traits::kGroups * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (group == Traits::kGroups) {
    shrink_registers<Traits::kLoadRegisters>();
    if (thread == 0) load_work<Traits, kFollows>(shared, a, maps);
    return;
  }
  grow_registers<Traits::kWorkRegisters>();
  compute_work<Traits>(shared, a, group, thread);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    gradient_kernel(__grid_constant__ BackwardLaunch const a, __grid_constant__ BackwardMaps const maps) {
  extern __shared__ char dynamic_shared[];
  compute_gradients<Traits, false>(dynamic_shared, a, maps);
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
    compute_gradients<Gradients, true>(dynamic_shared, a, maps);
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
