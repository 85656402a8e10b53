// The chunked forward pass in one launch: one block per segment of a sequence, value head and kSlices x 64
// value columns. A helper warpgroup loads k and q, and prepares each chunk (chunk.cuh) one ahead; each state
// warpgroup keeps S^T [64 x K] of its columns in the registers that wgmma accumulates in, and chains the
// products through them:
//   W = V - e^G K S      U = T~ W      O = scale e^G Q S + P U      S <- e^(G_last) S + (e^(G_last - G) K)^T
//   U
// All of it is transposed (value columns are the rows of every product), so that S, W and U are operands from
// registers.
#pragma once

#include "gdn/cuda/sm90/chunk.cuh"

namespace lt2::gdn::sm90 {

template <class T_, int kKeyDim_, int kSlices_>
struct ForwardTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;  // 64, 96, 128, 192
  static constexpr int kSlices = kSlices_;  // state warpgroups
  static constexpr int kKeyTiles = (kKeyDim + kTileSide - 1) / kTileSide;
  static constexpr int kStages = 3;  // of k: in use, being prepared, arriving
  static constexpr int kStateThreads = kSlices * kWarpgroup;
  static constexpr int kThreads = kStateThreads + kWarpgroup;
  // With two state warpgroups, registers a thread: of 168 at launch the helpers give up what the others need.
  static constexpr int kHelperRegisters = 88, kStateRegisters = 208;

  struct Shared {
    alignas(1024) char k[kStages][kKeyTiles * kTileBytes];
    char q[2][kKeyTiles * kTileBytes];  // two suffice: the states read q early
    char v[kSlices][2][kTileBytes];     // then the output of the same chunk
    char inverse[2][kInverseParts<T> * kTileBytes];
    char scores[2][kTileBytes];
    ChunkScratch scratch;
    ChunkScalars scalars[2];
    Barrier k_loaded[kStages], q_loaded[2], v_loaded[kSlices][2], prepared[2], q_read[2], released[2];
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
  int slice_groups;
};

// What a block works on.
struct ForwardUnit {
  int sequence, row, begin, tokens;
  int head, qk_head, column;  // value head, its query/key head, first value column
  int chunks;

  __device__ ChunkTokens chunk(int i) const {
    return {row, begin + i * kChunk, min(tokens - i * kChunk, kChunk)};
  }
};

__device__ inline ForwardUnit forward_unit(ForwardLaunch const& a, int columns) {
  int const group = blockIdx.x % a.slice_groups, unit = blockIdx.x / a.slice_groups;
  int const head = unit % a.p.value_heads, n = unit / a.p.value_heads;
  portable::Sequence const s = portable::sequence(a.p, n);
  int const tokens = static_cast<int>(s.length);
  return {n,
          static_cast<int>(s.row),
          static_cast<int>(s.begin),
          tokens,
          head,
          head / (a.p.value_heads / a.p.heads),
          group * columns,
          (tokens + kChunk - 1) / kChunk};
}

template <int kTiles>
__device__ void load_tiles(char* tiles, CUtensorMap const& map, int head, ChunkTokens const& c,
                           Barrier& loaded) {
  loaded.arrive_expecting(kTiles * kTileBytes);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    load_tile(tiles + tile * kTileBytes, map, tile * kTileSide, head, c.begin, c.row, loaded);
  }
}

