// What a warpgroup prepares of two chunks of 32 tokens (a tile of q, k and v) before the state comes in:
// per-token scalars, T~ and P.
//
// With G the inclusive sum of the log decays within the chunk, E_ij = e^(G_i - G_j) for i >= j, b the writing
// strengths and kn, qn the factors of the l2norm:
//   Ar = (I + strictlow(b_i kn_i kn_j k_i.k_j))^-1      T~_ij = E_ij Ar_ij b_j      P_ij = scale E_ij qn_i
//   kn_j q_i.k_j
// The inverse never sees the gate, so its entries stay of the size of the keys' correlations under any decay.
//
// Where keys repeat, sums over a chunk cancel, and what they are made of has to be more precise than bf16: T~
// is a pair of 2-byte numbers that add up to it, P is fp16.
#pragma once

#include "common/cuda/sm90/wgmma.cuh"
#include "gdn/cuda/portable/problem.cuh"

namespace lt2::gdn::sm90 {

using namespace cuda;
using namespace cuda::sm90;
using portable::kNormEpsilon;

inline constexpr int kChunk = 32;
inline constexpr int kTileChunks = kTileSide / kChunk;
// Of q and k, 64 elements wide: rows of k of the first chunk, then of q, then the same of the second.
inline constexpr int kHalfTileBytes = kTileBytes / 2, kQkBytes = 2 * kTileBytes;
// e^(-150 ln 2) is below the smallest float, so a smaller decay of one token changes nothing, and a reset
// (-inf) stays exact while sums of such decays stay finite.
inline constexpr float kLeastLog2Decay = -150.f;
inline constexpr float kLog2E = 1.4426950408889634f;

// One value per token of the tile.
struct alignas(16) TileScalars {
  float log2_decay[kTileSide];  // G / ln 2
  float strength[kTileSide];    // b
  float k_norm[kTileSide];      // kn
  float k_shift[kTileSide];     // G / ln 2 - log2 kn
  float q_factor[kTileSide];    // scale qn
  float q_in[kTileSide];        // scale e^G qn
  float k_in[kTileSide];        // e^G kn: what k sees of the state before the chunk
  float k_out[kTileSide];       // e^(G_last - G) kn: what is left of a write at the end of the chunk
  float decay[kTileChunks];     // e^(G_last)
};

inline constexpr int kInverseRow = 36;  // floats; 4 more than 32, against bank conflicts

struct alignas(16) TileScratch {
  float inverse[kTileChunks][kChunk * kInverseRow];
  float g[kTileSide], beta[kTileSide];  // raw, of the next tile
};

// Where a tile's tokens are.
struct TileTokens {
  int row, begin;  // first token
  int count;       // 1..64
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Raw g and beta of token `i` of a tile, requested before they are needed: scan_gates waits for them.
__device__ inline void request_gates(Inputs const& p, TileTokens const& tile, int head, int i,
                                     TileScratch& scratch) {
  int const bytes = i < tile.count ? 4 : 0;
  auto const copy = [&](float* to, Strided const& from) {
    if (from.data == nullptr) return;
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
        "l"(portable::token_row<float const>(from, tile.row, tile.begin + (i < tile.count ? i : 0), head)),
        "r"(bytes)
        : "memory");
  };
  copy(scratch.g + i, p.g);
  copy(scratch.beta + i, p.beta);
}

// log2_decay and strength of token `i`, by the warp of its chunk; tokens that are not there neither decay nor
// write.
__device__ inline void scan_gates(Inputs const& p, int count, int head, int i, TileScratch const& scratch,
                                  TileScalars& s) {
  asm volatile("cp.async.wait_all;" ::: "memory");
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
  float sum = i < count ? x : 0.f;
  int const lane = i % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float const before = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += before;
  }
  s.log2_decay[i] = sum;
  s.strength[i] = i < count ? y : 0.f;
}

// One row of q or k, kTiles x 64 elements, kQkBytes apart; `row` counts from the start of the tile's 128.
template <int kTiles>
__device__ void clear_row(char* qk, int row) {
#pragma unroll 1
  for (int i = 0; i < kTiles * 8; ++i) {
    *reinterpret_cast<uint4*>(qk + i / 8 * kQkBytes + tile_offset(row, i % 8)) = uint4{};
  }
}

