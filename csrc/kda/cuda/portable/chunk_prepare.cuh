// What does not depend on the state, all chunks of 64 tokens at once.
//
// With D_ij the decays of the tokens after j up to and with i (a vector over channels), b the writing
// strengths:
//   A_ij = <k_i, D_ij o k_j>  (j < i)    T~ = (I + diag(b) A)^-1 diag(b)    P_ij = scale <q_i, D_ij o k_j>
// D_ij is split at a border between i and j: the middle of the chunk, the middle of one of its halves; what
// is left are four blocks of 16 tokens, where decays are multiplied up token by token. No exponent is
// positive. A row of keys with the decays behind it is a pair of T that adds up to it: its roundings would
// add up over the tokens of a chunk where keys repeat.
#pragma once

#include "kda/cuda/portable/chunk_record.cuh"

namespace lt2::kda::portable {

using gdn::portable::exp2_fast;
using gdn::portable::kInverseRow;
using gdn::portable::kLeastLog2Decay;
using gdn::portable::kLog2E;

inline constexpr int kBlock = 16, kBlocks = kChunk / kBlock;  // tokens of a warp
inline constexpr int kHalf = kChunk / 2;

template <int kKeys>
inline constexpr int kPrepareThreads = kBlocks * kWarp * kKeys / 64;

template <class T, int kKeys, int kInverses>
struct PrepareShared {
  // Operands of the scores across a border: [0] in the middle of a half (rows of blocks 1 and 3, columns of
  // blocks 0 and 2), [1] in the middle of the chunk.
  alignas(128) T q_rows[2][kHalf * kKeys], k_rows[2][kHalf * kKeys];
  alignas(128) T columns[2][2][kHalf * kKeys];  // high and low parts
  // Blocks (0, 0), (1, 1), (1, 0) of diag(b) A, for the backward pass of A diag(b) as well.
  alignas(16) float inverse[kInverses][3][kHalf * kInverseRow];
  alignas(16) float scores[kChunk][kChunk + 4];
  alignas(16) float totals[kBlocks][kKeys];  // log2 of the decay of a block
  float squares[kKeys / 64][2][kChunk];      // of q, of k
  float strength[kChunk];
};

// Lane l gets the sum of all lanes' v[l].
template <int kCount = kWarp>
__device__ __forceinline__ float transposed_sum(float const (&v)[kCount], int lane) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    constexpr int kKept = kCount / 2;
    bool const upper = lane & kKept;
    float kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      float const keep = upper ? v[i + kKept] : v[i], give = upper ? v[i] : v[i + kKept];
      kept[i] = keep + __shfl_xor_sync(0xffffffffu, give, kKept);
    }
    return transposed_sum(kept, lane);
  }
}

__device__ __forceinline__ float2 exp2_fast(float2 x) { return {exp2_fast(x.x), exp2_fast(x.y)}; }
__device__ __forceinline__ float2 operator+(float2 x, float2 y) { return {x.x + y.x, x.y + y.y}; }
__device__ __forceinline__ float2 operator*(float2 x, float2 y) { return {x.x * y.x, x.y * y.y}; }
__device__ __forceinline__ float2 operator*(float x, float2 y) { return {x * y.x, x * y.y}; }

// Two channels of the 16 tokens of a block: what a lane has. Tokens and channels that do not exist are 0.
template <class T>
struct BlockRows {
  uint32_t q[kBlock], k[kBlock];
  float2 g[kBlock];  // log2 of the decays

