// Second launch of the backward pass. Half of the blocks carry the state forward, half its gradient in
// reverse; a block has one sequence, value head and kSlices x 64 value columns. As in the forward pass a
// warpgroup keeps S^T (dS^T) [64 x K] of its columns in registers and chains the products through them; one
// more thread loads, kStages ahead.
//   forward: r = Y - N (b o Y), Y = V - e^G K S       S <- e^(G_last) S + (e^(G_last - G) K)^T (b o r)
//   reverse: dU = P^T dO + e^(G_last - G) K dS        rho = dU - N^T (b o dU)      dV = b o rho
//            dS <- e^(G_last) dS + scale (e^G Q)^T dO - (e^G K)^T dV
// Each chunk leaves S before it and r, dS after it and rho (in the place of dV).
#pragma once

#include "gdn/cuda/sm90/backward.cuh"

namespace lt2::gdn::sm90::backward_pass {

inline constexpr int kStateBarrier = 8;  // of all state warpgroups; 1 + slice is of one

template <class T_, int kKeyDim_, int kSlices_>
struct ScanTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_, kKeyTiles = key_tiles(kKeyDim), kSlices = kSlices_;
  static constexpr int kStateThreads = kSlices * kWarpgroup, kThreads = kStateThreads + kWarpgroup;
  // With two slices, registers a thread: of 168 at launch the loader's warpgroup gives up what the others
  // need.
  static constexpr int kLoadRegisters = kSlices == 1 ? 56 : 24, kStateRegisters = 240;

  // Of a stage, everything but the values comes by the copy engine from q, k and the chunk's record.
  struct ForwardStage {
    alignas(1024) char k[kKeyTiles * kTileBytes];
    char values[kSlices][kTileBytes];  // v
    char negative_n[2 * kTileBytes];
    ChunkScalars scalars;
  };
  struct ReverseStage {
    alignas(1024) char k[kKeyTiles * kTileBytes];
    char q[kKeyTiles * kTileBytes];
    char values[kSlices][kTileBytes];  // dO
    ChunkRecord record;
  };
  // A state on its way out, then r or rho.
  static constexpr int kStagingTiles = kKeyTiles;
  static constexpr int kStagingBytes = kSlices * kStagingTiles * kTileBytes;
  static constexpr int kRoom = 227 * 1024 - 2048 - kStagingBytes;
  template <class Stage>
  static constexpr int kStages = kRoom / sizeof(Stage) > 3 ? 3 : kRoom / sizeof(Stage);
  static_assert(kStages<ReverseStage> >= 2);

  template <class Stage>
  struct Shared {
    Stage stages[kStages<Stage>];
    char staging[kSlices][kStagingTiles * kTileBytes];
    alignas(16) uint32_t largest[kSlices][8];
    int done[kSlices];  // chunks of which all is in global memory
    Barrier loaded[kStages<Stage>], released[kStages<Stage>];
  };
  static constexpr int kSharedBytes =
      (sizeof(Shared<ForwardStage>) > sizeof(Shared<ReverseStage>) ? sizeof(Shared<ForwardStage>)
                                                                   : sizeof(Shared<ReverseStage>)) +
      1024;
};

// What a block works on. Chunks are counted in the order of work: from the last one in reverse.
struct ScanUnit {
  bool reverse;
  int64_t state, first_chunk;  // [N, HV]; number of the sequence's first chunk
  int row, begin, tokens, chunks;
  int head, qk_head, column;

  __device__ int place(int i) const { return reverse ? chunks - 1 - i : i; }
  __device__ TileTokens chunk(int i) const {
    int const offset = place(i) * kChunk;
    return {row, begin + offset, min(tokens - offset, kChunk)};
  }
};

__device__ inline ScanUnit scan_unit(BackwardLaunch const& a, int columns) {
  unsigned block = blockIdx.x;
  bool const reverse = block % 2;
  block /= 2;
  int const group = block % a.slice_groups;
  block /= a.slice_groups;
  int const head = block % a.p.value_heads;
  int64_t const n = block / a.p.value_heads;
  portable::Sequence const s = portable::sequence(a.p, n);
  int const tokens = static_cast<int>(s.length);
  return {reverse,
          n * a.p.value_heads + head,
          portable::first_chunk(a.p, n),
          static_cast<int>(s.row),
          static_cast<int>(s.begin),
          tokens,
          (tokens + kChunk - 1) / kChunk,
          head,
          head / (a.p.value_heads / a.p.heads),
          group * columns};
}