// 1 / |row| as the l2norm has it.
template <class T, int kTiles>
__device__ float row_norm(char const* qk, int row) {
  float sum[2] = {};
#pragma unroll 1
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll 4
    for (int chunk = 0; chunk < 8; ++chunk) {
      uint4 const x = *reinterpret_cast<uint4 const*>(qk + tile * kQkBytes + tile_offset(row, chunk));
      for (uint32_t const word : {x.x, x.y, x.z, x.w}) {
        float2 const e = unpack<T>(word);
        sum[0] += e.x * e.x;
        sum[1] += e.y * e.y;
      }
    }
  }
  return rsqrtf(sum[0] + sum[1] + kNormEpsilon);
}

// Two floats as a pair of bf16 pairs that add up to them, to 2^-17.
struct Split {
  uint32_t high, low;
};
__device__ __forceinline__ Split split(float x, float y) {
  uint32_t const high = pack<__nv_bfloat16>(x, y);
  float2 const h = unpack<__nv_bfloat16>(high);
  return {high, pack<__nv_bfloat16>(x - h.x, y - h.y)};
}

// d [16 x 8] += a [16 x 16] b [16 x 8], in bf16.
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// z [16 x 8 kN] = a [16 x 16 kK] b [16 kK x 8 kN], nearly in fp32: matrices in memory, rows of kInverseRow
// floats.
template <int kN, int kK>
__device__ __forceinline__ void multiply_split(float (&z)[kN][4], uint32_t const (&a_high)[kK][4],
                                               uint32_t const (&a_low)[kK][4], float const* b, int lane) {
  int const g = lane / 4, t = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) z[n][i] = 0.f;
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      float const* const column = b + (16 * k + t) * kInverseRow + 8 * n + g;
      Split const first = split(column[0], column[kInverseRow]);
      Split const second = split(column[8 * kInverseRow], column[9 * kInverseRow]);
      uint32_t const high[2] = {first.high, second.high}, low[2] = {first.low, second.low};
      mma_bf16(z[n], a_low[k], high);
      mma_bf16(z[n], a_high[k], low);
      mma_bf16(z[n], a_high[k], high);
    }
  }
}

// The first factor of multiply_split, from memory and from the fragments of another product.
template <int kK>
__device__ __forceinline__ void load_split(uint32_t (&high)[kK][4], uint32_t (&low)[kK][4], float const* a,
                                           int lane) {
  float const* const first = a + lane / 4 * kInverseRow + 2 * (lane % 4);
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 const x = *reinterpret_cast<float2 const*>(first + i % 2 * 8 * kInverseRow + 16 * k + i / 2 * 8);
      Split const s = split(x.x, x.y);
      high[k][i] = s.high;
      low[k][i] = s.low;
    }
  }
}
template <int kK>
__device__ __forceinline__ void split_fragments(uint32_t (&high)[kK][4], uint32_t (&low)[kK][4],
                                                float const (&z)[2 * kK][4]) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Split const s = split(z[2 * k + i / 2][i % 2 * 2], z[2 * k + i / 2][i % 2 * 2 + 1]);
      high[k][i] = s.high;
      low[k][i] = s.low;
    }
  }
}

// In place, 32 x 32 at `m`, by one warp: A (strictly lower, rows of kInverseRow floats) -> the lower triangle
// of (I + A)^-1. The two diagonal blocks of 16 by substitution in fp32, one column a lane; below them -(X2
// A21) X1.
__device__ inline void invert_32(float* m, int lane) {
  float* const block = m + lane / 16 * (16 * kInverseRow + 16);
  int const column = lane % 16;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float sum[2] = {i == column ? 1.f : 0.f, 0.f};
#pragma unroll
    for (int k = 0; k < i; k += 4) {
      float4 const a = *reinterpret_cast<float4 const*>(block + i * kInverseRow + k);
      sum[0] -= a.x * x[k];
      if (k + 1 < i) sum[1] -= a.y * x[k + 1];
      if (k + 2 < i) sum[0] -= a.z * x[k + 2];
      if (k + 3 < i) sum[1] -= a.w * x[k + 3];
    }
    x[i] = sum[0] + sum[1];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; ++i) block[i * kInverseRow + column] = x[i];
  __syncwarp();

  float* const below = m + 16 * kInverseRow;
  uint32_t high[1][4], low[1][4];
  float z[2][4], y[2][4];
  load_split(high, low, below + 16, lane);
  multiply_split<2, 1>(z, high, low, below, lane);
  split_fragments(high, low, z);
  multiply_split<2, 1>(y, high, low, m, lane);
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(below + (lane / 4 + 8 * half) * kInverseRow + 8 * n + 2 * (lane % 4)) =
          float2{-y[n][2 * half], -y[n][2 * half + 1]};
    }
  }
}

