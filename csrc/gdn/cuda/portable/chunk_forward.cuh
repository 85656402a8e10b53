// The forward pass by chunks of 32 tokens for operands of 2 bytes, with mma.sync: any GPU since sm_80.
//
// Two launches. prepare_chunks has all chunks at once: what does not depend on the state goes to a workspace,
// one ChunkRecord per chunk and value head. scan_chunks walks the chunks of a sequence; a warp has 16 value
// columns and needs nothing of other warps but the tiles that they load together. With G the inclusive sum of
// the log decays in the chunk, E_ij = e^(G_i - G_j) for i >= j, b the writing strengths and kn, qn the
// factors of the l2norm:
//   T~ = E o (I + strictlow(b_i kn_i kn_j k_i.k_j))^-1 diag(b)      P = scale E o (qn_i kn_j q_i.k_j)
//   W = V - e^G kn K S      U = T~ W      O = scale e^G qn Q S + P U      S <- e^G_last S + K^T (e^(G_last -
//   G) kn U)
// Without the delta rule U = diag(b) V: no T~, no K S.
// Everything with S is transposed: rows are value columns, so that S stays in the registers as accumulators,
// and packed in pairs it is the first operand of the next product. Where keys repeat, sums over a chunk
// cancel: T~, P, W, U and what S gains are pairs of bf16 that add up to them (what S gains is one fp16 where
// the keys are fp16).
#pragma once

#include "common/cuda/mma.cuh"
#include "gdn/cuda/portable/inverse.cuh"
#include "gdn/cuda/portable/problem.cuh"

namespace lt2::gdn::portable {

inline constexpr int kScanChunk = 32;
inline constexpr int kPad = 8;  // elements at the end of a row in shared memory, against bank conflicts
inline constexpr int kWarpValues = 16;                                        // columns of a warp
inline constexpr int kScanWarps = 4, kScanValues = kScanWarps * kWarpValues;  // of a block
inline constexpr int kChunkThreads = kScanWarps * kWarp, kPrepareThreads = 2 * kWarp;

// Blocks [8 x 16] of a lower triangle [32 x 32]: (rows 8 n .., columns 16 k ..) for k <= n / 2.
inline constexpr int kTriangleBlocks = 6;
__host__ __device__ constexpr int triangle_block(int n, int k) { return n < 2 ? n : 2 * n - 2 + k; }

// T~ and P as second operands of products: a lane's two registers of high parts, then those of low parts.
struct alignas(16) ChunkRecord {
  uint4 inverse[kTriangleBlocks][kWarp], scores[kTriangleBlocks][kWarp];
  float k_in[kScanChunk];   // e^G kn: what k sees of the state before the chunk; without the delta rule b
  float k_out[kScanChunk];  // e^(G_last - G) kn: what is left of a write at the end of the chunk
  float q_in[kScanChunk];   // scale e^G qn
  float decay[4];           // e^G_last, as often as a copy takes
};

template <class T, int kColumns>
using ChunkRows = T[kScanChunk][kColumns + kPad];

// Where such rows are, for instructions that take the address in shared memory: made once of a pointer,
// because that takes as long as a product.
template <class T, int kColumns>
struct SharedRows {
  uint32_t address;

  __device__ __forceinline__ uint32_t at(int row, int column) const {
    return address + (row * (kColumns + kPad) + column) * static_cast<int>(sizeof(T));
  }
};

// A thread's share in copies of chunks of rows of `width` elements: kThreads / 32 adjacent threads have a
// row.
template <class T, int kColumns, int kThreads>
struct RowCopies {
  static constexpr int kShare = kThreads / kScanChunk;
  T const* from;  // its first piece of the chunk

  __device__ __forceinline__ RowCopies(T const* rows, int64_t stride)
      : from(rows + row() * stride + 8 * part()) {}
  __device__ __forceinline__ static int row() { return threadIdx.x / kShare; }
  __device__ __forceinline__ static int part() { return threadIdx.x % kShare; }