  // Tokens from `first` on, channels c and c + 1. `whole`: both lie in memory as an aligned pair.
  __device__ __forceinline__ void load(Inputs const& p, Chunk const& chunk, int head, int first, int c,
                                       bool whole) {
    int const key_head = head / (p.value_heads / p.heads);
    T const* q_row = token_row<T const>(p.q, chunk.row, chunk.begin + first, key_head) + c;
    T const* k_row = token_row<T const>(p.k, chunk.row, chunk.begin + first, key_head) + c;
    float const* g_row = token_row<float const>(p.g, chunk.row, chunk.begin + first, head) + c;
    int const count = c < p.key_dim ? chunk.tokens - first : 0;
    auto const present = [&](int i) { return i < count; };
    // Addresses go from row to row: as products they would be most of this kernel's instructions.
    auto const load_rows = [&](auto const& load) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        q[i] = k[i] = 0;
        g[i] = {0.f, 0.f};
        if (present(i)) load(i);
        q_row += p.q.token;
        k_row += p.k.token;
        g_row += p.g.token;
      }
    };
    if (whole) {
      load_rows([&](int i) {
        q[i] = *reinterpret_cast<uint32_t const*>(q_row);
        k[i] = *reinterpret_cast<uint32_t const*>(k_row);
        g[i] = *reinterpret_cast<float2 const*>(g_row);
      });
    } else {
      load_rows([&](int i) {
        q[i] = pack<T>(to_float(q_row[0]), to_float(q_row[1]));
        k[i] = pack<T>(to_float(k_row[0]), to_float(k_row[1]));
        g[i] = {g_row[0], g_row[1]};
      });
    }
    if (p.A_log != nullptr && c < p.key_dim) {
      float const rate = -expf(p.A_log[head]);
      float const* const at = p.dt_bias + head * p.key_dim + c;
      float2 const bias = {at[0], at[1]};
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        float2 const x = g[i] + bias;
        g[i] = present(i) ? float2{rate * softplus(x.x), rate * softplus(x.y)} : float2{0.f, 0.f};
      }
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) g[i] = {log2_decay(g[i].x), log2_decay(g[i].y)};
  }

  __device__ __forceinline__ float2 total() const {
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) sum = sum + g[i];
    return sum;
  }

 private:
  __device__ __forceinline__ static float log2_decay(float g) {
    return g < kLeastLog2Decay / kLog2E ? kLeastLog2Decay : g * kLog2E;
  }
};

__device__ __forceinline__ void store_pair(void* rows, int at, uint32_t pair) {
  *reinterpret_cast<uint32_t*>(static_cast<char*>(rows) + 2 * at) = pair;
}

// x [16 x 16] of rows 16 m .. and columns 16 n ..: a sum over all channels.
template <class T, int kKeys>
__device__ __forceinline__ void multiply_rows(float (&x)[2][4], T const* rows, int m, T const* high,
                                              T const* low, int n) {
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 4; ++i) x[0][i] = x[1][i] = 0.f;
#pragma unroll 4
  for (int k = 0; k < kKeys / 16; ++k) {
    uint32_t a[4], h[4], l[4];
    load_matrices(a, shared_address(rows + element_at<kKeys>(16 * m + lane % 16, 16 * k + lane / 16 * 8)));
    int const at = element_at<kKeys>(16 * n + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8);
    load_matrices(h, shared_address(high + at));
    load_matrices(l, shared_address(low + at));
    mma<T>(x[0], a, l[0], l[1]);
    mma<T>(x[1], a, l[2], l[3]);
    mma<T>(x[0], a, h[0], h[1]);
    mma<T>(x[1], a, h[2], h[3]);
  }
}

// Which of a lane's sums over the channels of a block is what: columns j and 15 - j of A, then of P, are 32
// elements.
struct BlockElement {
  bool of_scores;
  int row, column;

  __device__ __forceinline__ BlockElement(int lane, int j) {
    column = j;
    if (lane >= 31 - 2 * j) {
      lane -= 31 - 2 * j;
      column = 15 - j;
    }
    int const below = 15 - column;
    of_scores = lane >= below;
    row = of_scores ? column + lane - below : column + 1 + lane;
  }
};

// Columns kColumn of A and of P of a block, a lane's channels: A below the diagonal, P from there on. a are
// the decays of the tokens.
template <int kColumn>
__device__ __forceinline__ void block_column(float* v, float2 const (&q)[kBlock], float2 const (&k)[kBlock],
                                             float2 const (&a)[kBlock]) {
  float2 x = k[kColumn];
  v[kBlock - 1 - kColumn] = q[kColumn].x * x.x + q[kColumn].y * x.y;
#pragma unroll
  for (int i = kColumn + 1; i < kBlock; ++i) {
    x = a[i] * x;
    v[i - kColumn - 1] = k[i].x * x.x + k[i].y * x.y;
    v[kBlock - 1 - kColumn + i - kColumn] = q[i].x * x.x + q[i].y * x.y;
  }
}