// One thread.
template <class Traits, class Stage>
__device__ void load_chunks(typename Traits::template Shared<Stage>& shared, BackwardLaunch const& a,
                            BackwardMaps const& maps, ScanUnit const& unit) {
  using T = typename Traits::T;
  constexpr int kStages = Traits::template kStages<Stage>;
  constexpr bool kReverse = std::is_same_v<Stage, typename Traits::ReverseStage>;
  constexpr uint32_t kKeyBytes = Traits::kKeyTiles * kTileBytes;
  for (int i = 0; i < unit.chunks; ++i) {
    int const slot = i % kStages;
    Stage& stage = shared.stages[slot];
    Barrier& loaded = shared.loaded[slot];
    TileTokens const c = unit.chunk(i);
    ChunkRecord const* const record =
        a.w.record((unit.first_chunk + unit.place(i)) * a.p.value_heads + unit.head);
    if (i >= kStages) shared.released[slot].wait((i / kStages - 1) & 1);
    if constexpr (kReverse) {
      loaded.arrive_expecting(2 * kKeyBytes + Traits::kSlices * kTileBytes + kRecordBytes);
      request_tiles<Traits::kKeyTiles>(stage.k, maps.k, 0, unit.qk_head, c, loaded);
      load_bytes(&stage.record, record, kRecordBytes, loaded);
      request_tiles<Traits::kSlices>(stage.values[0], maps.dout, unit.column, unit.head, c, loaded);
      request_tiles<Traits::kKeyTiles>(stage.q, maps.q, 0, unit.qk_head, c, loaded);
    } else {
      loaded.arrive_expecting(kKeyBytes + Traits::kSlices * kTileBytes + 2 * kTileBytes + kScalarBytes);
      request_tiles<Traits::kKeyTiles>(stage.k, maps.k, 0, unit.qk_head, c, loaded);
      request_tiles<Traits::kSlices>(stage.values[0], maps.v, unit.column, unit.head, c, loaded);
      load_bytes(stage.negative_n, record->negative_n, 2 * kTileBytes, loaded);
      load_bytes(&stage.scalars, &record->scalars, kScalarBytes, loaded);
    }
  }
}

// What a state warpgroup writes goes through its staging tiles.
template <class Traits>
struct Staging {
  char* tiles;
  uint32_t* largest;  // [2, 4]: of each warp
  int barrier, thread;

  // The tiles may be written again; returns the scales for what is as large as `x` (and `y`) in this thread.
  __device__ Scale acquire(uint32_t x) const {
    publish_largest(0, x);
    synchronize();
    return scale(0);
  }
  __device__ void acquire(uint32_t x, uint32_t y, Scale& x_scale, Scale& y_scale) const {
    publish_largest(0, x);
    publish_largest(1, y);
    synchronize();
    x_scale = scale(0);
    y_scale = scale(1);
  }
  // The tiles are written: one thread may have them copied.
  __device__ void publish() const {
    fence_async_shared();
    named_barrier(barrier, kWarpgroup);
  }
  // S^T [64 x K] times `factor`, zeros up to whole tiles.
  __device__ void put_state(float const (&s)[Traits::kKeyDim / 2], float factor, int warp, int lane) const {
    uint32_t const address = shared_address(tiles);
    int const row = warp * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < Traits::kKeyTiles * 8; n += 2) {
      uint32_t x[4] = {};
      if (n < Traits::kKeyDim / 8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = pack<__half>(factor * s[4 * n + 2 * i], factor * s[4 * n + 2 * i + 1]);
        }
      }
      store_matrices(address + n / 8 * kTileBytes + tile_offset(row, n % 8 + lane / 16), x[0], x[1], x[2],
                     x[3]);
    }
  }

 private:
  __device__ void publish_largest(int i, uint32_t x) const {
    largest[4 * i + thread / 32] =
        __reduce_max_sync(0xffffffffu, x);  // all lanes: no branch while wgmma is under way
  }
  __device__ void synchronize() const {
    wait_stores_read();
    named_barrier(barrier, kWarpgroup);
  }
  __device__ Scale scale(int i) const {
    uint4 const x = *reinterpret_cast<uint4 const*>(largest + 4 * i);
    return Scale(max(max(x.x, x.y), max(x.z, x.w)));
  }
};