  // Starts to copy `count` rows; zeros fill up the rest of `to`. `whole`: rows are made of aligned pieces of
  // 16 bytes.
  __device__ __forceinline__ void start(SharedRows<T, kColumns> to, int count, int width, bool whole) const {
    bool const present = row() < count;
    if (whole) {
#pragma unroll
      for (int piece = 0; piece < kColumns; piece += 8 * kShare)
        copy_16(to.at(row(), piece + 8 * part()), from + piece, present && piece + 8 * part() < width);
    } else {
#pragma unroll 1
      for (int c = part(); c < kColumns; c += kShare)
        *static_cast<T*>(__cvta_shared_to_generic(to.at(row(), c))) =
            present && c < width ? from[c - 8 * part()] : from_float<T>(0.f);
    }
  }
};

// Fragments of a first operand, rows 16 m .. of `rows`, columns 16 k ..
template <class T, int kColumns>
__device__ __forceinline__ void load_first(uint32_t (&a)[4], SharedRows<T, kColumns> rows, int m, int k) {
  int const lane = threadIdx.x % kWarp;
  load_matrices(a, rows.at(16 * m + lane % 16, 16 * k + lane / 16 * 8));
}
// Of two second operands: columns 8 n .. and 8 (n + 1) .. of rows^T, 16 elements k of the summed axis.
template <class T, int kColumns>
__device__ __forceinline__ void load_second(uint32_t (&b)[4], SharedRows<T, kColumns> rows, int n, int k) {
  int const lane = threadIdx.x % kWarp;
  load_matrices(b, rows.at(8 * n + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8));
}
// The same of `rows` itself: the summed axis are rows 16 k ..
template <class T, int kColumns>
__device__ __forceinline__ void load_second_of_rows(uint32_t (&b)[4], SharedRows<T, kColumns> rows, int n,
                                                    int k) {
  int const lane = threadIdx.x % kWarp;
  load_matrices_transposed(b, rows.at(16 * k + lane % 16, 8 * n + lane / 16 * 8));
}

// 1 / |row| as the l2norm has it.
template <class T, int kRow>
__device__ float row_norm(T const (&row)[kRow]) {
  float sum[2] = {};
#pragma unroll 4
  for (int c = 0; c < kRow - kPad; c += 8) {
    uint4 const x = *reinterpret_cast<uint4 const*>(&row[c]);
    for (uint32_t const word : {x.x, x.y, x.z, x.w}) {
      float2 const e = unpack<T>(word);
      sum[0] = fmaf(e.x, e.x, sum[0]);
      sum[1] = fmaf(e.y, e.y, sum[1]);
    }
  }
  return rsqrtf(sum[0] + sum[1] + kNormEpsilon);
}

// G / ln 2 of this lane's token; tokens from `count` on do not decay.
__device__ inline float scan_log2_decay(Inputs const& p, Chunk const& chunk, int head, int lane) {
  float sum = 0.f;
  if (lane < chunk.tokens) {
    float const g = log_decay(p, chunk.row, chunk.begin + lane, head);
    sum = g < kLeastLog2Decay / kLog2E ? kLeastLog2Decay : g * kLog2E;
  }
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    float const before = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += before;
  }
  return sum;
}

template <class T, int kKeys>
struct PrepareShared {
  ChunkRows<T, kKeys> rows[2];  // of k, of q
  alignas(16) float matrix[kScanChunk * kInverseRow];
  float log2_decay[2][kScanChunk];  // of each warp
  float strength[kScanChunk];       // b
  float norm[2][kScanChunk];        // kn, qn
};

