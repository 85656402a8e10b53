// What a warpgroup prepares of a chunk of 64 tokens before the state comes in: per-token scalars, T~ and P.
//
// With G the inclusive sum of the log decays within the chunk, E_ij = e^(G_i - G_j) for i >= j, b the writing
// strengths and kn, qn the factors that normalise k and q (ones without l2norm):
//   Ar = (I + strictlow(b_i kn_i kn_j k_i.k_j))^-1      T~_ij = E_ij Ar_ij b_j      P_ij = scale E_ij qn_i
//   kn_j q_i.k_j
// The inverse never sees the gate, so its entries stay of the size of the keys' correlations under any decay.
// T~ is kept to fp16's precision or better: one fp16, or a pair of bf16 that add up to it.
#pragma once

#include "common/cuda/sm90/wgmma.cuh"
#include "gdn/cuda/portable/problem.cuh"

namespace lt2::gdn::sm90 {

using namespace cuda;
using namespace cuda::sm90;
using portable::kNormEpsilon;

inline constexpr int kChunk = kTileSide;
inline constexpr int kHelperBarrier = 1;  // number of the named barrier of the warpgroup that prepares
// e^(-150 ln 2) is below the smallest float, so a smaller decay of one token changes nothing, and a reset
// (-inf) stays exact while sums of such decays stay finite.
inline constexpr float kLeastLog2Decay = -150.f;
inline constexpr float kLog2E = 1.4426950408889634f;

template <class T>
inline constexpr int kInverseParts = std::is_same_v<T, __half> ? 1 : 2;

// One value per token of the chunk.
struct ChunkScalars {
  float log2_decay[kChunk];  // G / ln 2
  float strength[kChunk];    // b
  float k_in[kChunk];        // e^G kn: what k sees of the state before the chunk
  float q_in[kChunk];        // scale e^G qn
  float k_out[kChunk];       // e^(G_last - G) kn: what is left of a write at the end of the chunk
  float decay;               // e^(G_last)
};

inline constexpr int kInverseRow = 68;  // floats; 4 more than 64, against bank conflicts

// Of one chunk at a time.
struct ChunkScratch {
  float inverse[kChunk * kInverseRow];
  float k_norm[kChunk], q_norm[kChunk];
  float g[kChunk], beta[kChunk];  // raw, of the next chunk
};

// Where a chunk's tokens are, and whose scalars they are.
struct ChunkTokens {
  int row, begin;  // first token
  int count;       // 1..64
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Raw g and beta of lane l's tokens, 2 l and 2 l + 1, requested before they are needed: scan_gates waits for
// them.
__device__ inline void request_gates(Inputs const& p, ChunkTokens const& c, int head, int lane,
                                     ChunkScratch& scratch) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int const i = 2 * lane + j, bytes = i < c.count ? 4 : 0;
    auto const copy = [&](float* to, Strided const& from) {
      if (from.data == nullptr) return;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                   "l"(portable::token_row<float const>(from, c.row, c.begin + (i < c.count ? i : 0), head)),
                   "r"(bytes)
                   : "memory");
    };
    copy(scratch.g + i, p.g);
    copy(scratch.beta + i, p.beta);
  }
}

// log2_decay and strength; tokens that are not there neither decay nor write. One warp.
__device__ inline void scan_gates(Inputs const& p, int count, int head, int lane, ChunkScratch const& scratch,
                                  ChunkScalars& s) {
  asm volatile("cp.async.wait_all;" ::: "memory");
  float g[2], b[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int const i = 2 * lane + j;
    float x = 0.f, y = 1.f;
    if (p.g.data != nullptr) {
      x = scratch.g[i];
      if (p.A_log != nullptr) x = portable::gate(x, p.A_log[head], p.dt_bias[head]);
      x = x < kLeastLog2Decay / kLog2E ? kLeastLog2Decay : x * kLog2E;
    }
    if (p.beta.data != nullptr) {
      y = scratch.beta[i];
      if (p.beta_sigmoid) y = sigmoid(y) * (p.neg_eigval ? 2.f : 1.f);
    }
    g[j] = i < count ? x : 0.f;
    b[j] = i < count ? y : 0.f;
  }
  float const pair = g[0] + g[1];
  float sum = pair;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float const before = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += before;
  }
  s.log2_decay[2 * lane] = sum - g[1];
  s.log2_decay[2 * lane + 1] = sum;
  s.strength[2 * lane] = b[0];
  s.strength[2 * lane + 1] = b[1];
}

// Rows `from`.. of kTiles tiles become zero.
template <int kTiles>
__device__ void clear_rows(char* tiles, int from, int thread) {
  for (int i = from * 8 + thread; i < kChunk * 8; i += kWarpgroup) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      *reinterpret_cast<uint4*>(tiles + tile * kTileBytes + i * 16) = uint4{};
  }
}