// The bits of nonnegative floats order as they do.
template <class T, int kCount>
__device__ __forceinline__ uint32_t largest_of(uint32_t const (&x)[kCount]) {
  uint32_t largest = 0;  // pairs of elements without sign
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = __vmaxu2(largest, x[i] & 0x7fff7fffu);
  float2 const y = unpack<T>(largest);
  return __float_as_uint(fmaxf(y.x, y.y));
}

// Fragments [values x tokens] of a tile [tokens x values].
__device__ __forceinline__ void load_values(uint32_t (&x)[kChunk / 4], char const* tile, int warp, int lane) {
  uint32_t const address = shared_address(tile);
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    uint32_t r[4];
    load_matrices_transposed(r, address + value_offset(8 * n, warp, lane));
#pragma unroll
    for (int j = 0; j < 4; ++j) x[2 * n + j] = r[j];
  }
}

// f(factor[token], element) for all elements of [values x tokens] accumulators, two tokens at a time.
template <class F>
__device__ __forceinline__ void for_tokens(int lane, F const& f) {
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) f(8 * n + 2 * (lane % 4), 4 * n + 2 * half);
  }
}

// y [values x tokens] -> y - N (b o y), or y - N^T (b o y) for kMajor = MN, both factors pairs of bf16.
// `meanwhile` awaits the product, and may do something first.
template <Major kMajor, class F>
__device__ __forceinline__ void subtract_n(float (&y)[kChunk / 2], ChunkScalars const& s, uint64_t negative_n,
                                           int lane, F const& meanwhile) {
  uint32_t high[kChunk / 4], low[kChunk / 4];
  for_tokens(lane, [&](int token, int j) {
    float2 const b = pair_at(s.strength, token);
    Split const x = split(b.x * y[j], b.y * y[j + 1]);
    high[j / 2] = x.high;
    low[j / 2] = x.low;
  });
  pin(high);
  pin(low);
  pin(y);
  wgmma_begin();
#pragma unroll
  for (int j = 0; j < kChunk / 16; ++j) {
    uint64_t const n = negative_n + (kMajor == Major::K ? k_step(j) : j * kRowStep);
    wgmma<__nv_bfloat16, kChunk, kMajor>(y, high + 4 * j, n, true);
    wgmma<__nv_bfloat16, kChunk, kMajor>(y, high + 4 * j, n + (kTileBytes >> 4), true);
    wgmma<__nv_bfloat16, kChunk, kMajor>(y, low + 4 * j, n, true);
  }
  wgmma_commit();
  meanwhile();
  pin(y);
}

// Chunks that are in global memory, from the thread that had them copied to the one that tells other blocks.
__device__ __forceinline__ void publish_done(int& done, int chunks) {
  asm volatile("red.release.cta.shared::cta.max.s32 [%0], %1;" ::"r"(shared_address(&done)), "r"(chunks)
               : "memory");
}
// One thread, until all `chunks` are done: a fence of the whole GPU takes longer than a state warpgroup can
// wait.
__device__ inline void announce_done(int& done, int chunks, int* announced) {
  for (int last = 0; last < chunks;) {
    int now;
    asm volatile("atom.acquire.cta.shared::cta.or.b32 %0, [%1], 0;"
                 : "=r"(now)
                 : "r"(shared_address(&done))
                 : "memory");
    if (now == last) {
      __nanosleep(100);
      continue;
    }
    last = now;
    asm volatile("fence.proxy.async;" ::: "memory");
    __threadfence();
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(announced), "r"(last) : "memory");
  }
}