// Block (chunk number, query/key head), its value heads in turn. Warp 0 has K K^T and T~, warp 1 Q K^T and P.
template <class T, int kKeys>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_chunks(__grid_constant__ Inputs const p, ChunkRecord* records, bool whole) {
  __shared__ PrepareShared<T, kKeys> s;
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = 2 * (lane % 4);
  int const key_head = static_cast<int>(blockIdx.x % p.heads), group = p.value_heads / p.heads;
  int64_t const number = blockIdx.x / p.heads;
  Chunk const chunk = find_chunk<kScanChunk>(p, number);
  if (chunk.tokens == 0) return;
  using Copies = RowCopies<T, kKeys, kPrepareThreads>;
  Copies const k(token_row<T const>(p.k, chunk.row, chunk.begin, key_head), p.k.token);
  Copies const q(token_row<T const>(p.q, chunk.row, chunk.begin, key_head), p.q.token);
  SharedRows<T, kKeys> const k_rows{shared_address(s.rows[0])}, q_rows{shared_address(s.rows[1])};
  k.start(k_rows, chunk.tokens, p.key_dim, whole);
  q.start(q_rows, chunk.tokens, p.key_dim, whole);
  wait_copies();
  __syncthreads();
  s.norm[warp][lane] = p.qk_l2norm ? row_norm(s.rows[warp][lane]) : 1.f;

  float products[2][kScanChunk / 8][4] = {};  // the lower triangle's rows 16 m .., columns 8 n ..
#pragma unroll 4
  for (int k = 0; k < kKeys / 16; ++k) {
    uint32_t a[4], b[kScanChunk / 16][4];
#pragma unroll
    for (int n = 0; n < kScanChunk / 16; ++n) load_second(b[n], k_rows, 2 * n, k);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      load_first(a, warp == 0 ? k_rows : q_rows, m, k);
#pragma unroll
      for (int n = 0; n < 2 * (m + 1); ++n)
        mma<T>(products[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
  __syncthreads();

  float* const log2_decay = s.log2_decay[warp];
  for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
    ChunkRecord& record = records[number * p.value_heads + head];
    float const sum = scan_log2_decay(p, chunk, head, lane);
    float const last = __shfl_sync(0xffffffffu, sum, kWarp - 1), norm = s.norm[warp][lane];
    log2_decay[lane] = sum;
    if (warp == 0) {
      s.strength[lane] = lane < chunk.tokens ? write_strength(p, chunk.row, chunk.begin + lane, head) : 0.f;
      record.k_in[lane] = p.delta ? exp2_fast(sum) * norm : s.strength[lane];
      record.k_out[lane] = exp2_fast(last - sum) * norm;
      if (lane < 4) record.decay[lane] = exp2_fast(last);
    } else {
      record.q_in[lane] = p.scale * exp2_fast(sum) * norm;
    }
    __syncwarp();
    if (warp == 0 && p.delta) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int const i = 16 * m + 8 * half + g;
          float const factor = s.strength[i] * s.norm[0][i];
#pragma unroll
          for (int n = 0; n < 2 * (m + 1); ++n) {
            int const j = 8 * n + t;
            float const* const kk = &products[m][n][2 * half];
            *reinterpret_cast<float2*>(s.matrix + i * kInverseRow + j) =
                float2{j < i ? factor * s.norm[0][j] * kk[0] : 0.f,
                       j + 1 < i ? factor * s.norm[0][j + 1] * kk[1] : 0.f};
          }
        }
      }
      __syncwarp();
      invert_32(s.matrix, lane);
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kScanChunk / 8; ++n) {
#pragma unroll
        for (int k = 0; k <= n / 2; ++k) {
          int const i = 8 * n + g, j = 16 * k + t;
          float2 const x = *reinterpret_cast<float2 const*>(s.matrix + i * kInverseRow + j);
          float2 const y = *reinterpret_cast<float2 const*>(s.matrix + i * kInverseRow + j + 8);
          Split const first = inverse_pair<__nv_bfloat16>(log2_decay, s.strength, i, j, x.x, x.y);
          Split const second = inverse_pair<__nv_bfloat16>(log2_decay, s.strength, i, j + 8, y.x, y.y);
          record.inverse[triangle_block(n, k)][lane] = {first.high, second.high, first.low, second.low};
        }
      }
    } else if (warp == 1) {
#pragma unroll
      for (int n = 0; n < kScanChunk / 8; ++n) {
        int const i = 8 * n + g;
        float const factor = p.scale * s.norm[1][i], decay = log2_decay[i];
#pragma unroll
        for (int k = 0; k <= n / 2; ++k) {
          Split part[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            int const j = 16 * k + 8 * h + t;
            float const* const qk = &products[n / 2][2 * k + h][n % 2 * 2];
            part[h] = split(
                j <= i ? factor * s.norm[0][j] * exp2_fast(decay - log2_decay[j]) * qk[0] : 0.f,
                j + 1 <= i ? factor * s.norm[0][j + 1] * exp2_fast(decay - log2_decay[j + 1]) * qk[1] : 0.f);
          }
          record.scores[triangle_block(n, k)][lane] = {part[0].high, part[1].high, part[0].low, part[1].low};
        }
      }
    }
    __syncwarp();
  }
}

