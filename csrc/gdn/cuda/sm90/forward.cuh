// The chunked forward pass: one block per segment of a sequence, value head and kSlices x 64 value columns.
// Helpers load k and q, and prepare tiles of two chunks ahead of time (forward_helpers.cuh); each state
// warpgroup keeps S^T [64 x K] of its columns in the registers that wgmma accumulates in, and chains the
// products of a chunk through them:
//   W = V - e^G K S;  U = T~ W;  O = scale e^G Q S + P U;  S <- e^(G_last) S + (e^(G_last - G) K)^T U
// All of it is transposed (value columns are the rows of every product), so that S, W and U are operands from
// registers. Operands have the type of the inputs, which bounds their range, but for P U: it cancels where
// keys repeat, so it is in fp16, U times a power of two. So does what S gains: with bf16 inputs and kFolds it
// is a product of the same U with keys in fp16, which helpers have made, and S is kept times that power of
// two; without kFolds it is a pair of bf16 that add up.
#pragma once

#include "gdn/cuda/sm90/forward_helpers.cuh"

namespace lt2::gdn::sm90 {

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
      s[i] = state[k * value_dim + v];
      s[i + 1] = state[(k + 1) * value_dim + v];
    }
  });
}

template <int kKeyDim>
__device__ void store_state(float const (&s)[kKeyDim / 2], float* state, bool v_first, int value_dim,
                            int column, int thread) {
  if (v_first) {
    for_state_elements<kKeyDim>(column, thread, [&](int i, int v, int k) {
      *reinterpret_cast<float2*>(state + int64_t{v} * kKeyDim + k) = float2{s[i], s[i + 1]};
    });
  } else {
    float* row = state + thread % 4 * 2 * value_dim + column + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int n = 0; n < kKeyDim / 8; ++n) {
      float* const next = row + value_dim;
      row[0] = s[4 * n];
      next[0] = s[4 * n + 1];
      row[8] = s[4 * n + 2];
      next[8] = s[4 * n + 3];
      row += 8 * value_dim;
    }
  }
}

// Byte offset, in a tile [tokens x 64 values], of the matrix rows that lane `lane` names for the fragments of
// tokens 8 n .. 8 n + 15 and the warp's 16 values; it is 8 n kTokenBytes more than for the first.
__device__ __forceinline__ int value_offset(int token, int warp, int lane) {
  return tile_offset(token + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);
}
inline constexpr int kTokenBytes = 128;

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

__device__ __forceinline__ void load_values(ChunkValues& x, uint32_t values, float const* k_in, int lane) {
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    uint32_t v[4];
    load_matrices_transposed(v, values + 8 * n * kTokenBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) x.v[2 * n + i] = v[i];
  }
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n)
    x.k_in[n] = *reinterpret_cast<float2 const*>(k_in + 8 * n + 2 * (lane % 4));
}