// The helper warpgroup.
template <class Traits>
__device__ void prepare_chunks(typename Traits::Shared& shared, ForwardLaunch const& a,
                               ForwardMaps const& maps, ForwardUnit const& unit, int thread) {
  using T = typename Traits::T;
  constexpr int kTiles = Traits::kKeyTiles, kStages = Traits::kStages;
  auto const load_k = [&](int i) {
    load_tiles<kTiles>(shared.k[i % kStages], maps.k, unit.qk_head, unit.chunk(i),
                       shared.k_loaded[i % kStages]);
  };
  auto const load_q = [&](int i) {
    load_tiles<kTiles>(shared.q[i % 2], maps.q, unit.qk_head, unit.chunk(i), shared.q_loaded[i % 2]);
  };
  if (unit.chunks == 0) return;
  if (thread < 32) request_gates(a.p, unit.chunk(0), unit.head, thread, shared.scratch);
  if (thread == 0) {
    load_k(0);
    load_q(0);
  }
  for (int i = 0; i < unit.chunks; ++i) {
    int const slot = i % 2, next = i + 1;
    // What follows from the thread's number is cheaper to compute again than to keep from chunk to chunk in
    // the few registers there are.
    asm volatile("" : "+r"(thread));
    ChunkScalars& s = shared.scalars[slot];
    int const count = unit.chunk(i).count;
    if (i >= 2) shared.released[slot].wait((i / 2 - 1) & 1);
    if (thread < 32) {
      scan_gates(a.p, count, unit.head, thread, shared.scratch, s);
      if (next < unit.chunks) {
        request_gates(a.p, unit.chunk(next), unit.head, thread, shared.scratch);
        if (thread == 0) load_k(next);
      }
    }
    shared.k_loaded[i % kStages].wait((i / kStages) & 1);
    shared.q_loaded[slot].wait((i / 2) & 1);
    prepare_chunk<T, Traits::kKeyDim>(a.p, count, shared.k[i % kStages], shared.q[slot], s, shared.scratch,
                                      shared.inverse[slot], shared.scores[slot], thread, [&] {
                                        if (thread != 0 || next >= unit.chunks) return;
                                        if (next >= 2) shared.q_read[next % 2].wait((next / 2 - 1) & 1);
                                        load_q(next);
                                      });
    shared.prepared[slot].arrive();
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

// Tile [tokens x 64 values] <- O^T, packed, each warp the 16 values that it owns.
__device__ __forceinline__ void stage_output(uint32_t const (&o)[kChunk / 4], char* tile, int warp,
                                             int lane) {
  uint32_t const address = shared_address(tile);
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    store_matrices_transposed(address + tile_offset((n + lane / 16) * 8 + lane % 8, warp * 2 + lane / 8 % 2),
                              o[2 * n], o[2 * n + 1], o[2 * n + 2], o[2 * n + 3]);
  }
}

// The first `count` rows of a tile, where a tensor map would also write the sequence that follows.
template <class T>
__device__ void store_rows(char const* tile, Strided const& o, ChunkTokens const& c, int head, int column,
                           int thread) {
  for (int i = thread; i < c.count * 8; i += kWarpgroup) {
    T* const row = portable::token_row<T>(o, c.row, c.begin + i / 8, head);
    *reinterpret_cast<uint4*>(row + column + i % 8 * 8) =
        *reinterpret_cast<uint4 const*>(tile + tile_offset(i / 8, i % 8));
  }
}

// W = V - k_in (K S), as fragments; tokens that are not there write nothing.
template <class T>
__device__ __forceinline__ void residuals(uint32_t (&w)[kChunk / 4], float const (&ks)[kChunk / 2],
                                          char const* v_tile, float const* k_in, int count, int warp,
                                          int lane) {
  uint32_t const address = shared_address(v_tile);
  int const t = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    uint32_t v[4];
    load_matrices_transposed(v,
                             address + tile_offset((n + lane / 16) * 8 + lane % 8, warp * 2 + lane / 8 % 2));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float2 const g = *reinterpret_cast<float2 const*>(k_in + 8 * (n + j) + t);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 const x = unpack<T>(v[2 * j + half]);
        int const i = 4 * (n + j) + 2 * half;
        w[2 * (n + j) + half] = pack<T>(x.x - g.x * ks[i], x.y - g.y * ks[i + 1]);
      }
    }
  }
  if (count < kChunk) {
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      uint32_t const mask = (8 * n + t < count ? 0xffffu : 0u) | (8 * n + t + 1 < count ? 0xffff0000u : 0u);
      w[2 * n] &= mask;
      w[2 * n + 1] &= mask;
    }
  }
}