// x [16 x 32] as pairs of fragments.
struct SplitRows {
  uint32_t high[kScanChunk / 16][4], low[kScanChunk / 16][4];

  __device__ __forceinline__ SplitRows(float const (&x)[kScanChunk / 8][4]) {
#pragma unroll
    for (int n = 0; n < kScanChunk / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Split const s = split(x[n][2 * half], x[n][2 * half + 1]);
        high[n / 2][n % 2 * 2 + half] = s.high;
        low[n / 2][n % 2 * 2 + half] = s.low;
      }
    }
  }
};

// d += a m^T, with a lower triangle m.
__device__ __forceinline__ void multiply_triangle(float (&d)[kScanChunk / 8][4], SplitRows const& a,
                                                  uint4 const (&m)[kTriangleBlocks][kWarp], int lane) {
#pragma unroll
  for (int n = 0; n < kScanChunk / 8; ++n) {
#pragma unroll
    for (int k = 0; k <= n / 2; ++k) {
      uint4 const b = m[triangle_block(n, k)][lane];
      mma<__nv_bfloat16>(d[n], a.low[k], b.x, b.y);
      mma<__nv_bfloat16>(d[n], a.high[k], b.z, b.w);
      mma<__nv_bfloat16>(d[n], a.high[k], b.x, b.y);
    }
  }
}

template <class T, int kKeys>
struct alignas(16) ScanStage {
  ChunkRows<T, kKeys> k, q;
  ChunkRows<T, kScanValues> v;  // and o, in the place of what has been read
  ChunkRecord record;
};
// Where its parts are.
template <class T, int kKeys>
struct StageRows {
  using Stage = ScanStage<T, kKeys>;
  SharedRows<T, kKeys> k, q;
  SharedRows<T, kScanValues> v;
  uint32_t record;

  __device__ __forceinline__ explicit StageRows(uint32_t stage)
      : k{stage},
        q{stage + static_cast<uint32_t>(offsetof(Stage, q))},
        v{stage + static_cast<uint32_t>(offsetof(Stage, v))},
        record(stage + static_cast<uint32_t>(offsetof(Stage, record))) {}
};

// A warp's 16 columns of a state, transposed.
template <class T, int kKeys>
struct ScanState {
  float s[kKeys / 8][4] = {};