template <class Traits>
__device__ void scan_forward(typename Traits::template Shared<typename Traits::ForwardStage>& shared,
                             BackwardLaunch const& a, ScanUnit const& unit, int slice, int thread) {
  using T = typename Traits::T;
  using Stage = typename Traits::ForwardStage;
  constexpr int kKeyDim = Traits::kKeyDim, kStages = Traits::template kStages<Stage>;
  int const warp = thread / 32, lane = thread % 32;
  int const column = unit.column + slice * kTileSide, value_slices = a.p.value_dim / kTileSide;
  Staging<Traits> const staging{shared.staging[slice], shared.largest[slice], 1 + slice, thread};

  float s[kKeyDim / 2];
  if (a.p.initial_state != nullptr) {
    load_state<kKeyDim>(s, a.p.initial_state + unit.state * kKeyDim * a.p.value_dim, a.p.state_v_first,
                        a.p.value_dim, column, thread);
  } else {
#pragma unroll
    for (int i = 0; i < kKeyDim / 2; ++i) s[i] = 0.f;
  }

  for (int i = 0; i < unit.chunks; ++i) {
    int const slot = i % kStages;
    Stage& stage = shared.stages[slot];
    ChunkScalars const& scalars = stage.scalars;
    int const count = unit.chunk(i).count;
    int64_t const at =
        ((unit.first_chunk + i) * a.p.value_heads + unit.head) * value_slices + column / kTileSide;
    auto& out = reinterpret_cast<ForwardRecord<Traits::kKeyTiles>*>(a.w.forward)[at];
    uint32_t state[kKeyDim / 4];
    pack_all<T>(state, s);
    shared.loaded[slot].wait((i / kStages) & 1);
    if (count < kChunk) {
      clear_tail<Traits::kKeyTiles>(stage.k, count, thread);
      clear_tail<1>(stage.values[slice], count, thread);
      named_barrier(kStateBarrier, Traits::kStateThreads);
    }
    float r[kChunk / 2];
    {
      uint64_t const k = k_major(stage.k);
      pin(state);
      pin(r);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kKeyDim / 16; ++j) wgmma<T, kChunk>(r, state + 4 * j, k + k_step(j), j > 0);
      wgmma_commit();
    }
    Scale const state_scale = staging.acquire(largest_of(s));
    staging.put_state(s, state_scale.factor, warp, lane);
    staging.publish();
    store_bytes(out.state, staging.tiles, Traits::kKeyTiles * kTileBytes, thread == 0);
    scale_all(s, scalars.decay);
    uint32_t fragments[kChunk / 4];  // v, later r
    load_values(fragments, stage.values[slice], warp, lane);
    wgmma_wait<0>();
    pin(r);
    for_tokens(lane, [&](int token, int j) {
      float2 const in = pair_at(scalars.k_in, token), v = unpack<T>(fragments[j / 2]);
      r[j] = v.x - in.x * r[j];
      r[j + 1] = v.y - in.y * r[j + 1];
    });
    subtract_n<Major::K>(r, scalars, k_major(stage.negative_n), lane, [] { wgmma_wait<0>(); });
    uint32_t left[kChunk / 4];  // e^(G_last - G) b o r
    for_tokens(lane, [&](int token, int j) {
      float2 const to_end = pair_at(scalars.k_out, token), b = pair_at(scalars.strength, token);
      left[j / 2] = pack<T>(to_end.x * (b.x * r[j]), to_end.y * (b.y * r[j + 1]));
    });
    {
      uint64_t const k = row_major(stage.k);
      pin(left);
      pin(s);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kChunk / 16; ++j) {
        wgmma<T, kKeyDim, Major::MN>(s, left + 4 * j, k + j * kRowStep, true);
      }
      wgmma_commit();
    }
    wait_stores<1>();  // all but the state: what chunks before left is there
    if (thread == 0) publish_done(shared.done[slice], i);
    Scale const token_scale = staging.acquire(largest_of(r));
    pack_all<__half>(fragments, r, token_scale.factor);
    stage_values(fragments, staging.tiles, warp, lane);
    staging.publish();
    store_bytes(out.r, staging.tiles, kTileBytes, thread == 0);
    wgmma_wait<0>();
    pin(s);
    if (thread == 0) a.w.forward_units[at] = {state_scale.unit, token_scale.unit};
    shared.released[slot].arrive();
  }
  wait_stores<0>();
  if (thread == 0) publish_done(shared.done[slice], unit.chunks);
}

