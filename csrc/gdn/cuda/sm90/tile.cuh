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
#include "gdn/cuda/portable/inverse.cuh"
#include "gdn/cuda/portable/problem.cuh"

namespace lt2::gdn::sm90 {

using namespace cuda;
using namespace cuda::sm90;
using portable::exp2_fast;
using portable::invert_32;
using portable::kInverseRow;
using portable::kLeastLog2Decay;
using portable::kLog2E;
using portable::kNormEpsilon;

// H100 and H200 have as many; elsewhere only the balance of work suffers.
inline constexpr int kMultiprocessors = 132;

inline constexpr int kChunk = 32;
inline constexpr int kTileChunks = kTileSide / kChunk;
// A chunk's q and k, 64 elements wide, are a tile: rows of k, then of q.
inline constexpr int kHalfTileBytes = kTileBytes / 2;

// What S gains is (k_out k)^T U. Folded into k, which is at most one then, k_out is in units that leave most
// of the range of fp16 to decays: S, and what of it q sees, are as many times larger.
inline constexpr int kGainExponent = 14;
inline constexpr float kGainUnit = 1 << kGainExponent;
// Keys that are not normalised are so for that, and U is multiplied by their lengths. At least:
inline constexpr float kLeastLength2 = 1e-30f;

// For the states, one value per token of the tile. With `folded` gains (see prepare_tile) kn is 1 / |k| also
// where keys are not normalised.
struct alignas(16) TileScalars {
  float q_in[kTileSide];     // scale e^G qn; folded, / kGainUnit
  float k_in[kTileSide];     // e^G kn, or e^G where keys are not normalised: what k sees of the state before
                             // the chunk; folded, / kGainUnit
  float k_out[kTileSide];    // e^(G_last - G) kn: what is left of a write at the end of the chunk; folded,
                             // times kGainUnit
  float decay[kTileChunks];  // e^(G_last)
  float2 most[kTileChunks];  // folded: of each half of the columns the largest |T~|
};

// What is prepared of a tile for the states.
struct PreparedTile {
  // T~ of chunk c, columns 32 c on: the high parts in rows 0..31, the low ones in the others.
  alignas(1024) char inverse[kTileBytes];
  alignas(1024) char scores[kHalfTileBytes];  // P of chunk c: rows 0..31, columns 32 c on
  TileScalars scalars;
};
inline constexpr int kPreparedBytes = kTileBytes + kHalfTileBytes + sizeof(TileScalars);

struct alignas(16) TileScratch {
  float inverse[kTileChunks][kChunk * kInverseRow];
  float log2_decay[kTileSide];          // G / ln 2
  float strength[kTileSide];            // b; folded, times |k| where keys are not normalised
  float k_norm[kTileSide];              // kn
  float k_shift[kTileSide];             // G / ln 2 - log2 kn
  float q_factor[kTileSide];            // scale qn
  float cross[kTileSide];               // e^-|G - G_15|, which E_ij is the product of for j < 16 <= i
  float g[kTileSide], beta[kTileSide];  // raw, of the next tile
};

// Where a tile's tokens are.
struct TileTokens {
  int row, begin;  // first token
  int count;       // 1..64
};

// A token's raw g or beta, requested before it is needed: scan_decays and read_strength wait for it. Tokens
// that are not there neither decay nor write.
__device__ inline void request_gate(float const* from, bool there, float* to) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 4 : 0)
               : "memory");
}

// `strength` of token `i`.
__device__ inline void read_strength(Inputs const& p, int count, int i, TileScratch& s) {
  asm volatile("cp.async.wait_all;" ::: "memory");
  float y = 1.f;
  if (p.beta.data != nullptr) {
    y = s.beta[i];
    if (p.beta_sigmoid) y = sigmoid(y) * (p.neg_eigval ? 2.f : 1.f);
  }
  s.strength[i] = i < count ? y : 0.f;
}