// E_ij r b_j of the lower triangle, columns col and col + 1 of row `row` of a chunk, as a pair of pairs that
// add up.
template <class T>
__device__ __forceinline__ Split inverse_pair(float const* log2_decay, float const* strength, int row,
                                              int col, float x, float y) {
  float const decay = log2_decay[row];
  float2 const g = *reinterpret_cast<float2 const*>(log2_decay + col);
  float2 const b = *reinterpret_cast<float2 const*>(strength + col);
  x = col <= row ? exp2_fast(decay - g.x) * x * b.x : 0.f;
  y = col + 1 <= row ? exp2_fast(decay - g.y) * y * b.y : 0.f;
  uint32_t const high = pack<T>(x, y);
  float2 const h = unpack<T>(high);
  return {high, pack<T>(x - h.x, y - h.y)};
}

// T~ of chunk c from its inverse to a tile, by 64 threads: block (c, c) of 32 x 32 the high parts, block (c,
// 1 - c) the low ones.
template <class T>
__device__ void store_inverse(float const* inverse, TileScalars const& s, char* tile, int chunk, int thread) {
  int const row = thread % kChunk, first = thread / kChunk * 16;
  float const *const log2_decay = s.log2_decay + chunk * kChunk, *const strength =
                                                                     s.strength + chunk * kChunk;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int const col = first + 8 * i;
    float4 const x = *reinterpret_cast<float4 const*>(inverse + row * kInverseRow + col);
    float4 const y = *reinterpret_cast<float4 const*>(inverse + row * kInverseRow + col + 4);
    Split const t[4] = {inverse_pair<T>(log2_decay, strength, row, col, x.x, x.y),
                        inverse_pair<T>(log2_decay, strength, row, col + 2, x.z, x.w),
                        inverse_pair<T>(log2_decay, strength, row, col + 4, y.x, y.y),
                        inverse_pair<T>(log2_decay, strength, row, col + 6, y.z, y.w)};
    int const tile_row = chunk * kChunk + row;
    *reinterpret_cast<uint4*>(tile + tile_offset(tile_row, chunk * 4 + col / 8)) = {t[0].high, t[1].high,
                                                                                    t[2].high, t[3].high};
    *reinterpret_cast<uint4*>(tile + tile_offset(tile_row, (1 - chunk) * 4 + col / 8)) = {t[0].low, t[1].low,
                                                                                          t[2].low, t[3].low};
  }
}

// The strictly lower part of b_i kn_i kn_j k_i.k_j of a warp's 16 rows; `half_row` is the first of them in
// the chunk.
__device__ inline void store_correlations(float const (&kk)[kChunk / 2], TileScalars const& s, float* m,
                                          int chunk, int half_row, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = half_row + lane / 4 + 8 * half;
    float const factor = s.strength[chunk * kChunk + row] * s.k_norm[chunk * kChunk + row];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      int const col = 8 * n + 2 * (lane % 4);
      float2 const norm = *reinterpret_cast<float2 const*>(s.k_norm + chunk * kChunk + col);
      *reinterpret_cast<float2*>(m + row * kInverseRow + col) =
          float2{col < row ? factor * norm.x * kk[4 * n + 2 * half] : 0.f,
                 col + 1 < row ? factor * norm.y * kk[4 * n + 2 * half + 1] : 0.f};
    }
  }
}

