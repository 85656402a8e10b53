// What is left of the backward pass once both scans are done, for bf16 operands: everything of a chunk at
// once, all chunks in parallel. The equations are those of gradients.cuh. Here decays are split at borders as
// in chunk_prepare.cuh; what is left are blocks of 16 tokens, where sums go by Horner's rule.
#pragma once

#include "gdn/cuda/portable/micro.cuh"
#include "kda/cuda/portable/chunk_prepare.cuh"

namespace lt2::kda::portable {

inline constexpr int kGradientKeys = 128, kPanel = 64;  // channels; values at a time
inline constexpr int kSumRow = 64 + 8;                  // floats; 8 more than 64, against bank conflicts
static_assert(kGradientThreads == kPrepareThreads<kGradientKeys>);

struct GradientPanel {
  __nv_bfloat16 dout[kChunk * kPanel], writes[kChunk * kPanel], dvalues[kChunk * kPanel];
  __nv_bfloat16 state[kGradientKeys * kPanel], dstate[kGradientKeys * kPanel];
};
// High and low parts of a row of channels for each token of half a chunk.
using SplitOperand = __nv_bfloat16[2][kHalf * kGradientKeys];
// Rows and columns as in PrepareShared. All are pairs: what a pair of tokens adds to dg of the later one it
// takes away from that of the earlier one, and roundings that differ would stay in dg of all tokens before.
struct GradientOperands {
  SplitOperand q_rows[2], k_rows[2], columns[2];
};
// Of a warp, 16 tokens by 64 channels: what rows collect for q and for k, what of a write is left at the end
// of the chunk, and what its column collects.
struct GradientSums {
  float2 by_p[kBlock][kSumRow / 2], by_a[kBlock][kSumRow / 2], after[kBlock][kSumRow / 2],
      from[kBlock][kSumRow / 2];
};

struct ChunkGradientShared {
  union {
    GradientPanel panel;
    GradientOperands operands;
    GradientSums sums[kGradientThreads / kWarp];
  };
  float2 pairs[kChunk][kChunk + 2];  // scale dP, dA
  float totals[kBlocks][kGradientKeys];
  float before[kBlocks][kGradientKeys], behind[kBlocks][kGradientKeys], in_half[kBlocks][kGradientKeys];
  float through[kGradientKeys];
  float strength[kChunk];
  Norms norms;
};

// A [16 x 16] operand: rows i .. and columns j .. of dP or dA, or of their transpose.
template <bool kOfP>
__device__ __forceinline__ void load_pairs(uint32_t (&a)[4], float2 const (&pairs)[kChunk][kChunk + 2], int i,
                                           int j) {
  int const lane = threadIdx.x % kWarp, r = lane / 4, t = 2 * (lane % 4);
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    float4 const two = *reinterpret_cast<float4 const*>(&pairs[i + r + x % 2 * 8][j + t + x / 2 * 8]);
    a[x] = kOfP ? pack<__nv_bfloat16>(two.x, two.z) : pack<__nv_bfloat16>(two.y, two.w);
  }
}
template <bool kOfP>
__device__ __forceinline__ void load_transposed_pairs(uint32_t (&a)[4],
                                                      float2 const (&pairs)[kChunk][kChunk + 2], int i,
                                                      int j) {
  int const lane = threadIdx.x % kWarp, r = lane / 4, t = 2 * (lane % 4);
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    float2 const one = pairs[i + t + x / 2 * 8][j + r + x % 2 * 8];
    float2 const two = pairs[i + t + x / 2 * 8 + 1][j + r + x % 2 * 8];
    a[x] = kOfP ? pack<__nv_bfloat16>(one.x, two.x) : pack<__nv_bfloat16>(one.y, two.y);
  }
}

// x [16 x 64] += a rows: 16 rows from `row` on, 64 channels of `part`.
__device__ __forceinline__ void add_rows(float (&x)[8][4], uint32_t const (&a)[4], SplitOperand const& rows,
                                         int row, int part) {
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int low = 1; low >= 0; --low) {
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t b[4];
      int const at = element_at<kGradientKeys>(row + lane % 16, 64 * part + 8 * n + lane / 16 * 8);
      load_matrices_transposed(b, shared_address(rows[low] + at));
      mma<__nv_bfloat16>(x[n], a, b[0], b[1]);
      mma<__nv_bfloat16>(x[n + 1], a, b[2], b[3]);
    }
  }
}