  // f(element, where it is) for each of this lane's elements that a state of p has.
  template <class F>
  __device__ void each(Inputs const& p, State const& state, int column, int lane, F const& f) {
    int const value = column + lane / 4;
    float* at = state.data + value * state.value_stride + 2 * (lane % 4) * state.key_stride;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * n + 2 * (lane % 4) + i % 2 < p.key_dim && value + i / 2 * 8 < p.value_dim) {
          f(s[n][i], at + i % 2 * state.key_stride + i / 2 * 8 * state.value_stride);
        }
      }
      at += 8 * state.key_stride;
      asm volatile("" : "+l"(at));
    }
  }

  // One chunk; its output replaces the warp's columns, from `column` on, of stage.v.
  __device__ __forceinline__ void advance(ScanStage<T, kKeys>& stage, StageRows<T, kKeys> rows, int column,
                                          int lane, bool delta) {
    constexpr int kSteps = kScanChunk / 8;
    ChunkRecord const& record = stage.record;
    int const t = 2 * (lane % 4);
    float ks[kSteps][4] = {}, o[kSteps][4] = {};
    if (kManyKeys || !delta) {
      if (delta) multiply(ks, rows.k);
      if (!kManyKeys) multiply(o, rows.q);
    } else {
      multiply(ks, rows.k, o, rows.q);
    }

    // W takes the place of K S; without the delta rule U does.
#pragma unroll
    for (int n = 0; n < kSteps; n += 2) {
      uint32_t v[4];
      load_matrices_transposed(v, rows.v.at(8 * n + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float2 const factor = *reinterpret_cast<float2 const*>(record.k_in + 8 * (n + j) + t);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 const x = unpack<T>(v[2 * j + half]);
          float* const w = &ks[n + j][2 * half];
          w[0] = delta ? x.x - factor.x * w[0] : factor.x * x.x;
          w[1] = delta ? x.y - factor.y * w[1] : factor.y * x.y;
        }
      }
    }
    float u[kSteps][4] = {};
    if (delta) {
      multiply_triangle(u, SplitRows(ks), record.inverse, lane);
    } else {
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) u[n][i] = ks[n][i];
      }
    }
    if constexpr (kManyKeys) multiply(o, rows.q);
    scale_tokens(o, record.q_in, t);
    multiply_triangle(o, SplitRows(u), record.scores, lane);
    scale_tokens(u, record.k_out, t);
    float const decay = record.decay[0];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= decay;
    }
    gain(rows.k, u);

    __syncwarp();  // all lanes have read v
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<uint32_t*>(&stage.v[8 * n + lane / 4][column + 8 * half + t]) =
            transposed(pack<T>(o[n][2 * half], o[n][2 * half + 1]));
      }
    }
    __syncwarp();
  }

 private:
  // Many keys leave no registers for two products of the state at a time.
  static constexpr bool kManyKeys = kKeys > 192;

  // The state of keys 16 k .. as a first operand.
  __device__ __forceinline__ void pack_state(uint32_t (&a)[4], int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack<T>(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
  }

  // x += a rows^T for keys 16 k ..
  __device__ __forceinline__ static void multiply_keys(float (&x)[kScanChunk / 8][4], uint32_t const (&a)[4],
                                                       SharedRows<T, kKeys> rows, int k) {
#pragma unroll
    for (int n = 0; n < kScanChunk / 8; n += 2) {
      uint32_t b[4];
      load_second(b, rows, n, k);
      mma<T>(x[n], a, b[0], b[1]);
      mma<T>(x[n + 1], a, b[2], b[3]);
    }
  }

  // x += s rows^T
  __device__ __forceinline__ void multiply(float (&x)[kScanChunk / 8][4], SharedRows<T, kKeys> rows) const {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t a[4];
      pack_state(a, k);
      multiply_keys(x, a, rows, k);
      if (kManyKeys && k % 2 == 1) __syncwarp();
    }
  }

  // x += s x_rows^T, y += s y_rows^T
  __device__ __forceinline__ void multiply(float (&x)[kScanChunk / 8][4], SharedRows<T, kKeys> x_rows,
                                           float (&y)[kScanChunk / 8][4], SharedRows<T, kKeys> y_rows) const {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t a[4];
      pack_state(a, k);
      multiply_keys(x, a, x_rows, k);
      multiply_keys(y, a, y_rows, k);
    }
  }

  // x[.., token] *= factor[token]; t is the lane's first token.
  __device__ __forceinline__ static void scale_tokens(float (&x)[kScanChunk / 8][4], float const* factor,
                                                      int t) {
#pragma unroll
    for (int n = 0; n < kScanChunk / 8; ++n) {
      float2 const f = *reinterpret_cast<float2 const*>(factor + 8 * n + t);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] *= i % 2 == 0 ? f.x : f.y;
    }
  }

  // s += x K
  __device__ __forceinline__ void gain(SharedRows<T, kKeys> rows, float const (&x)[kScanChunk / 8][4]) {
    constexpr bool kSplit = std::is_same_v<T, __nv_bfloat16>;
    uint32_t a[kScanChunk / 16][4], low[kScanChunk / 16][4];
#pragma unroll
    for (int k = 0; k < kScanChunk / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const* const pair = &x[2 * k + i / 2][i % 2 * 2];
        a[k][i] = pack<T>(pair[0], pair[1]);
        if constexpr (kSplit) low[k][i] = split(pair[0], pair[1]).low;
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
#pragma unroll
      for (int k = 0; k < kScanChunk / 16; ++k) {
        uint32_t b[4];
        load_second_of_rows(b, rows, n, k);
        if constexpr (kSplit) {
          mma<T>(s[n], low[k], b[0], b[1]);
          mma<T>(s[n + 1], low[k], b[2], b[3]);
        }
        mma<T>(s[n], a[k], b[0], b[1]);
        mma<T>(s[n + 1], a[k], b[2], b[3]);
      }
      if (kManyKeys && n % 4 == 2) __syncwarp();
    }
  }
};