// P of a warp's 16 rows, to block (c, c) of a tile.
__device__ inline void store_scores(float (&qk)[kChunk / 2], TileScalars const& s, char* tile, int chunk,
                                    int half_row, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = half_row + lane / 4 + 8 * half;
    float const factor = s.q_factor[chunk * kChunk + row], decay = s.log2_decay[chunk * kChunk + row];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      int const col = 8 * n + 2 * (lane % 4);
      float2 const shift = *reinterpret_cast<float2 const*>(s.k_shift + chunk * kChunk + col);
      float& x = qk[4 * n + 2 * half];
      float& y = qk[4 * n + 2 * half + 1];
      x = col <= row ? factor * exp2_fast(decay - shift.x) * x : 0.f;
      y = col + 1 <= row ? factor * exp2_fast(decay - shift.y) * y : 0.f;
    }
  }
  uint32_t const address = shared_address(tile);
  int const row = chunk * kChunk + half_row + lane % 16;
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    store_matrices(address + tile_offset(row, chunk * 4 + n + lane / 16),
                   pack<__half>(qk[4 * n], qk[4 * n + 1]), pack<__half>(qk[4 * n + 2], qk[4 * n + 3]),
                   pack<__half>(qk[4 * n + 4], qk[4 * n + 5]), pack<__half>(qk[4 * n + 6], qk[4 * n + 7]));
  }
}

// The whole preparation of a tile by one warpgroup that shares `barrier` and, its first half, `barrier` + 1.
// The first two warps have k, one chunk each to scan and to invert, the others q. q and k have arrived, and
// scan_gates is under way. `inverse` and `scores` are tiles. Without kScores there is no q. Ends with the
// writes of this thread ordered before later reads by wgmma.
template <class T, int kKeyDim, bool kScores>
__device__ void prepare_tile(Inputs const& p, int count, char* qk, TileScalars& s, TileScratch& scratch,
                             char* inverse, char* scores, int barrier, int thread) {
  constexpr int kTiles = (kKeyDim + kTileSide - 1) / kTileSide;
  int const warp = thread / 32, lane = thread % 32, chunk = warp % kTileChunks;
  int const token = chunk * kChunk + lane;
  bool const has_k = warp < kTileChunks;
  int const row = chunk * 2 * kChunk + (has_k ? 0 : kChunk) + lane;
  if (token >= count && (kScores || has_k)) {  // what follows the sequence may be anything
    clear_row<kTiles>(qk, row);
    fence_async_shared();
  }
  float const norm = p.qk_l2norm && (kScores || has_k) ? row_norm<T, kTiles>(qk, row) : 1.f;
  if (has_k) {
    float const decay = s.log2_decay[token], last = s.log2_decay[chunk * kChunk + kChunk - 1];
    s.k_norm[token] = norm;
    s.k_shift[token] = p.qk_l2norm ? decay - __log2f(norm) : decay;
    s.k_in[token] = exp2_fast(decay) * norm;
    s.k_out[token] = exp2_fast(last - decay) * norm;
    if (lane == 0) s.decay[chunk] = exp2_fast(last);
  } else {
    s.q_factor[token] = p.scale * norm;
  }
  named_barrier(barrier, kWarpgroup);

  // Rows 0..31 are K K^T of a chunk, rows 32..63 Q K^T.
  float products[kTileChunks][kChunk / 2];
#pragma unroll
  for (int c = 0; c < kTileChunks; ++c) pin(products[c]);
  wgmma_begin();
#pragma unroll
  for (int c = 0; c < kTileChunks; ++c) {
    uint64_t const rows = k_major(qk + c * kTileBytes);
#pragma unroll
    for (int k = 0; k < kKeyDim / 16; ++k) {
      wgmma<T, kChunk>(products[c], rows + k_step<kQkBytes>(k), rows + k_step<kQkBytes>(k), k > 0);
    }
  }
  wgmma_commit();
  if (!has_k) s.q_in[token] = exp2_fast(s.log2_decay[token]) * p.scale * norm;
  wgmma_wait<0>();
#pragma unroll
  for (int c = 0; c < kTileChunks; ++c) pin(products[c]);
  int const half_row = chunk * 16;
  if (has_k) {
#pragma unroll
    for (int c = 0; c < kTileChunks; ++c)
      store_correlations(products[c], s, scratch.inverse[c], c, half_row, lane);
    named_barrier(barrier + 1, kWarpgroup / 2);
    invert_32(scratch.inverse[chunk], lane);
  } else if constexpr (kScores) {
#pragma unroll
    for (int c = 0; c < kTileChunks; ++c) store_scores(products[c], s, scores, c, half_row, lane);
  }
  named_barrier(barrier, kWarpgroup);
  store_inverse<T>(scratch.inverse[thread / 64], s, inverse, thread / 64, thread % 64);
  fence_async_shared();
}

}  // namespace lt2::gdn::sm90