// x [16 x 8 kN] += a rows^T: rows from `row` on, 16 of the panel's values from `value` on.
template <int kN>
__device__ __forceinline__ void add_panel(float (&x)[8][4], uint32_t const (&a)[4], __nv_bfloat16 const* rows,
                                          int row, int value, int tiles = kN) {
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    if (n >= tiles) continue;
    uint32_t b[4];
    load_matrices(b, shared_address(rows + element_at<kPanel>(row + 8 * n + lane / 16 * 8 + lane % 8,
                                                              value + lane / 8 % 2 * 8)));
    mma<__nv_bfloat16>(x[n], a, b[0], b[1]);
    mma<__nv_bfloat16>(x[n + 1], a, b[2], b[3]);
  }
}

__device__ __forceinline__ void clear(float (&x)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = 0.f;
  }
}
// f by channel.
__device__ __forceinline__ void scale_channels(float (&x)[8][4], float const* f, float factor = 1.f) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    float2 const c = factor * *reinterpret_cast<float2 const*>(f + 8 * n + 2 * (threadIdx.x % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] *= i % 2 == 0 ? c.x : c.y;
  }
}
__device__ __forceinline__ void store_sums(float2 (&to)[kBlock][kSumRow / 2], float const (&x)[8][4]) {
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to[lane / 4 + 8 * half][4 * n + lane % 4] = {x[n][2 * half], x[n][2 * half + 1]};
    }
  }
}