template <int kColumn = 0>
__device__ __forceinline__ void block_sums(float (&sums)[kBlock / 2], float2 const (&q)[kBlock],
                                           float2 const (&k)[kBlock], float2 const (&a)[kBlock], int lane) {
  if constexpr (kColumn < kBlock / 2) {
    float v[kWarp];
    block_column<kColumn>(v, q, k, a);
    block_column<kBlock - 1 - kColumn>(v + 31 - 2 * kColumn, q, k, a);
    sums[kColumn] = transposed_sum(v, lane);
    block_sums<kColumn + 1>(sums, q, k, a, lane);
  }
}

template <class T, int kKeys, class Record>
__global__ void __launch_bounds__(kPrepareThreads<kKeys>, 2)
    prepare_chunks(__grid_constant__ Inputs const p, Record* records, bool whole) {
  extern __shared__ __align__(128) char shared_bytes[];
  constexpr bool kBackward = Record::kBackward;
  constexpr int kInverses = kBackward ? 2 : 1;
  auto& s = *reinterpret_cast<PrepareShared<T, kKeys, kInverses>*>(shared_bytes);
  constexpr int kParts = kKeys / 64, kWarps = kBlocks * kParts;
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, block = warp % kBlocks;
  int const part = warp / kBlocks, first = block * kBlock, c = 64 * part + 2 * lane;
  int const head = static_cast<int>(blockIdx.x % p.value_heads);
  Chunk const chunk = find_chunk(p, blockIdx.x / p.value_heads);
  if (chunk.tokens == 0) return;
  Record& record = records[blockIdx.x];

  BlockRows<T> rows;
  rows.load(p, chunk, head, first, c, whole);
  auto &q = rows.q, &k = rows.k;
  auto& g = rows.g;
  if (threadIdx.x < kChunk) {
    s.strength[threadIdx.x] = static_cast<int>(threadIdx.x) < chunk.tokens
                                  ? write_strength(p, chunk.row, chunk.begin + threadIdx.x, head)
                                  : 0.f;
  }
  for (int e = threadIdx.x; e < 2 * kInverses * kBlock * kBlock; e += kPrepareThreads<kKeys>) {
    int const corner = e / (kBlock * kBlock);  // above the diagonal of a block that is inverted
    s.inverse[corner / 2][corner % 2][e / kBlock % kBlock * kInverseRow + kBlock + e % kBlock] = 0.f;
  }
  *reinterpret_cast<float2*>(&s.totals[block][c]) = rows.total();
  if (p.qk_l2norm) {
    float squares[kWarp];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      float2 const x = unpack<T>(q[i]), y = unpack<T>(k[i]);
      squares[i] = x.x * x.x + x.y * x.y;
      squares[kBlock + i] = y.x * y.x + y.y * y.y;
    }
    s.squares[part][lane / kBlock][first + lane % kBlock] = transposed_sum(squares, lane);
  }
  __syncthreads();

  // Lanes below 16 have the factors of a token's q, the others of k.
  float factor = lane < kBlock ? p.scale : 1.f;
  if (p.qk_l2norm) {
    float sum = kNormEpsilon;
#pragma unroll
    for (int h = 0; h < kParts; ++h) sum += s.squares[h][lane / kBlock][first + lane % kBlock];
    factor *= rsqrtf(sum);
  }
  if (!kBackward && !p.delta && lane >= kBlock) factor *= s.strength[first + lane % kBlock];

  auto const total_of = [&](int from, int to) {
    float2 sum = {0.f, 0.f};
    for (int b = from; b < to; ++b) sum = sum + *reinterpret_cast<float2 const*>(&s.totals[b][c]);
    return exp2_fast(sum);
  };
  bool const later_half = block >= kBlocks / 2, later_block = block % 2 == 1;
  // Rows of a block begin at a multiple of 16: element_at(i, c) is the same for all arrays.
  int const in_chunk = first * kKeys, in_half = first % kHalf * kKeys, of_half = block / 2 * kBlock * kKeys;
  {
    float2 const before = total_of(0, block), before_in_half = total_of(kBlocks / 2, block);
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      sum = sum + g[i];
      float2 const decay = exp2_fast(sum);
      float2 const qs = __shfl_sync(0xffffffffu, factor, i) * (decay * unpack<T>(q[i]));
      float2 const ks = __shfl_sync(0xffffffffu, factor, kBlock + i) * (decay * unpack<T>(k[i]));
      float2 const q_in = before * qs, k_in = before * ks;
      int const at = element_at<kKeys>(i, c);
      store_pair(record.q_in + in_chunk, at, pack<T>(q_in.x, q_in.y));
      if (p.delta) store_pair(record.k_in + in_chunk, at, pack<T>(k_in.x, k_in.y));
      if (later_block) {
        store_pair(s.q_rows[0] + of_half, at, pack<T>(qs.x, qs.y));
        store_pair(s.k_rows[0] + of_half, at, pack<T>(ks.x, ks.y));
      }
      if (later_half) {
        float2 const x = before_in_half * qs, y = before_in_half * ks;
        store_pair(s.q_rows[1] + in_half, at, pack<T>(x.x, x.y));
        store_pair(s.k_rows[1] + in_half, at, pack<T>(y.x, y.y));
      }
    }
  }
  {
    float2 const behind = total_of(block + 1, kBlocks), behind_in_half = total_of(block + 1, kBlocks / 2);
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      float2 const decay = exp2_fast(sum);
      float2 const ks = __shfl_sync(0xffffffffu, factor, kBlock + i) * (decay * unpack<T>(k[i]));
      sum = sum + g[i];
      float2 const k_out = behind * ks;
      Split const out = split(k_out.x, k_out.y);
      int const at = element_at<kKeys>(i, c);
      store_pair(record.k_out_high + in_chunk, at, out.high);
      store_pair(record.k_out_low + in_chunk, at, out.low);
      auto const store_column = [&](T(&to)[2][kHalf* kKeys], int rows, float2 x) {
        Split const column = split_as<T>(x.x, x.y);
        store_pair(to[0] + rows, at, column.high);
        store_pair(to[1] + rows, at, column.low);
      };
      if (!later_block) store_column(s.columns[0], of_half, ks);
      if (!later_half) store_column(s.columns[1], in_half, behind_in_half * ks);
    }
  }
  if (block == 0) *reinterpret_cast<float2*>(record.decay + c) = total_of(0, kBlocks);
  if constexpr (kBackward) {
    if (threadIdx.x < kChunk) record.strength[threadIdx.x] = s.strength[threadIdx.x];
  }

  // Within the block.
  float sums[kBlock / 2];
  {
    float2 ks[kBlock], qs[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      ks[i] = unpack<T>(k[i]);
      qs[i] = unpack<T>(q[i]);
      g[i] = exp2_fast(g[i]);
    }
    block_sums(sums, qs, ks, g, lane);
  }