// 1 / |row| as the l2norm has it.
template <class T, int kTiles>
__device__ float row_norm(char const* tiles, int row) {
  float sum = 0.f;
#pragma unroll 1
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll 4
    for (int chunk = 0; chunk < 8; ++chunk) {
      uint4 const x = *reinterpret_cast<uint4 const*>(tiles + tile * kTileBytes + tile_offset(row, chunk));
      for (uint32_t const word : {x.x, x.y, x.z, x.w}) {
        float2 const e = unpack<T>(word);
        sum += e.x * e.x + e.y * e.y;
      }
    }
  }
  return rsqrtf(sum + kNormEpsilon);
}

// d [64 x 64] = A B^T over kKeyDim, both k_major tiles.
template <class T, int kKeyDim>
__device__ __forceinline__ void multiply_rows(float (&d)[kChunk / 2], char const* a, char const* b) {
  uint64_t const da = k_major(a), db = k_major(b);
  pin(d);
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kKeyDim / 16; ++k) wgmma<T, kChunk>(d, da + k_step(k), db + k_step(k), k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// d [16 x 8] += a [16 x 8] b [8 x 8].
__device__ __forceinline__ void mma_tf32(float (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (16 x 16, this warp's part of 32 x 32) = sign * a b, for 32 x 32 matrices with rows of kInverseRow
// floats.
__device__ inline void multiply_32(float (&d)[2][4], float const* a, float const* b, int warp, int lane) {
  int const row = warp / 2 * 16 + lane / 4, col = warp % 2 * 16 + lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < 32; k += 8) {
    uint32_t const fa[4] = {
        to_tf32(a[row * kInverseRow + k + t]), to_tf32(a[(row + 8) * kInverseRow + k + t]),
        to_tf32(a[row * kInverseRow + k + t + 4]), to_tf32(a[(row + 8) * kInverseRow + k + t + 4])};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t const fb[2] = {to_tf32(b[(k + t) * kInverseRow + col + 8 * n]),
                              to_tf32(b[(k + t + 4) * kInverseRow + col + 8 * n])};
      mma_tf32(d[n], fa, fb);
    }
  }
}

__device__ inline void store_32(float* m, float const (&d)[2][4], float sign, int warp, int lane) {
  int const row = warp / 2 * 16 + lane / 4, col = warp % 2 * 16 + 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(m + (row + 8 * half) * kInverseRow + col + 8 * n) =
          float2{sign * d[n][2 * half], sign * d[n][2 * half + 1]};
    }
  }
}

// In place: A (strictly lower, rows of kInverseRow floats) -> (I + A)^-1, its lower triangle. The two
// diagonal blocks of 32 by substitution in fp32, one column a thread; the block below them is -X2 (A21 X1),
// in tf32.
__device__ inline void invert(float* m, int thread) {
  int const warp = thread / 32, lane = thread % 32;
  float* const below = m + 32 * kInverseRow;
  if (warp < 2) {
    float* const block = m + warp * (32 * kInverseRow + 32);
    float x[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float sum[4] = {i == lane ? 1.f : 0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int k = 0; k < i; k += 4) {
        float4 const a = *reinterpret_cast<float4 const*>(block + i * kInverseRow + k);
        sum[0] -= a.x * x[k];
        if (k + 1 < i) sum[1] -= a.y * x[k + 1];
        if (k + 2 < i) sum[2] -= a.z * x[k + 2];
        if (k + 3 < i) sum[3] -= a.w * x[k + 3];
      }
      x[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 32; ++i) block[i * kInverseRow + lane] = x[i];
  }
  named_barrier(kHelperBarrier, kWarpgroup);
  float d[2][4];
  float* const product = m + 32;  // the upper right block is free
  multiply_32(d, below, m, warp, lane);
  store_32(product, d, 1.f, warp, lane);
  named_barrier(kHelperBarrier, kWarpgroup);
  multiply_32(d, below + 32, product, warp, lane);
  store_32(below, d, -1.f, warp, lane);
  named_barrier(kHelperBarrier, kWarpgroup);
}

// T~ of the inverse, to k_major tiles: high parts, then low parts.
template <class T>
__device__ void store_inverse(float const* m, ChunkScalars const& s, char* tiles, int thread) {
  int const row = thread % kChunk, first = thread / kChunk * 32;
  float const decay = s.log2_decay[row];
#pragma unroll
  for (int c = 0; c < 32; c += 8) {
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      int const col = first + c + j;
      float4 const r = *reinterpret_cast<float4 const*>(m + row * kInverseRow + col);
      float4 const g = *reinterpret_cast<float4 const*>(s.log2_decay + col);
      float4 const b = *reinterpret_cast<float4 const*>(s.strength + col);
      x[j] = col <= row ? exp2_fast(decay - g.x) * r.x * b.x : 0.f;
      x[j + 1] = col + 1 <= row ? exp2_fast(decay - g.y) * r.y * b.y : 0.f;
      x[j + 2] = col + 2 <= row ? exp2_fast(decay - g.z) * r.z * b.z : 0.f;
      x[j + 3] = col + 3 <= row ? exp2_fast(decay - g.w) * r.w * b.w : 0.f;
    }
    uint32_t high[4], low[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      high[j] = pack<T>(x[2 * j], x[2 * j + 1]);
      float2 const h = unpack<T>(high[j]);
      low[j] = pack<T>(x[2 * j] - h.x, x[2 * j + 1] - h.y);
    }
    int const offset = tile_offset(row, (first + c) / 8);
    *reinterpret_cast<uint4*>(tiles + offset) = {high[0], high[1], high[2], high[3]};
    if constexpr (kInverseParts<T> == 2) {
      *reinterpret_cast<uint4*>(tiles + kTileBytes + offset) = {low[0], low[1], low[2], low[3]};
    }
  }
}