// `log2_decay` of token `i`, by the warp of its chunk.
__device__ inline void scan_decays(Inputs const& p, int count, int head, int i, TileScratch& s) {
  asm volatile("cp.async.wait_all;" ::: "memory");
  float x = 0.f;
  if (p.g.data != nullptr) {
    x = s.g[i];
    if (p.A_log != nullptr) x = portable::gate(x, p.A_log[head], p.dt_bias[head]);
    x = x < kLeastLog2Decay / kLog2E ? kLeastLog2Decay : x * kLog2E;
  }
  float sum = i < count ? x : 0.f;
  int const lane = i % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float const before = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += before;
  }
  s.log2_decay[i] = sum;
}

// One row of q or k, in kTiles tiles.
template <int kTiles>
__device__ void clear_row(char* qk, int row) {
#pragma unroll 1
  for (int i = 0; i < kTiles * 8; ++i) {
    *reinterpret_cast<uint4*>(qk + i / 8 * kTileBytes + tile_offset(row, i % 8)) = uint4{};
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
      uint4 const x = *reinterpret_cast<uint4 const*>(qk + tile * kTileBytes + tile_offset(row, chunk));
      for (uint32_t const word : {x.x, x.y, x.z, x.w}) {
        float2 const e = unpack<T>(word);
        sum[0] += e.x * e.x;
        sum[1] += e.y * e.y;
      }
    }
  }
  return rsqrtf(sum[0] + sum[1] + kNormEpsilon);
}

// Two numbers as a pair of pairs that add up to them.
template <class T>
__device__ __forceinline__ Split split_pair(float x, float y) {
  uint32_t const high = pack<T>(x, y);
  float2 const h = unpack<T>(high);
  return {high, pack<T>(x - h.x, y - h.y)};
}

// T~ of chunk c from its inverse, by two warps: each a block of 16 x 16 on the diagonal and half of the one
// below these. What is above stays zero.
template <class T, bool kMost>
__device__ void store_inverse(TileScratch const& scratch, PreparedTile& to, int chunk, int half, int lane) {
  float const *const log2_decay = scratch.log2_decay + chunk * kChunk, *const strength =
                                                                           scratch.strength + chunk * kChunk;
  float const* const cross = scratch.cross + chunk * kChunk;
  uint32_t most = 0;
  auto const look = [&](Split const& x) {
    if constexpr (kMost) most = __vmaxu2(most, x.high & 0x7fff7fff);
  };
  {
    int const row = 16 * half + lane % 16, col = 16 * half + lane / 16 * 8;
    float const* const inverse = scratch.inverse[chunk] + row * kInverseRow + col;
    float const decay = log2_decay[row];
    Split t[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float4 const x = *reinterpret_cast<float4 const*>(inverse + 4 * i);
      float4 const g = *reinterpret_cast<float4 const*>(log2_decay + col + 4 * i);
      float4 const b = *reinterpret_cast<float4 const*>(strength + col + 4 * i);
      // Above the diagonal, where the inverse is zero, only finite.
      auto const of = [&](float x, float g, float b) { return exp2_fast(fminf(decay - g, 126.f)) * x * b; };
      t[2 * i] = split_pair<T>(of(x.x, g.x, b.x), of(x.y, g.y, b.y));
      t[2 * i + 1] = split_pair<T>(of(x.z, g.z, b.z), of(x.w, g.w, b.w));
    }
    for (Split const& x : t) look(x);
    char* const at = to.inverse + tile_offset(row, chunk * 4 + col / 8);
    *reinterpret_cast<uint4*>(at) = {t[0].high, t[1].high, t[2].high, t[3].high};
    *reinterpret_cast<uint4*>(at + kHalfTileBytes) = {t[0].low, t[1].low, t[2].low, t[3].low};
  }
  {
    int const row = 16 + lane % 16, col = 8 * half + lane / 16 * 4;
    float4 const x = *reinterpret_cast<float4 const*>(scratch.inverse[chunk] + row * kInverseRow + col);
    float4 const e = *reinterpret_cast<float4 const*>(cross + col);
    float4 const b = *reinterpret_cast<float4 const*>(strength + col);
    float const own = cross[row];
    Split const t[2] = {split_pair<T>(x.x * own * (e.x * b.x), x.y * own * (e.y * b.y)),
                        split_pair<T>(x.z * own * (e.z * b.z), x.w * own * (e.w * b.w))};
    for (Split const& x : t) look(x);
    char* const at = to.inverse + tile_offset(row, chunk * 4 + half) + lane / 16 * 8;
    *reinterpret_cast<uint2*>(at) = {t[0].high, t[1].high};
    *reinterpret_cast<uint2*>(at + kHalfTileBytes) = {t[0].low, t[1].low};
  }
  if constexpr (kMost) {
    most = __reduce_max_sync(0xffffffffu, max(most >> 16, most & 0xffffu));
    if (lane == 0) reinterpret_cast<float*>(to.scalars.most + chunk)[half] = unpack<T>(most).x;
  }
}