#pragma unroll
  for (int j = 0; j < kBlock / 2; ++j) {
    BlockElement const e(lane, j);
    sums[j] *= __shfl_sync(0xffffffffu, factor, e.of_scores ? e.row : kBlock + e.row) *
               __shfl_sync(0xffffffffu, factor, kBlock + e.column);
  }
  auto const add_sums = [&](auto const& add) {
#pragma unroll
    for (int j = 0; j < kBlock / 2; ++j) {
      BlockElement const e(lane, j);
      int const i = first + e.row, column = first + e.column, corner = later_block ? kBlock : 0;
      if (e.of_scores) {
        add(s.scores[i][column], sums[j]);
      } else {
        int const at = (corner + e.row) * kInverseRow + corner + e.column;
        add(s.inverse[0][block / 2][at], s.strength[i] * sums[j]);
        if constexpr (kBackward) add(s.inverse[1][block / 2][at], s.strength[column] * sums[j]);
      }
    }
  };
  if (part == 0) add_sums([](float& x, float y) { x = y; });
  __syncthreads();
  if (part == 1) add_sums([](float& x, float y) { x += y; });

  // Across the borders: six blocks of P, six of A.
  int const r = lane / 4, t = 2 * (lane % 4);
  for (int unit = warp; unit < 12; unit += kWarps) {
    bool const of_scores = unit % 2 == 0, in_half = unit >= 8;
    if (!of_scores && !p.delta) continue;
    int const m = in_half ? unit / 2 - 4 : unit / 4, n = in_half ? m : unit / 2 % 2, border = in_half ? 0 : 1;
    float x[2][4];
    multiply_rows<T, kKeys>(x, of_scores ? s.q_rows[border] : s.k_rows[border], m, s.columns[border][0],
                            s.columns[border][1], n);
    int const row = in_half ? kHalf * m + kBlock : kHalf + kBlock * m;  // in the chunk
    int const column = in_half ? kHalf * m : kBlock * n;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const i = row + r + 8 * half;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2 const pair = {x[h][2 * half], x[h][2 * half + 1]};
        int const j = column + 8 * h + t;
        if (of_scores) {
          *reinterpret_cast<float2*>(&s.scores[i][j]) = pair;
        } else {
          int const matrix = in_half ? m : 2, at = i % kHalf * kInverseRow + j % kHalf;
          *reinterpret_cast<float2*>(s.inverse[0][matrix] + at) = s.strength[i] * pair;
          if constexpr (kBackward) {
            *reinterpret_cast<float2*>(s.inverse[1][matrix] + at) =
                *reinterpret_cast<float2 const*>(s.strength + j) * pair;
          }
        }
      }
    }
  }
  __syncthreads();

  // Two warps an inverse.
  constexpr int kBelow = kHalf * kInverseRow;
  float* const below = reinterpret_cast<float*>(s.q_rows);  // -(X22 A21) X11 of each inverse
  static_assert(sizeof(s.q_rows) + sizeof(s.k_rows) >= kInverses * kBelow * sizeof(float));
  if (p.delta) {
    auto& inverse = s.inverse[warp / 2 % kInverses];
    bool const inverts = warp < 2 * kInverses;
    if (inverts) gdn::portable::invert_32(inverse[warp % 2], lane);
    __syncthreads();
    if (inverts) {
      uint32_t high[2][4], low[2][4];
      float x[4][4];
      int const row = kBlock * (warp % 2);
      gdn::portable::load_split(high, low, inverse[1] + row * kInverseRow, lane);
      gdn::portable::multiply_split<4, 2>(x, high, low, inverse[2], lane);
      gdn::portable::split_fragments(high, low, x);
      gdn::portable::multiply_split<4, 2>(x, high, low, inverse[0], lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<float2*>(below + warp / 2 * kBelow + (row + r + 8 * half) * kInverseRow + 8 * n +
                                     t) = float2{-x[n][2 * half], -x[n][2 * half + 1]};
        }
      }
    }
    __syncthreads();
  }

  // x(i, j) for j <= i, a lower triangle or the upper one that is its transpose.
  auto const write_triangle = [&](Triangle& to, bool lower, auto const& x) {
    auto const element = [&](int i, int j) { return j <= i ? x(i, j) : 0.f; };
    for (int b = warp; b < kChunk / 8 * kChunkSteps; b += kWarps) {
      int const n = b / kChunkSteps, step = b % kChunkSteps;
      if (step > n / 2) continue;
      Split parts[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int const i = lower ? 8 * n + r : kChunk - 16 - 16 * step + 8 * h + t;
        int const j = lower ? 16 * step + 8 * h + t : kChunk - 8 - 8 * n + r;
        parts[h] = split(element(i, j), lower ? element(i, j + 1) : element(i + 1, j));
      }
      to[triangle_block(n, step)][lane] = {parts[0].high, parts[1].high, parts[0].low, parts[1].low};
    }
  };
  auto const inverse_at = [&](int number, int i, int j) {
    float const* const from = i / kHalf == j / kHalf ? s.inverse[number][i / kHalf] : below + number * kBelow;
    return from[i % kHalf * kInverseRow + j % kHalf];
  };
  write_triangle(record.scores, !kBackward, [&](int i, int j) { return s.scores[i][j]; });
  if (!p.delta) return;
  if constexpr (kBackward) {
    write_triangle(record.inverse, true, [&](int i, int j) { return inverse_at(1, i, j); });
    write_triangle(record.transposed_inverse, false, [&](int i, int j) { return inverse_at(0, i, j); });
  } else {
    write_triangle(record.inverse, true, [&](int i, int j) { return inverse_at(0, i, j) * s.strength[j]; });
  }
}

}  // namespace lt2::kda::portable