// x[.., token] *= factor[token].
__device__ __forceinline__ void scale_tokens(float (&x)[kChunk / 2], float const* factor, int lane) {
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
__device__ __forceinline__ void pack_all(uint32_t (&a)[kCount / 2], float const (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) a[i] = pack<T>(x[2 * i], x[2 * i + 1]);
}

// A state warpgroup.
template <class Traits>
__device__ void scan_chunks(typename Traits::Shared& shared, ForwardLaunch const& a, ForwardMaps const& maps,
                            ForwardUnit const& unit, int slice, int thread) {
  using T = typename Traits::T;
  constexpr int kKeyDim = Traits::kKeyDim, kKeySteps = kKeyDim / 16, kStages = Traits::kStages;
  int const warp = thread / 32, lane = thread % 32;
  int const barrier = 2 + slice;
  int const column = unit.column + slice * kTileSide;
  auto const load_v = [&](int i) {
    Barrier& loaded = shared.v_loaded[slice][i % 2];
    ChunkTokens const c = unit.chunk(i);
    loaded.arrive_expecting(kTileBytes);
    load_tile(shared.v[slice][i % 2], maps.v, column, unit.head, c.begin, c.row, loaded);
  };
  if (thread == 0) {
    load_v(0);
    if (unit.chunks > 1) load_v(1);
  }

  int64_t const state_index =
      (int64_t{unit.sequence} * a.p.value_heads + unit.head) * kKeyDim * a.p.value_dim;
  float s[kKeyDim / 2];
  if (a.p.initial_state != nullptr) {
    load_state<kKeyDim>(s, a.p.initial_state + state_index, a.p.state_v_first, a.p.value_dim, column, thread);
  } else {
#pragma unroll
    for (int i = 0; i < kKeyDim / 2; ++i) s[i] = 0.f;
  }

  float ks[kChunk / 2], o[kChunk / 2] = {};
  auto const store_output = [&](uint32_t const(&packed)[kChunk / 4], int i) {
    char* const tile = shared.v[slice][i % 2];
    stage_output(packed, tile, warp, lane);
    fence_async_shared();
    named_barrier(barrier, kWarpgroup);
    ChunkTokens const c = unit.chunk(i);
    if (c.count < kChunk) {
      store_rows<T>(tile, a.o, c, unit.head, column, thread);
    } else if (thread == 0) {
      store_tile(maps.o, tile, column, unit.head, c.begin, c.row);
    }
  };

  for (int i = 0; i < unit.chunks; ++i) {
    int const slot = i % 2, stage = i % kStages;
    ChunkScalars const& scalars = shared.scalars[slot];
    uint32_t fragments[kKeyDim / 4];  // of S^T
    pack_all<T>(fragments, s);
    shared.prepared[slot].wait((i / 2) & 1);
    {
      uint64_t const k = k_major(shared.k[stage]);
      pin(fragments);
      pin(ks);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kKeySteps; ++j) wgmma<T, kChunk>(ks, fragments + 4 * j, k + k_step(j), j > 0);
      wgmma_commit();
    }
    wgmma_wait<1>();  // P U of the chunk before
    pin(o);
    uint32_t packed[kChunk / 4];
    pack_all<T>(packed, o);
    if (i > 0) {
      if (lane == 0) shared.released[1 - slot].arrive();
      store_output(packed, i - 1);
    }
    {
      uint64_t const q = k_major(shared.q[slot]);
      pin(o);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kKeySteps; ++j) wgmma<T, kChunk>(o, fragments + 4 * j, q + k_step(j), j > 0);
      wgmma_commit();
    }
    shared.v_loaded[slice][slot].wait((i / 2) & 1);
    wgmma_wait<1>();
    pin(ks);
    uint32_t w[kChunk / 4];
    residuals<T>(w, ks, shared.v[slice][slot], scalars.k_in, unit.chunk(i).count, warp, lane);

    float u[kChunk / 2];
    {
      uint64_t const inverse = k_major(shared.inverse[slot]);
      pin(w);
      pin(u);
      wgmma_begin();
#pragma unroll
      for (int part = 0; part < kInverseParts<T>; ++part) {
#pragma unroll
        for (int j = 0; j < kChunk / 16; ++j) {
          wgmma<T, kChunk>(u, w + 4 * j, inverse + part * (kTileBytes >> 4) + k_step(j), part + j > 0);
        }
      }
      wgmma_commit();
    }
    wgmma_wait<1>();
    pin(o);
    if (lane == 0) shared.q_read[slot].arrive();
    scale_tokens(o, scalars.q_in, lane);
    float const decay = scalars.decay;
#pragma unroll
    for (int j = 0; j < kKeyDim / 2; ++j) s[j] *= decay;
    if (thread == 0 && i > 0 && i + 1 < unit.chunks) {
      wait_stores_read();
      load_v(i + 1);
    }
    wgmma_wait<0>();
    pin(u);
    uint32_t left[kChunk / 4], written[kChunk / 4];
    pack_all<T>(written, u);
    scale_tokens(u, scalars.k_out, lane);
    pack_all<T>(left, u);
    {
      uint64_t const k = row_major(shared.k[stage]), scores = k_major(shared.scores[slot]);
      pin(left);
      pin(written);
      pin(s);
      pin(o);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kChunk / 16; ++j) {
        wgmma<T, kKeyDim, Major::MN>(s, left + 4 * j, k + j * kRowStep, true);
      }
      wgmma_commit();
#pragma unroll
      for (int j = 0; j < kChunk / 16; ++j) wgmma<T, kChunk>(o, written + 4 * j, scores + k_step(j), true);
      wgmma_commit();
    }
    wgmma_wait<1>();
    pin(s);
  }
  wgmma_wait<0>();
  pin(o);
  if (unit.chunks > 0) {
    uint32_t packed[kChunk / 4];
    pack_all<T>(packed, o);
    store_output(packed, unit.chunks - 1);
  }
  if (a.final_state != nullptr) {
    store_state<kKeyDim>(s, a.final_state + state_index, a.p.state_v_first, a.p.value_dim, column, thread);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(ForwardLaunch const a, __grid_constant__ ForwardMaps const maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);
  int const group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    for (Barrier& b : shared.k_loaded) b.init(1);
    for (int slot = 0; slot < 2; ++slot) {
      shared.q_loaded[slot].init(1);
      for (int slice = 0; slice < Traits::kSlices; ++slice) shared.v_loaded[slice][slot].init(1);
      shared.prepared[slot].init(kWarpgroup);
      shared.q_read[slot].init(Traits::kSlices * 4);
      shared.released[slot].init(Traits::kSlices * 4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  ForwardUnit const unit = forward_unit(a, Traits::kSlices * kTileSide);
  if (group == 0) {
    if constexpr (Traits::kSlices > 1) shrink_registers<Traits::kHelperRegisters>();
    prepare_chunks<Traits>(shared, a, maps, unit, thread);
  } else {
    if constexpr (Traits::kSlices > 1) grow_registers<Traits::kStateRegisters>();
    scan_chunks<Traits>(shared, a, maps, unit, group - 1, thread);
  }
}

}  // namespace lt2::gdn::sm90