template <class Traits>
__device__ void scan_reverse(typename Traits::template Shared<typename Traits::ReverseStage>& shared,
                             BackwardLaunch const& a, BackwardMaps const& maps, ScanUnit const& unit,
                             int slice, int thread) {
  using T = typename Traits::T;
  using Stage = typename Traits::ReverseStage;
  constexpr int kKeyDim = Traits::kKeyDim, kStages = Traits::template kStages<Stage>;
  int const warp = thread / 32, lane = thread % 32;
  int const column = unit.column + slice * kTileSide, value_slices = a.p.value_dim / kTileSide;
  int64_t const state_offset = unit.state * kKeyDim * a.p.value_dim;
  Staging<Traits> const staging{shared.staging[slice], shared.largest[slice], 1 + slice, thread};

  float ds[kKeyDim / 2];
  if (a.p.dfinal_state != nullptr) {
    load_state<kKeyDim>(ds, a.p.dfinal_state + state_offset, a.p.state_v_first, a.p.value_dim, column,
                        thread);
  } else {
#pragma unroll
    for (int i = 0; i < kKeyDim / 2; ++i) ds[i] = 0.f;
  }

  for (int i = 0; i < unit.chunks; ++i) {
    int const slot = i % kStages;
    Stage& stage = shared.stages[slot];
    ChunkScalars const& scalars = stage.record.scalars;
    TileTokens const c = unit.chunk(i);
    int64_t const at = ((unit.first_chunk + unit.place(i)) * a.p.value_heads + unit.head) * value_slices +
                       column / kTileSide;
    auto& out = reinterpret_cast<ReverseRecord<Traits::kKeyTiles>*>(a.w.reverse)[at];
    // K dS is where most of the error of dbeta comes from: bf16 in two parts.
    constexpr int kParts = std::is_same_v<T, __half> ? 1 : 2;
    uint32_t state[kParts][kKeyDim / 4];
    wgmma_wait<0>();  // of nothing: tells ptxas, which does not see it across the loop's edge
    pin(ds);
    pack_all<T>(state[0], ds);
    if constexpr (kParts == 2) {
#pragma unroll
      for (int j = 0; j < kKeyDim / 4; ++j) {
        float2 const high = unpack<T>(state[0][j]);
        state[1][j] = pack<T>(ds[2 * j] - high.x, ds[2 * j + 1] - high.y);
      }
    }
    shared.loaded[slot].wait((i / kStages) & 1);
    if (c.count < kChunk) {
      clear_tail<Traits::kKeyTiles>(stage.k, c.count, thread);
      clear_tail<Traits::kKeyTiles>(stage.q, c.count, thread);
      clear_tail<1>(stage.values[slice], c.count, thread);
      named_barrier(kStateBarrier, Traits::kStateThreads);
    }
    uint32_t dout[kChunk / 4];
    load_values(dout, stage.values[slice], warp, lane);
    float kds[kChunk / 2], du[kChunk / 2];
    {
      uint64_t const k = k_major(stage.k), scores = row_major(stage.record.scores);
#pragma unroll
      for (int part = 0; part < kParts; ++part) pin(state[part]);
      pin(dout);
      pin(kds);
      pin(du);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kKeyDim / 16; ++j) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          wgmma<T, kChunk>(kds, state[part] + 4 * j, k + k_step(j), j + part > 0);
      }
#pragma unroll
      for (int j = 0; j < kChunk / 16; ++j) {
        wgmma<T, kChunk, Major::MN>(du, dout + 4 * j, scores + j * kRowStep, j > 0);
      }
      wgmma_commit();
    }
    Scale state_scale(0), dout_scale(0);
    staging.acquire(largest_of(ds), largest_of<T>(dout), state_scale, dout_scale);
    staging.put_state(ds, state_scale.factor, warp, lane);
    staging.publish();
    store_bytes(out.dstate, staging.tiles, Traits::kKeyTiles * kTileBytes, thread == 0);
    scale_all(ds, scalars.decay);
    wgmma_wait<0>();
    pin(kds);
    pin(du);
    for_tokens(lane, [&](int token, int j) {
      float2 const to_end = pair_at(scalars.k_out, token);
      du[j] += to_end.x * kds[j];
      du[j + 1] += to_end.y * kds[j + 1];
    });
    for_tokens(lane, [&](int token, int j) {
      float2 const in = pair_at(scalars.q_in, token), x = unpack<T>(dout[j / 2]);
      dout[j / 2] = pack<T>(in.x * x.x, in.y * x.y);
    });
    pin(dout);
    pin(ds);
    subtract_n<Major::MN>(du, scalars, row_major(stage.record.negative_n), lane, [&] {
      uint64_t const q = row_major(stage.q);
#pragma unroll
      for (int j = 0; j < kChunk / 16; ++j) {
        wgmma<T, kKeyDim, Major::MN>(ds, dout + 4 * j, q + j * kRowStep, true);
      }
      wgmma_commit();
      wgmma_wait<1>();
    });
    uint32_t rho[kChunk / 4], left[kChunk / 4];  // left: -e^G dV
    for_tokens(lane, [&](int token, int j) {
      float2 const in = pair_at(scalars.k_in, token), b = pair_at(scalars.strength, token);
      left[j / 2] = pack<T>(-in.x * (b.x * du[j]), -in.y * (b.y * du[j + 1]));
    });
    {
      uint64_t const k = row_major(stage.k);
      pin(left);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kChunk / 16; ++j) {
        wgmma<T, kKeyDim, Major::MN>(ds, left + 4 * j, k + j * kRowStep, true);
      }
      wgmma_commit();
    }
    wait_stores<1>();
    if (thread == 0) publish_done(shared.done[slice], i);
    Scale const token_scale = staging.acquire(largest_of(du));
    pack_all<__half>(rho, du, token_scale.factor);
    stage_values(rho, staging.tiles, warp, lane);
    staging.publish();
    wgmma_wait<0>();
    pin(ds);
    if (c.count < kChunk) {
      store_rows<T>(staging.tiles, a.p.dv, c, unit.head, column, thread);
      asm volatile("fence.proxy.async;" ::: "memory");  // gradients that follow load it by the copy engine
    } else if (thread == 0) {
      store_tile(maps.dv, staging.tiles, column, unit.head, c.begin, c.row);
    }
    if (thread == 0) a.w.reverse_units[at] = {state_scale.unit, token_scale.unit, dout_scale.unit};
    shared.released[slot].arrive();
  }
  if (a.p.dinitial_state != nullptr) {
    store_state<kKeyDim>(ds, a.p.dinitial_state + state_offset, a.p.state_v_first, a.p.value_dim, column,
                         thread);
  }
  wait_stores<0>();
  named_barrier(staging.barrier, kWarpgroup);  // all threads have stored their rows
  if (thread == 0) publish_done(shared.done[slice], unit.chunks);
}