// What a block scans; o and v from its first column on.
template <class T>
struct ScanUnit {
  T const *q, *k, *v;
  T* o;
  ChunkRecord const* records;  // value_heads apart
  int64_t state;
  int chunks, tail, first;  // tail: tokens of the last chunk; first: column

  __device__ void set(ForwardParams const& p, ChunkRecord const* all_records) {
    int const slices = static_cast<int>(ceil_div(p.value_dim, kScanValues));
    int64_t const n = blockIdx.x / slices / p.value_heads;
    int const head = static_cast<int>(blockIdx.x / slices % p.value_heads);
    int const key_head = head / (p.value_heads / p.heads);
    Sequence const sequence = portable::sequence(p, n);
    first = static_cast<int>(blockIdx.x % slices) * kScanValues;
    q = token_row<T const>(p.q, sequence.row, sequence.begin, key_head);
    k = token_row<T const>(p.k, sequence.row, sequence.begin, key_head);
    v = token_row<T const>(p.v, sequence.row, sequence.begin, head) + first;
    o = token_row<T>(p.o, sequence.row, sequence.begin, head) + first;
    records = all_records + first_chunk<kScanChunk>(p, n) * p.value_heads + head;
    state = n * p.value_heads + head;
    chunks = static_cast<int>(ceil_div(sequence.length, kScanChunk));
    tail = static_cast<int>(sequence.length - int64_t{chunks - 1} * kScanChunk);
  }
};

// A thread's part of the reads and writes of a chunk.
template <class T, int kKeys>
struct ThreadPieces {
  RowCopies<T, kKeys, kChunkThreads> k, q;
  RowCopies<T, kScanValues, kChunkThreads> v;
  char const* record;
  T* o;  // 8 columns of every 16th token

  __device__ __forceinline__ ThreadPieces(ForwardParams const& p, ScanUnit<T> const& unit, int chunk)
      : k(unit.k + chunk * kScanChunk * p.k.token, p.k.token),
        q(unit.q + chunk * kScanChunk * p.q.token, p.q.token),
        v(unit.v + chunk * kScanChunk * p.v.token, p.v.token),
        record(reinterpret_cast<char const*>(unit.records + int64_t{chunk} * p.value_heads) +
               threadIdx.x * 16),
        o(unit.o + (chunk * kScanChunk + row()) * p.o.token + column()) {}
  __device__ __forceinline__ static int row() { return threadIdx.x % kWarp / 2; }
  __device__ __forceinline__ static int column() {
    return threadIdx.x / kWarp * kWarpValues + threadIdx.x % 2 * 8;
  }
  __device__ __forceinline__ void next_reads(ForwardParams const& p) {
    k.from += kScanChunk * p.k.token;
    q.from += kScanChunk * p.q.token;
    v.from += kScanChunk * p.v.token;
    record += p.value_heads * static_cast<int64_t>(sizeof(ChunkRecord));
  }
};