// The strictly lower part of b_i kn_i kn_j k_i.k_j, from the accumulators of K K^T.
__device__ inline void store_correlations(float const (&kk)[kChunk / 2], ChunkScalars const& s,
                                          ChunkScratch& scratch, int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = warp * 16 + lane / 4 + 8 * half;
    float const factor = s.strength[row] * scratch.k_norm[row];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      int const col = 8 * n + 2 * (lane % 4);
      float2 const norm = *reinterpret_cast<float2 const*>(scratch.k_norm + col);
      *reinterpret_cast<float2*>(scratch.inverse + row * kInverseRow + col) =
          float2{col < row ? factor * norm.x * kk[4 * n + 2 * half] : 0.f,
                 col + 1 < row ? factor * norm.y * kk[4 * n + 2 * half + 1] : 0.f};
    }
  }
}

// P from the accumulators of Q K^T, to a k_major tile.
template <class T>
__device__ void store_scores(float (&qk)[kChunk / 2], ChunkScalars const& s, ChunkScratch const& scratch,
                             float scale, char* tile, int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = warp * 16 + lane / 4 + 8 * half;
    float const factor = scale * scratch.q_norm[row], decay = s.log2_decay[row];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      int const col = 8 * n + 2 * (lane % 4);
      float2 const norm = *reinterpret_cast<float2 const*>(scratch.k_norm + col);
      float2 const g = *reinterpret_cast<float2 const*>(s.log2_decay + col);
      float& x = qk[4 * n + 2 * half];
      float& y = qk[4 * n + 2 * half + 1];
      x = col <= row ? factor * norm.x * exp2_fast(decay - g.x) * x : 0.f;
      y = col + 1 <= row ? factor * norm.y * exp2_fast(decay - g.y) * y : 0.f;
    }
  }
  uint32_t const address = shared_address(tile);
  int const row = warp * 16 + lane % 16;
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    store_matrices(address + tile_offset(row, n + lane / 16), pack<T>(qk[4 * n], qk[4 * n + 1]),
                   pack<T>(qk[4 * n + 2], qk[4 * n + 3]), pack<T>(qk[4 * n + 4], qk[4 * n + 5]),
                   pack<T>(qk[4 * n + 6], qk[4 * n + 7]));
  }
}

// The whole preparation by one warpgroup: q and k tiles have arrived, log2_decay and strength are being
// written by its first warp. `inverse` gets kInverseParts tiles, `scores` one. All threads call `midway`
// once. Ends with the writes of this thread ordered before later reads by wgmma.
template <class T, int kKeyDim, class F>
__device__ void prepare_chunk(Inputs const& p, int count, char* k, char* q, ChunkScalars& s,
                              ChunkScratch& scratch, char* inverse, char* scores, int thread,
                              F const& midway) {
  constexpr int kTiles = (kKeyDim + kTileSide - 1) / kTileSide;
  int const warp = thread / 32, lane = thread % 32;
  if (count < kChunk) {  // what follows the sequence may be anything
    clear_rows<kTiles>(k, count, thread);
    clear_rows<kTiles>(q, count, thread);
    fence_async_shared();
    named_barrier(kHelperBarrier, kWarpgroup);
  }
  float const norm = !p.qk_l2norm ? 1.f : row_norm<T, kTiles>(thread < kChunk ? k : q, thread % kChunk);
  (thread < kChunk ? scratch.k_norm : scratch.q_norm)[thread % kChunk] = norm;
  named_barrier(kHelperBarrier, kWarpgroup);

  float const decay = s.log2_decay[thread % kChunk], last = s.log2_decay[kChunk - 1];
  if (thread < kChunk) {
    s.k_in[thread] = exp2_fast(decay) * norm;
    s.k_out[thread] = exp2_fast(last - decay) * norm;
    if (thread == 0) s.decay = exp2_fast(last);
  } else {
    s.q_in[thread - kChunk] = p.scale * exp2_fast(decay) * norm;
  }
  float d[kChunk / 2];
  multiply_rows<T, kKeyDim>(d, k, k);
  store_correlations(d, s, scratch, warp, lane);
  multiply_rows<T, kKeyDim>(d, q, k);
  store_scores<T>(d, s, scratch, p.scale, scores, warp, lane);
  midway();
  named_barrier(kHelperBarrier, kWarpgroup);
  invert(scratch.inverse, thread);
  store_inverse<T>(scratch.inverse, s, inverse, thread);
  fence_async_shared();
}

}  // namespace lt2::gdn::sm90