// What S gains of k: rows times k_out in fp16, to tiles of their own, by 64 threads, four pieces of 16 bytes
// at a time each.
template <class T, int kKeyDim>
__device__ void store_gains(char const* qk, TileScalars const& s, char* gains, int thread) {
  constexpr int kTiles = (kKeyDim + kTileSide - 1) / kTileSide, kRows = kTiles == 1 ? 4 : 2;
  int const chunk = thread % 8;
  qk += tile_offset(thread / 8, chunk);
  gains += tile_offset(thread / 8, chunk);
  bool const last = (kTiles - 1) * kTileSide + chunk * 8 < kKeyDim;  // has a piece of the last tile
#pragma unroll 1
  for (int first = 0; first < kTileSide; first += 8 * kRows) {
    uint4 x[kRows][kTiles];
    float factor[kRows];
    char const* const from = qk + first / kChunk * kTiles * kTileBytes + first % kChunk * 128;
    char* const to = gains + first * 128;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      factor[r] = s.k_out[first + 8 * r + thread / 8];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        x[r][tile] = *reinterpret_cast<uint4 const*>(from + tile * kTileBytes + 8 * r * 128);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        for (uint32_t* const word : {&x[r][tile].x, &x[r][tile].y, &x[r][tile].z, &x[r][tile].w}) {
          float2 const y = unpack<T>(*word);
          *word = pack<__half>(y.x * factor[r], y.y * factor[r]);
        }
        if (tile + 1 < kTiles || last)
          *reinterpret_cast<uint4*>(to + tile * kTileBytes + 8 * r * 128) = x[r][tile];
      }
    }
  }
}

// b_i kn_i kn_j k_i.k_j of a warp's 16 rows, `half_row` the first of them in the chunk. What is not below the
// diagonal is not read.
__device__ inline void store_correlations(float const (&kk)[kChunk / 2], TileScratch const& s, float* m,
                                          bool normalised, int chunk, int half_row, int lane) {
  int const row = half_row + lane / 4, col = 2 * (lane % 4);
  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float const b = s.strength[chunk * kChunk + row + 8 * half],
                own = s.k_norm[chunk * kChunk + row + 8 * half];
    factors[half] = normalised ? b * own : __fdividef(b, own);
  }
  float const* const norms = s.k_norm + chunk * kChunk + col;
  m += row * kInverseRow + col;
  auto const put = [&](int n) {
    float2 const norm = *reinterpret_cast<float2 const*>(norms + 8 * n);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(m + 8 * half * kInverseRow + 8 * n) = float2{
          factors[half] * norm.x * kk[4 * n + 2 * half], factors[half] * norm.y * kk[4 * n + 2 * half + 1]};
  };
  put(0);
  put(1);
  if (half_row > 0) {
    put(2);
    put(3);
  }
}