// W = V - k_in (K S) of that chunk; tokens from its `count`-th on write nothing.
template <class T>
__device__ __forceinline__ void residuals(uint32_t (&w)[kChunk / 4], float const* ks,
                                          ChunkValues const& values, int count, int lane) {
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
  if (count < kChunk) [[unlikely]] {
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      int const token = 8 * n + 2 * (lane % 4);
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

// Pairs of bf16 times a power of two.
template <int kCount>
__device__ __forceinline__ void scale_packed(uint32_t (&x)[kCount], int biased) {
  uint32_t const factor = biased << 7 | biased << 23;
#pragma unroll
  for (uint32_t& y : x) asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(y) : "r"(factor));
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

// Calls `multiply` with powers of two whose product is 2^exponent.
template <class F>
__device__ __forceinline__ void for_steps(int exponent, F const& multiply) {
#pragma unroll 1
  while (exponent != 0) {
    int const step = max(min(exponent, 120), -120);
    multiply(power_of_two(127 + step));
    exponent -= step;
  }
}

inline constexpr int kScaleSlack = 4;  // how far below the most a scale may be

// The largest scale of S (biased exponent) at which a warp's |U| = |T~ W| is at most 2^15: from the packed
// bf16 W, which has that of `scale`, and the largest |T~|. Without a finite W there is nothing to fit.
__device__ __forceinline__ int most_scale(uint32_t const (&w)[kChunk / 4], float most, int scale) {
  uint32_t largest[2] = {w[0], w[1]};
#pragma unroll
  for (int i = 2; i < kChunk / 4; ++i)
    asm("max.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(largest[i % 2]) : "r"(w[i]));
  asm("max.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(largest[0]) : "r"(largest[1]));
  uint32_t bits = largest[0] & 0x7fff7fffu;
  bits = max(bits, bits << 16);
  int const exponent = __reduce_max_sync(0xffffffffu, bits < 0x7f800000u ? bits : 0) >> 23;
  // 32 products, each less than 2^(exponent + 1) times 2^(that of T~ + 1).
  int const fits = scale + 15 - 7 + 2 * 127 - exponent - static_cast<int>(__float_as_uint(most) >> 23);
  return exponent == 0 ? scale : min(max(fits, 20), 220);
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
  constexpr bool kFolds = Traits::kFolds, kShares = Traits::kShares;
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
  } else if (thread == 0 && unit.tiles > 0) {
    load_v(0);
    if (unit.tiles > 1) load_v(1);
  }

  float s[kKeyDim / 2];
  float const* initial = unit.initial;
  if constexpr (kOutputs && Traits::kCuts) {
    wait_for_previous_kernel();
    if (unit.before >= 0 && a.segments.first_tiles[unit.before] != kWhole)
      initial = a.segments.ends + int64_t{unit.before} * kKeyDim * a.p.value_dim;
  }
  if (initial != nullptr) {
    load_state<kKeyDim>(s, initial, unit.initial_v_first, a.p.value_dim, column, thread);
  } else {
    int const diagonal = column - a.p.value_dim;
    for_state_elements<kKeyDim>(diagonal, thread, [&](int i, int v, int k) {
      s[i] = of_keys && v == k ? 1.f : 0.f;
      s[i + 1] = of_keys && v == k + 1 ? 1.f : 0.f;
    });
  }

  uint32_t own_values = shared_address(shared.v[slice]) + value_offset(0, warp, lane);
  asm volatile("" : "+r"(own_values));
  auto const values_at = [&](int i, int part) {
    return own_values + i % 2 * kTileBytes + part * (kChunk * kTokenBytes);
  };
  // S is kept times a power of two, by which U (times kGainUnit) fits into fp16; this is its biased exponent.
  int scale = 127;
  uint32_t packed[kChunk / 4];  // of the output of a chunk, which goes where its values were
  auto const put_output = [&](int i, int part, bool puts) {
    uint32_t const to = values_at(i, part);
#pragma unroll
    for (int n = 0; n < kChunk / 8; n += 2) {
      store_matrices_transposed_if(puts, to + 8 * n * kTokenBytes, packed[2 * n], packed[2 * n + 1],
                                   packed[2 * n + 2], packed[2 * n + 3]);
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
  auto const release = [&](Barrier& barrier) {
    __syncwarp();  // the reads of all lanes
    if (lane == 0) barrier.arrive();
  };
  auto const release_prepared = [&](int i) {
    Barrier& released = shared.released[i % kPrepared];
    if constexpr (kShares) {
      int const next = i + kPrepared;
      // Who prepares there next waits. The warp's threads arrive each, in another block by one for all.
      int const to = Traits::kAside ? Traits::kStateBlocks : next % Traits::kCluster;
      if (next < unit.tiles) {
        if (!Traits::kAside && to == cluster_rank()) {
          released.arrive();
        } else {
          __syncwarp();
          if (lane == 0) released.arrive_at(to, 32);
        }
      }
    } else {
      release(released);
    }
  };
  auto const chunk = [&](int i, int part) {
    int const first = part * kChunk, stage = i % kStages, prepared = i % kPrepared;
    uint64_t const rows = part * (kChunk * 128 >> 4);  // of descriptors: the chunk's rows of a tile
    PreparedTile const& tile = shared.tiles[prepared];
    TileScalars const& scalars = tile.scalars;
    if (!kFolds && !kShares && part == 0) wait_prepared(i);
    if constexpr (kShares) shared.chunk_loaded[stage][part].wait((i / kStages) & 1);
    constexpr int kRows = kOutputs ? 2 * kChunk : kChunk;
    float sums[kRows / 2];  // K S, then Q S
    {
      uint64_t const qk = k_major(shared.qk[stage][part]);
      pin(fragments);
      pin(sums);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kKeySteps; ++j) {
        wgmma<T, kRows>(sums, fragments + 4 * j, qk + k_step(j), j > 0);
        if constexpr (kOutputs && !kFolds) {
          if (j == 1) put_output(part == 0 ? i - 1 : i, 1 - part, i + part > 0);
        }
      }
      wgmma_commit();
    }
    if (kShares && !kFolds && part == 0) wait_prepared(i);  // the products above need none of it
    float const decay = scalars.decay[part];
    if constexpr (kOutputs) {
      if (part == 0 && i > 0) send_output(i - 1);
    }
    if (part == 0 && !of_keys) shared.v_loaded[slice][i % 2].wait((i / 2) & 1);
    ChunkValues values;
    load_values(values, values_at(i, part), scalars.k_in + first, lane);
    if constexpr (kFolds) scale_packed(values.v, scale - kGainExponent);
    wgmma_wait<0>();
    pin(sums);
    uint32_t w[kChunk / 4];
    residuals<T>(w, sums, values, unit.tokens - i * kTileSide - first, lane);

    float parts[kChunk];  // of U: from the high parts of T~, and from the low ones
    {
      uint64_t const inverse = k_major(tile.inverse) + k_step(2) * part;
      pin(w);
      pin(parts);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < kChunkSteps; ++j)
        wgmma<T, 2 * kChunk>(parts, w + 4 * j, inverse + k_step(j), j > 0);
      wgmma_commit();
    }
    [[maybe_unused]] int rescale = 0;  // by which power of two S has changed since W
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
        rescale = goal - scale;
        for_steps(rescale, [&](float factor) {
#pragma unroll
          for (float& x : s) x *= factor;
          if constexpr (kOutputs) {
#pragma unroll
            for (float& x : o) x *= factor;
          }
        });
        scale = goal;
      }
    }
    if constexpr (kFolds && kShares) {
      release(shared.chunk_read[stage][part]);
    } else if (kFolds && part == kTileChunks - 1) {
      release(shared.read[stage]);
    }
    float2 k_out[kChunk / 8];
    if constexpr (!kFolds) {
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n)
        k_out[n] = *reinterpret_cast<float2 const*>(scalars.k_out + first + 8 * n + 2 * (lane % 4));
    }
    wgmma_wait<0>();
    pin(parts);
    float u[kChunk / 2];
#pragma unroll
    for (int j = 0; j < kChunk / 2; ++j) u[j] = parts[j] + parts[kChunk / 2 + j];
    uint32_t written[kChunk / 4];
    float unrange = 1.f;  // of o
    auto const gain = [&] {
      if constexpr (kFolds) {
        uint64_t const k = row_major(shared.gains[i % Traits::kGains]) + rows;
#pragma unroll
        for (int j = 0; j < kChunkSteps; ++j)
          wgmma<__half, kKeyDim, Major::MN>(s, written + 4 * j, k + j * kRowStep, true);
      } else {
        float left[kChunk / 2];
#pragma unroll
        for (int j = 0; j < kChunk / 2; ++j) left[j] = u[j] * (j % 2 == 0 ? k_out[j / 4].x : k_out[j / 4].y);
        uint64_t const k = row_major(shared.qk[stage][part]);
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
      uint64_t const scores = k_major(tile.scores) + k_step(2) * part;
#pragma unroll
      for (int j = 0; j < kChunkSteps; ++j)
        wgmma<__half, kChunk>(o, written + 4 * j, scores + k_step(j), true);
      wgmma_commit();
    };
    if constexpr (kFolds) {
      if (rescale != 0) [[unlikely]] {
        for_steps(rescale, [&](float factor) {
#pragma unroll
          for (float& x : u) x *= factor;
        });
      }
      pack_all<__half>(written, u);
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
      pack_all<T>(packed, o);
      scale_packed(packed, 254 - scale + kGainExponent);
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
    if constexpr (kShares && !kFolds) release(shared.chunk_read[stage][part]);
    if (part == kTileChunks - 1) {
      if (!kFolds && !kShares) release(shared.read[stage]);
      release_prepared(i);
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
  // What is launched next reads before it waits what is older than this kernel.
  constexpr bool kNextReads = Traits::kAside || Traits::kPass == Pass::kMaps;
  if constexpr (!kNextReads) let_next_kernel_start();
  // Only the states of segments read what the kernels since the plan wrote, which began after all before it.
  // What runs beside the kernel before reads nothing of it. What the block works on is read from memory in
  // maps and where sequences have lengths of their own.
  bool const of_segments = Traits::kPass == Pass::kOutputs && Traits::kCuts && a.segments.span != 0;
  bool const beside = Traits::kAside && a.first_slice > 0;
  if (Traits::kPass == Pass::kMaps || (!of_segments && !beside && a.p.cu_seqlens != nullptr))
    wait_for_previous_kernel();
  ForwardUnit const unit = forward_unit<Traits>(a, shared.counts);
  if (threadIdx.x == 0) {
    for (Barrier& b : shared.loaded) b.init(1);
    for (Barrier& b : shared.read) b.init(unit.slices * 4);
    for (Barrier& b : shared.released)
      b.init(Traits::kShares ? Traits::kClusterSlices * kWarpgroup : unit.slices * 4);
    for (Barrier& b : shared.prepared) b.init(kWarpgroup);
    for (auto& slice : shared.v_loaded) {
      for (Barrier& b : slice) b.init(1);
    }
    if constexpr (Traits::kShares) {
      for (auto& chunks : shared.chunk_loaded) {
        for (Barrier& b : chunks) b.init(1);
      }
      for (auto& chunks : shared.chunk_read) {
        for (Barrier& b : chunks) b.init(unit.slices * 4);
      }
      for (Barrier& b : shared.own_loaded) b.init(1);
      for (Barrier& b : shared.own_read) b.init(4);
      shared.tail_loaded.init(1);
    }
    fence_barrier_init();
  }
  // What is above the diagonals of T~ and P is not written again.
  for (PreparedTile& tile : shared.tiles) {
    for (int i = threadIdx.x; i < kPreparedBytes / 16; i += Traits::kThreads)
      reinterpret_cast<uint4*>(&tile)[i] = uint4{};
  }
  fence_async_shared();
  if (!of_segments && !beside) wait_for_previous_kernel();
  if constexpr (kNextReads) let_next_kernel_start();
  if constexpr (Traits::kShares) {
    int const rank = cluster_rank(), lane = thread % 32, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    cluster_sync();  // the barriers of all blocks
    bool const has_states = !Traits::kAside || rank < Traits::kStateBlocks;
    bool const has_helpers = !Traits::kAside || !has_states;
    int const first_state = Traits::kAside ? 0 : Traits::kHelpers;  // warpgroup
    if (group >= (has_states ? first_state + Traits::kSlices : Traits::kHelpers)) {
      shrink_registers<Traits::kLoaderRegisters>();
      if (group == Traits::kGroups - 1) {
        if (has_states && warp == 0) load_for_states<Traits>(shared, maps, unit, lane);
        if (has_helpers && warp > 0 && warp <= Traits::kHelpers)
          load_for_helper<Traits>(shared, maps, unit, rank, warp - 1, lane);
      }
    } else if (has_helpers && group < Traits::kHelpers) {
      grow_registers<Traits::kHelperRegisters>();
      prepare_shared_tiles<Traits>(shared, a, unit, rank, group, thread);
    } else {
      grow_registers<Traits::kStateRegisters>();
      int const slice = Traits::kSlices == 1 ? 0 : group - first_state;
      if (Traits::kSlices == 1 || slice < unit.slices)
        scan_tiles<Traits>(shared, a, maps, unit, slice, thread);
    }
    __syncwarp();
    cluster_sync();                          // all that is sent from here has arrived
    if (beside) wait_for_previous_kernel();  // what waits for this kernel waits for both
  } else {
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
}

}  // namespace lt2::gdn::sm90