// Block (chunk number, value head); warp (block of 16 tokens, 64 channels).
static __global__ void __launch_bounds__(kGradientThreads, 1)
    chunk_gradients_bf16(__grid_constant__ BackwardParams const p, __grid_constant__ Workspace const w,
                         bool whole) {
  using T = __nv_bfloat16;
  extern __shared__ __align__(128) char shared_bytes[];
  auto& s = *reinterpret_cast<ChunkGradientShared*>(shared_bytes);
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, block = warp % kBlocks;
  int const part = warp / kBlocks, first = block * kBlock, c = 64 * part + 2 * lane;
  int const head = static_cast<int>(blockIdx.x % p.value_heads);
  int64_t const number = blockIdx.x / p.value_heads;
  Chunk const chunk = find_chunk(p, number);
  if (chunk.tokens == 0) return;
  int const K = p.key_dim, V = p.value_dim, tokens = chunk.tokens;
  int64_t const first_row = (chunk.row * p.tokens + chunk.begin) * p.value_heads + head;
  float const* const residual_rows = w.residuals + first_row * V;
  float const* const dwrite_rows = w.dwrites + first_row * V;
  int64_t const value_stride = static_cast<int64_t>(p.value_heads) * V;
  int64_t const key_stride = static_cast<int64_t>(p.value_heads) * K;
  float const* const state = w.states + blockIdx.x * static_cast<int64_t>(K) * V;
  float const* const dstate = w.dstates + blockIdx.x * static_cast<int64_t>(K) * V;
  T const* const dout_rows = token_row<T const>(p.dout, chunk.row, chunk.begin, head);

  if (threadIdx.x < kChunk) {
    int const i = threadIdx.x;
    s.strength[i] = i < tokens ? write_strength(p, chunk.row, chunk.begin + i, head) : 0.f;
  }
  norms_and_dbeta<T>(p, chunk, head, residual_rows, dwrite_rows, s.norms);

  float scores[8][4], by_p[8][4], by_a[8][4], after[8][4];  // scores: dP or, of the second part, -dA
  clear(scores);
  clear(by_p);
  clear(by_a);
  clear(after);
  constexpr int kQuads = kPanel / 4, kStateRounds = kGradientKeys * kQuads / kGradientThreads;
  for (int begin = 0; begin < V; begin += kPanel) {
    __syncthreads();
#pragma unroll
    for (int e = threadIdx.x; e < kChunk * kPanel / 8; e += kGradientThreads) {
      int const i = e / (kPanel / 8), value = e % (kPanel / 8) * 8;
      uint4 piece = {0, 0, 0, 0};
      if (i < tokens && begin + value < V) {
        T const* const from = dout_rows + i * p.dout.token + begin + value;
        if (whole) {
          piece = *reinterpret_cast<uint4 const*>(from);
        } else {
          for (int x = 0; x < 8; ++x) reinterpret_cast<T*>(&piece)[x] = from[x];
        }
      }
      *reinterpret_cast<uint4*>(s.panel.dout + element_at<kPanel>(i, value)) = piece;
    }
    auto const store = [](T* to, float4 x) {
      *reinterpret_cast<uint2*>(to) = {pack<T>(x.x, x.y), pack<T>(x.z, x.w)};
    };
    auto const load = [](bool present, float const* from) {
      return present ? *reinterpret_cast<float4 const*>(from) : float4{0.f, 0.f, 0.f, 0.f};
    };
#pragma unroll
    for (int e = threadIdx.x; e < kChunk * kQuads; e += kGradientThreads) {
      int const i = e / kQuads, value = e % kQuads * 4, at = element_at<kPanel>(i, value);
      bool const present = i < tokens && begin + value < V;
      float const b = s.strength[i], db = p.delta ? b : 0.f;
      float4 const r = load(present, residual_rows + i * value_stride + begin + value);
      float4 const du = load(present, dwrite_rows + i * value_stride + begin + value);
      store(s.panel.writes + at, {b * r.x, b * r.y, b * r.z, b * r.w});
      store(s.panel.dvalues + at, {db * du.x, db * du.y, db * du.z, db * du.w});
    }
#pragma unroll 4
    for (int round = 0; round < kStateRounds; ++round) {
      int const e = threadIdx.x + round * kGradientThreads, channel = e / kQuads, value = e % kQuads * 4;
      bool const present = channel < K && begin + value < V;
      float4 const x = load(present, state + channel * V + begin + value);
      float4 const dx = load(present, dstate + channel * V + begin + value);
      float const sum = lane_sum<kQuads>(x.x * dx.x + x.y * dx.y + x.z * dx.z + x.w * dx.w);
      if (value == 0) s.through[channel] = begin == 0 ? sum : s.through[channel] + sum;
      store(s.panel.state + element_at<kPanel>(channel, value), x);
      store(s.panel.dstate + element_at<kPanel>(channel, value), dx);
    }
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < kPanel / 16; ++k) {
      uint32_t dout[4], dvalue[4], write[4];
      int const at = element_at<kPanel>(first + lane % 16, 16 * k + lane / 16 * 8);
      load_matrices(dout, shared_address(s.panel.dout + at));
      load_matrices(dvalue, shared_address(s.panel.dvalues + at));
      load_matrices(write, shared_address(s.panel.writes + at));
      add_panel<8>(by_p, dout, s.panel.state, 64 * part, 16 * k);
      add_panel<8>(by_a, dvalue, s.panel.state, 64 * part, 16 * k);
      add_panel<8>(after, write, s.panel.dstate, 64 * part, 16 * k);
      if (part == 0) {
        add_panel<8>(scores, dout, s.panel.writes, 0, 16 * k, 2 * block + 2);
      } else {
        add_panel<8>(scores, dvalue, s.panel.writes, 0, 16 * k, 2 * block + 2);
      }
    }
  }
  __syncthreads();

  int const row = lane / 4, t = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2& pair = s.pairs[first + row + i / 2 * 8][8 * n + t + i % 2];
      if (part == 0) {
        pair.x = p.scale * scores[n][i];
      } else {
        pair.y = -scores[n][i];
      }
    }
  }
  bool const later_half = block >= kBlocks / 2, later_block = block % 2 == 1;
  {
    BlockRows<T> rows;
    rows.load(p, chunk, head, first, c, whole);
    *reinterpret_cast<float2*>(&s.totals[block][c]) = rows.total();
    __syncthreads();
    auto const total_of = [&](int from, int to) {
      float2 sum = {0.f, 0.f};
      for (int b = from; b < to; ++b) sum = sum + *reinterpret_cast<float2 const*>(&s.totals[b][c]);
      return exp2_fast(sum);
    };
    float2 const in_half = later_half ? total_of(kBlocks / 2, block) : total_of(block + 1, kBlocks / 2);
    *reinterpret_cast<float2*>(&s.before[block][c]) = total_of(0, block);
    *reinterpret_cast<float2*>(&s.behind[block][c]) = total_of(block + 1, kBlocks);
    *reinterpret_cast<float2*>(&s.in_half[block][c]) = in_half;
    if (block == 0) {
      float2& x = *reinterpret_cast<float2*>(&s.through[c]);
      x = x * total_of(0, kBlocks);
    }
    auto const store = [&](SplitOperand(&to)[2], int border, int i, float2 x) {
      int const here = border == 0 ? block / 2 * kBlock : first % kHalf;
      int const at = element_at<kGradientKeys>(here + i, c);
      Split const parts = split(x.x, x.y);
      store_pair(to[border][0], at, parts.high);
      store_pair(to[border][1], at, parts.low);
    };
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      sum = sum + rows.g[i];
      float2 const decay = exp2_fast(sum);
      float2 const q = s.norms.q[first + i] * (decay * unpack<T>(rows.q[i]));
      float2 const k = s.norms.k[first + i] * (decay * unpack<T>(rows.k[i]));
      if (later_block) {
        store(s.operands.q_rows, 0, i, q);
        store(s.operands.k_rows, 0, i, k);
      }
      if (later_half) {
        store(s.operands.q_rows, 1, i, in_half * q);
        store(s.operands.k_rows, 1, i, in_half * k);
      }
    }
    sum = {0.f, 0.f};
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      float2 const k = s.norms.k[first + i] * (exp2_fast(sum) * unpack<T>(rows.k[i]));
      sum = sum + rows.g[i];
      if (!later_block) store(s.operands.columns, 0, i, k);
      if (!later_half) store(s.operands.columns, 1, i, in_half * k);
    }
  }
  __syncthreads();

  // Across the borders. The factor e^{decays from the start of the block} of rows comes below, and that of
  // columns.
  float const *const before = s.before[block] + 64 * part, *const in_half = s.in_half[block] + 64 * part;
  int const there = block / 2 * kBlock;
  auto const add_from_columns = [&](auto of_p, float (&sums)[8][4], float factor) {
    constexpr bool kOfP = decltype(of_p)::value;
    float x[8][4];
    uint32_t a[4];
    clear(x);
    if (later_half) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        load_pairs<kOfP>(a, s.pairs, first, 16 * step);
        add_rows(x, a, s.operands.columns[1], 16 * step, part);
      }
      scale_channels(x, in_half);
    }
    if (later_block) {
      load_pairs<kOfP>(a, s.pairs, first, first - kBlock);
      add_rows(x, a, s.operands.columns[0], there, part);
    }
    scale_channels(sums, before, factor);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] += x[n][i];
    }
  };
  add_from_columns(std::true_type{}, by_p, p.scale);
  add_from_columns(std::false_type{}, by_a, -1.f);
  scale_channels(after, s.behind[block] + 64 * part);
  float from[8][4];
  clear(from);
  auto const add_from_rows = [&](int border, int row, int source) {
    uint32_t a[4];
    load_transposed_pairs<true>(a, s.pairs, row, first);
    add_rows(from, a, s.operands.q_rows[border], source, part);
    load_transposed_pairs<false>(a, s.pairs, row, first);
    add_rows(from, a, s.operands.k_rows[border], source, part);
  };
  if (!later_half) {
#pragma unroll
    for (int step = 0; step < 2; ++step) add_from_rows(1, kHalf + 16 * step, 16 * step);
    scale_channels(from, in_half);
  }
  if (!later_block) add_from_rows(0, first + kBlock, there);
  __syncthreads();
  GradientSums& sums = s.sums[warp];
  store_sums(sums.by_p, by_p);
  store_sums(sums.by_a, by_a);
  store_sums(sums.after, after);
  store_sums(sums.from, from);
  __syncwarp();

  // Within the block: a lane has two channels again. What stays of the sums is what dg is made of.
  float2 q[kBlock], k[kBlock], a[kBlock], x_total = {0.f, 0.f}, carried_total = {0.f, 0.f};
  {
    BlockRows<T> rows;
    rows.load(p, chunk, head, first, c, whole);
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {
      float2 const decay = exp2_fast(sum);
      sums.after[i][lane] = decay * sums.after[i][lane];
      sums.from[i][lane] = decay * sums.from[i][lane];
      sum = sum + rows.g[i];
    }
    sum = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      sum = sum + rows.g[i];
      float2 const decay = exp2_fast(sum);
      sums.by_p[i][lane] = decay * sums.by_p[i][lane];
      sums.by_a[i][lane] = decay * sums.by_a[i][lane];
      a[i] = exp2_fast(rows.g[i]);
      q[i] = s.norms.q[first + i] * unpack<T>(rows.q[i]);
      k[i] = s.norms.k[first + i] * unpack<T>(rows.k[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    __syncwarp();  // keeps the loads of later tokens behind: there are no registers for them
    float2 of_p = {0.f, 0.f}, of_a = {0.f, 0.f}, column = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < i; ++j) {
      float2 const pair = s.pairs[first + i][first + j];
      of_p = a[j + 1] * (of_p + pair.x * k[j]);
      of_a = a[j + 1] * (of_a + pair.y * k[j]);
    }
#pragma unroll
    for (int m = kBlock - 1; m > i; --m) {
      float2 const pair = s.pairs[first + m][first + i];
      column = a[m] * (column + pair.x * q[m] + pair.y * k[m]);
    }
    float const self = s.pairs[first + i][first + i].x;
    float2 const dq = sums.by_p[i][lane] + of_p, dk = sums.by_a[i][lane] + of_a, rest = sums.after[i][lane];
    column = column + sums.from[i][lane];
    float2 const x = q[i] * dq + k[i] * (dk + -1.f * column), carried = k[i] * rest;
    sums.by_p[i][lane] = x;
    sums.after[i][lane] = carried;
    x_total = x_total + x;
    carried_total = carried_total + carried;
    if (first + i < tokens && c < K) {
      int64_t const at = first_row * K + (first + i) * key_stride + c;
      *reinterpret_cast<float2*>(w.dq + at) = dq + self * k[i];
      *reinterpret_cast<float2*>(w.dk + at) = dk + rest + column + self * q[i];
    }
  }
  // All factors have been used: their place takes what blocks add to each other's dg.
  *reinterpret_cast<float2*>(&s.before[block][c]) = x_total;
  *reinterpret_cast<float2*>(&s.behind[block][c]) = carried_total;
  __syncthreads();
  if (c >= K) return;
  float2 later = *reinterpret_cast<float2 const*>(&s.through[c]), earlier = {0.f, 0.f};
  for (int b = block + 1; b < kBlocks; ++b) later = later + *reinterpret_cast<float2 const*>(&s.before[b][c]);
  for (int b = 0; b < block; ++b) earlier = earlier + *reinterpret_cast<float2 const*>(&s.behind[b][c]);
#pragma unroll
  for (int i = kBlock - 1; i >= 0; --i) {
    later = later + sums.by_p[i][lane];
    sums.by_p[i][lane] = later;
  }
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    if (first + i >= tokens) break;
    int64_t const token = chunk.begin + first + i;
    float2 const dg = sums.by_p[i][lane] + earlier;
    auto const kept = [&](int channel, float x) {
      return log_decay(p, chunk.row, token, head, channel) <= kNoDecay ? 0.f : x;
    };
    *reinterpret_cast<float2*>(token_row<float>(p.dg, chunk.row, token, head) + c) = {kept(c, dg.x),
                                                                                      kept(c + 1, dg.y)};
    earlier = earlier + sums.after[i][lane];
  }
}

}  // namespace lt2::kda::portable