template <class Traits, class Stage, bool kFollowed>
__device__ void scan(char* dynamic_shared, BackwardLaunch const& a, BackwardMaps const& maps,
                     ScanUnit const& unit) {
  constexpr int kStages = Traits::template kStages<Stage>;
  auto& shared = aligned_shared<typename Traits::template Shared<Stage>>(dynamic_shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      shared.loaded[i].init(1);
      shared.released[i].init(Traits::kSlices * kWarpgroup);
    }
    for (int& done : shared.done) done = 0;
    fence_barrier_init();
  }
  __syncthreads();
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  constexpr bool kMovesRegisters = kFollowed || Traits::kSlices > 1;
  if (group >= Traits::kSlices) {
    if (kMovesRegisters && group < blockDim.x / kWarpgroup) shrink_registers<Traits::kLoadRegisters>();
    int const helper = group == Traits::kSlices ? thread : -1;
    if (helper == 0) load_chunks<Traits, Stage>(shared, a, maps, unit);
    if (kFollowed && helper > 0 && helper % 32 == 0 && helper / 32 <= Traits::kSlices) {
      int const slice = helper / 32 - 1;
      announce_done(
          shared.done[slice], unit.chunks,
          a.w.progress + progress_index(a.p, unit.reverse, unit.state, unit.column / kTileSide + slice));
    }
    return;
  }
  if constexpr (kMovesRegisters) grow_registers<Traits::kStateRegisters>();
  if constexpr (std::is_same_v<Stage, typename Traits::ReverseStage>) {
    scan_reverse<Traits>(shared, a, maps, unit, group, thread);
  } else {
    scan_forward<Traits>(shared, a, unit, group, thread);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    scan_kernel(__grid_constant__ BackwardLaunch const a, __grid_constant__ BackwardMaps const maps) {
  extern __shared__ char dynamic_shared[];
  ScanUnit const unit = scan_unit(a, Traits::kSlices * kTileSide);
  if (unit.reverse) {
    scan<Traits, typename Traits::ReverseStage, false>(dynamic_shared, a, maps, unit);
  } else {
    scan<Traits, typename Traits::ForwardStage, false>(dynamic_shared, a, maps, unit);
  }
}

}  // namespace lt2::gdn::sm90::backward_pass