// The same of both chunks, in a loop whose loads come first, because the compiler keeps them behind stores.
// What is not below the diagonal is not read.
__device__ __forceinline__ void store_both_correlations(float (&kk)[kTileChunks][kChunk / 2], TileScratch& s,
                                                        bool normalised, int first, int lane) {
#pragma unroll 1
  for (int c = 0; c < kTileChunks; ++c) {
    int const row = first + lane / 4, col = 2 * (lane % 4);
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float const b = s.strength[c * kChunk + row + 8 * half], own = s.k_norm[c * kChunk + row + 8 * half];
      factors[half] = normalised ? b * own : __fdividef(b, own);
    }
    float2 norm[kChunk / 8];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n)
      norm[n] = *reinterpret_cast<float2 const*>(s.k_norm + c * kChunk + 8 * n + col);
    float* const m = s.inverse[c] + row * kInverseRow + col;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
        *reinterpret_cast<float2*>(m + 8 * half * kInverseRow + 8 * n) =
            float2{factors[half] * norm[n].x * kk[0][4 * n + 2 * half],
                   factors[half] * norm[n].y * kk[0][4 * n + 2 * half + 1]};
      }
    }
#pragma unroll
    for (int j = 0; j < kChunk / 2; ++j) kk[0][j] = kk[1][j];
  }
}

// P of a warp's 16 rows, the first of them `half_row`: the block on the diagonal, and that below those. What
// is above stays zero.
__device__ inline void store_scores(float const (&qk)[kChunk / 2], TileScratch const& s, char* scores,
                                    int chunk, int half_row, int lane) {
  int const row = half_row + lane / 4, col = 2 * (lane % 4), first = chunk * kChunk;
  float const factors[2] = {s.q_factor[first + row], s.q_factor[first + row + 8]};
  uint32_t const address = shared_address(scores);
  int const store_row = half_row + lane % 16;
  auto const put = [&](int n, float const(&x)[8]) {
    store_matrices(address + tile_offset(store_row, chunk * 4 + n + lane / 16), pack<__half>(x[0], x[1]),
                   pack<__half>(x[2], x[3]), pack<__half>(x[4], x[5]), pack<__half>(x[6], x[7]));
  };
  {
    float const decays[2] = {s.log2_decay[first + row], s.log2_decay[first + row + 8]};
    float2 const shifts[2] = {*reinterpret_cast<float2 const*>(s.k_shift + first + half_row + col),
                              *reinterpret_cast<float2 const*>(s.k_shift + first + half_row + col + 8)};
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = half_row == 0 ? qk[i] : qk[8 + i];
    auto const of = [&](float x, int half, float shift) {
      return factors[half] * exp2_fast(decays[half] - shift) * x;
    };
    bool const first_column = col <= lane / 4, second_column = col + 1 <= lane / 4;
    x[0] = first_column ? of(x[0], 0, shifts[0].x) : 0.f;
    x[1] = second_column ? of(x[1], 0, shifts[0].y) : 0.f;
    x[2] = of(x[2], 1, shifts[0].x);
    x[3] = of(x[3], 1, shifts[0].y);
    x[4] = x[5] = 0.f;
    x[6] = first_column ? of(x[6], 1, shifts[1].x) : 0.f;
    x[7] = second_column ? of(x[7], 1, shifts[1].y) : 0.f;
    put(half_row / 8, x);
  }
  if (half_row > 0) {
    float const rows[2] = {factors[0] * s.cross[first + row], factors[1] * s.cross[first + row + 8]};
    float x[8];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float2 const e = *reinterpret_cast<float2 const*>(s.cross + first + 8 * n + col);
      float2 const norm = *reinterpret_cast<float2 const*>(s.k_norm + first + 8 * n + col);
      float2 const y = {e.x * norm.x, e.y * norm.y};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[4 * n + 2 * half] = rows[half] * y.x * qk[4 * n + 2 * half];
        x[4 * n + 2 * half + 1] = rows[half] * y.y * qk[4 * n + 2 * half + 1];
      }
    }
    put(0, x);
  }
}