// Block (slice of values, value head, sequence). Addresses stay in registers from chunk to chunk, but not
// with many keys, which leave none.
template <class T, int kKeys>
__global__ void __launch_bounds__(kChunkThreads, kKeys <= 64 ? 3 : 2)
    scan_chunks(__grid_constant__ ForwardParams const p, ChunkRecord const* records, bool whole) {
  constexpr bool kKept = kKeys <= 192;
  using Pieces = ThreadPieces<T, kKeys>;
  extern __shared__ __align__(16) char shared_bytes[];
  auto* const stages = reinterpret_cast<ScanStage<T, kKeys>*>(shared_bytes);  // 2
  __shared__ ScanUnit<T> unit;
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, column = warp * kWarpValues;
  if (threadIdx.x == 0) unit.set(p, records);
  __syncthreads();
  int const values = p.value_dim - unit.first, chunks = unit.chunks;
  uint32_t first_stage = shared_address(stages);
  if (kKept) asm volatile("" : "+r"(first_stage));  // it is not made again
  auto const rows_of = [&](int c) {
    return StageRows<T, kKeys>(first_stage + c % 2 * static_cast<int>(sizeof(ScanStage<T, kKeys>)));
  };
  auto const count_of = [&](int c) { return c == chunks - 1 ? unit.tail : kScanChunk; };
  Pieces pieces(p, unit, 0);
  auto const load = [&](int c) {
    if (!kKept) pieces = Pieces(p, unit, c);
    StageRows<T, kKeys> const to = rows_of(c);
    pieces.k.start(to.k, count_of(c), p.key_dim, whole);
    pieces.q.start(to.q, count_of(c), p.key_dim, whole);
    pieces.v.start(to.v, count_of(c), values, whole);
#pragma unroll
    for (int at = 0; at < static_cast<int>(sizeof(ChunkRecord)); at += kChunkThreads * 16) {
      int const e = at + threadIdx.x * 16;
      if (e < static_cast<int>(sizeof(ChunkRecord))) copy_16(to.record + e, pieces.record + at, true);
    }
    pieces.next_reads(p);
  };

  if (chunks > 0) load(0);
  ScanState<T, kKeys> scan;
  auto const of_state = [&](float* data) {
    return dense_state(data, unit.state, p.key_dim, p.value_dim, p.state_v_first);
  };
  if (p.initial_state != nullptr) {
    scan.each(p, of_state(const_cast<float*>(p.initial_state)), unit.first + column, lane,
              [](float& s, float const* at) { s = *at; });
  }
  for (int c = 0; c < chunks; ++c) {
    if (!kKept) asm volatile("" : "+r"(c));  // what follows from it is made again
    wait_copies();
    __syncthreads();  // chunk c is here, and nobody reads the other stage any more
    if (c + 1 < chunks) load(c + 1);
    if (column >= values) continue;
    ScanStage<T, kKeys>& stage = stages[c % 2];
    scan.advance(stage, rows_of(c), column, lane, p.delta);
    T* const o = kKept ? pieces.o : Pieces(p, unit, c).o;
    int const count = count_of(c), present = values - Pieces::column();
#pragma unroll
    for (int i = 0; i < kScanChunk; i += kScanChunk / 2) {
      T const* const from = &stage.v[i + Pieces::row()][Pieces::column()];
      if (i + Pieces::row() >= count || present <= 0) continue;
      if (whole) {
        *reinterpret_cast<uint4*>(o + i * p.o.token) = *reinterpret_cast<uint4 const*>(from);
      } else {
#pragma unroll 1
        for (int j = 0; j < min(8, present); ++j) o[i * p.o.token + j] = from[j];
      }
    }
    pieces.o += kScanChunk * p.o.token;
  }
  if (p.final_state == nullptr) return;
  scan.each(p, of_state(p.final_state), unit.first + column, lane, [](float s, float* at) { *at = s; });
}

}  // namespace lt2::gdn::portable