// The products of rows row .. row + 7, and of the 8 after them, with themselves: elements (l / 4, 2 (l % 4))
// and the next. `rows` are the first tile's.
template <class T, int kKeyDim>
__device__ void square_rows(float2 (&squares)[2], uint32_t rows, int row, int lane) {
  float x[2][4] = {};
#pragma unroll
  for (int k = 0; k < kKeyDim / 16; ++k) {
    uint32_t a[4];
    load_matrices(a, rows + k / 4 * kTileBytes + tile_offset(row + lane % 16, k % 4 * 2 + lane / 16));
    mma<T>(x[0], a, a[0], a[2]);
    mma<T>(x[1], a, a[1], a[3]);
  }
  squares[0] = {x[0][0], x[0][1]};
  squares[1] = {x[1][2], x[1][3]};
}

// Of prepare_tile: of the warpgroup; of its first two warps, which have k, one chunk each to invert; one at
// which the others, which have q and the decays, wait for the norms of k; and of these.
inline constexpr int kTileBarriers = 4;

// The whole preparation of a tile by one warpgroup with barriers `barrier`, .. q and k have arrived, beta has
// been requested by its first 64 threads and g by the others, one token each, who call `request` when the
// place of these may be taken and the products of q and k are done. `qk` are the chunks' tiles. Without
// kScores there is no q. With kFolds what S gains of k is written to `gains`, after `wait` by half of the
// warps. With kShares these call `wait` before anything is written to `to`, and each warp `read` when it no
// longer needs `qk`. Ends with the writes of this thread ordered before later reads by wgmma.
template <class T, int kKeyDim, bool kScores, bool kFolds, bool kShares, class F, class G, class H>
__device__ void prepare_tile(Inputs const& p, int count, char* qk, TileScratch& s, PreparedTile& to,
                             char* gains, int barrier, int thread, int head, F const& request, G const& wait,
                             H const& read) {
  static_assert(!kShares || kScores);
  constexpr int kTiles = (kKeyDim + kTileSide - 1) / kTileSide;
  TileScalars& scalars = to.scalars;
  int const warp = thread / 32, lane = thread % 32, half = warp % 2, half_row = half * 16;
  bool const has_k = warp < kTileChunks;
  if (half * kChunk + lane >= count && (kScores || has_k)) {  // what follows the sequence may be anything
    clear_row<kTiles>(qk + half * kTiles * kTileBytes, (has_k ? 0 : kChunk) + lane);
    fence_async_shared();
  }
  named_barrier(barrier, kWarpgroup);  // also the end of the tile before
  // Of each chunk [K; Q] K^T. Its diagonal is the squares of the norms of k.
  float products[kTileChunks][kChunk / 2], square = 0.f;
#pragma unroll
  for (auto& x : products) pin(x);
  wgmma_begin();
#pragma unroll
  for (int c = 0; c < kTileChunks; ++c) {
    uint64_t const rows = k_major(qk + c * kTiles * kTileBytes);
#pragma unroll
    for (int k = 0; k < kKeyDim / 16; ++k)
      wgmma<T, kChunk>(products[c], rows + k_step(k), rows + k_step(k), k > 0);
  }
  wgmma_commit();
  // Diagonals of blocks of 8 x 8, of rows half_row .. + 7 and the next 8 of each chunk: row r is in lane
  // 4 r + r / 2, columns 2 (l % 4) and the next.
  float2 diagonals[kTileChunks][2] = {};
  if (kScores && !has_k && p.qk_l2norm) {
    uint32_t const address = shared_address(qk) + kHalfTileBytes;
#pragma unroll
    for (int c = 0; c < kTileChunks; ++c)
      square_rows<T, kKeyDim>(diagonals[c], address + c * kTiles * kTileBytes, half_row, lane);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int c = 0; c < kTileChunks; ++c) {
    pin(products[c]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      auto const& x = products[c];
      if (has_k)
        diagonals[c][i] = half == 0 ? float2{x[6 * i], x[6 * i + 1]} : float2{x[8 + 6 * i], x[9 + 6 * i]};
      float2 const y = diagonals[c][i];
      float const z = __shfl_sync(0xffffffffu, lane / 4 % 2 == 0 ? y.x : y.y, lane % 8 * 4 + lane % 8 / 2);
      if (lane / 8 == 2 * c + i) square = z;  // lane l takes chunk l / 16, row l % 16
    }
  }
  int const chunk = lane / 16, token = chunk * kChunk + half_row + lane % 16;
  float const norm = p.qk_l2norm       ? rsqrtf(square + kNormEpsilon)
                     : kFolds && has_k ? rsqrtf(square + kLeastLength2)
                                       : 1.f;
  if (has_k) {
    s.k_norm[token] = norm;
    read_strength(p, count, thread, s);
    if constexpr (kShares) read();
    request();
    arrive_at_named_barrier(barrier + 2, kWarpgroup);
    named_barrier(barrier + 1, kWarpgroup / 2);
    // Where helpers hold the states up, a shorter way to the inverse counts; else the states beside it do.
    if constexpr (kKeyDim > 128 || !kScores) {
      store_both_correlations(products, s, p.qk_l2norm, half_row, lane);
    } else {
#pragma unroll
      for (int c = 0; c < kTileChunks; ++c)
        store_correlations(products[c], s, s.inverse[c], p.qk_l2norm, c, half_row, lane);
    }
    named_barrier(barrier + 1, kWarpgroup / 2);
    if (kFolds && !p.qk_l2norm) s.strength[thread] = __fdividef(s.strength[thread], s.k_norm[thread]);
    invert_32(s.inverse[half], lane);
  } else {
    scan_decays(p, count, head, thread % kTileSide, s);
    if constexpr (kShares && !kFolds) read();
    request();
    named_barrier(barrier + 2, kWarpgroup);      // the norms of k
    named_barrier(barrier + 3, kWarpgroup / 2);  // the decays of both chunks
    float const decay = s.log2_decay[token], last = s.log2_decay[chunk * kChunk + kChunk - 1];
    float const k_norm = s.k_norm[token];
    float const middle = s.log2_decay[chunk * kChunk + kChunk / 2 - 1];
    if constexpr (kShares) wait();
    s.k_shift[token] = decay - __log2f(k_norm);
    s.cross[token] = exp2_fast(half == 0 ? middle - decay : decay - middle);
    scalars.k_in[token] = exp2_fast(decay) * (p.qk_l2norm ? k_norm : 1.f) / (kFolds ? kGainUnit : 1.f);
    scalars.k_out[token] = exp2_fast(last - decay) * k_norm * (kFolds ? kGainUnit : 1.f);
    if (lane % 16 == 0) scalars.decay[chunk] = exp2_fast(last);
    if constexpr (kScores) {
      s.q_factor[token] = p.scale * norm;
      scalars.q_in[token] = exp2_fast(decay) * p.scale * norm / (kFolds ? kGainUnit : 1.f);
      named_barrier(barrier + 3, kWarpgroup / 2);
      if constexpr (kFolds && kShares) {  // first, so that the next tile may be loaded
        store_gains<T, kKeyDim>(qk, scalars, gains, thread - kTileSide);
        read();
      }
#pragma unroll
      for (int c = 0; c < kTileChunks; ++c) store_scores(products[c], s, to.scores, c, half_row, lane);
    }
    if constexpr (kFolds && !kShares) {
      if (!kScores) named_barrier(barrier + 3, kWarpgroup / 2);
      wait();
      store_gains<T, kKeyDim>(qk, scalars, gains, thread - kTileSide);
    }
  }
  named_barrier(barrier, kWarpgroup);
  store_inverse<T, kFolds>(s, to, warp / 2, half, lane);
  fence_async_shared();
}

}  // namespace lt2::gdn::sm90
