// The gradients of linear attention with a scalar decay: all chunks in parallel, once the states at their
// edges are there. With S before and dS after a chunk, G and E as in the forward pass, and C = scale E o dO
// V^T:
//   dQ = scale e^G o (dO S^T) + C diag(beta) K
//   dK = beta o (e^(G_last - G) o (V dS^T) + C^T Q)
//   dV = beta o (e^(G_last - G) o (K dS) + (scale E o Q K^T)^T dO),   dbeta = v . dv / beta
// dL/dg_m is what of the loss passes token m: from the chunk's start to tokens i >= m (F_i, of dQ's first
// term), from tokens j < m to its end (T_j, of dK's), from j < m to i >= m (X_ij = beta_j C_ij q_i . k_j),
// and from start to end. Each term carries the decay of token m itself, so nothing cancels at strong gates,
// and at -inf every one is exactly 0.
#pragma once

#include "gdn/cuda/portable/simple_tile.cuh"

namespace lt2::gdn::portable {

template <class T, int kKeys, int kTiles>
struct GradientsShared {
  static constexpr int kValues = kSimpleWarps * 16 * kTiles;
  SimpleTile<T, kChunk, kKeys> q, k;
  SimpleTile<T, kChunk, kValues> v, dout;
  SimpleTile<T, kValues, kKeys> edge;  // S, then dS; transposed
  float log2_sum[kChunk], beta[kChunk];
  float from_start[kChunk], to_end[kChunk];  // F, T
  float crossing[kSimpleWarps][kChunk];      // sums of X over j < m and the warp's i >= m
  float through[kSimpleWarps];
  RawGates gates;
};

// What a chunk's block is given besides the operator's arguments.
struct GradientsWorkspace {
  void const *edges, *dedges;  // [chunk numbers, HV, kValues, kKeys] in T
  float *dq, *dk;              // [B, T, HV, K] where value heads share a query/key head, else null
};

// Loops over what products sum over are not unrolled: a block runs through the code once, and fetching it
// would take longer than its instructions.

// x += a b^T for the warp's 16 tokens against tokens 8 n .., n from `first` to before `last`.
template <class T, int kColumns>
__device__ __forceinline__ void multiply_tokens(float (&x)[kChunk / 8][4],
                                                SimpleTile<T, kChunk, kColumns> const& a,
                                                SimpleTile<T, kChunk, kColumns> const& b, int first, int last,
                                                int warp, int lane) {
#pragma unroll 1
  for (int c = 0; c < kColumns / 16; ++c) {
    uint32_t rows[4];
    a.first(rows, warp, c, lane);
#pragma unroll
    for (int n = 0; n < kChunk / 8; n += 2) {
      if (n < first || n >= last) continue;
      uint32_t f[4];
      b.second_transposed(f, n, c, lane);
      mma<T>(x[n], rows, f[0], f[1]);
      mma<T>(x[n + 1], rows, f[2], f[3]);
    }
  }
}

// x += a s for the warp's 16 tokens, or a s^T.
template <bool kTransposed, class T, int kFrom, int kTo, int kRows, int kColumns>
__device__ __forceinline__ void multiply_state(float (&x)[kTo / 8][4], SimpleTile<T, kChunk, kFrom> const& a,
                                               SimpleTile<T, kRows, kColumns> const& s, int warp, int lane) {
#pragma unroll 1
  for (int k = 0; k < kFrom / 16; ++k) {
    uint32_t rows[4];
    a.first(rows, warp, k, lane);
#pragma unroll
    for (int n = 0; n < kTo / 8; n += 2) {
      uint32_t b[4];
      if constexpr (kTransposed) {
        s.second_transposed(b, n, k, lane);
      } else {
        s.second(b, n, k, lane);
      }
      mma<T>(x[n], rows, b[0], b[1]);
      mma<T>(x[n + 1], rows, b[2], b[3]);
    }
  }
}

// x += p b over tokens 16 k .., k from `first` to before `last`, with p as fragments.
template <class T, int kColumns>
__device__ __forceinline__ void add_tokens(float (&x)[kColumns / 8][4], uint32_t const (&p)[kChunk / 16][4],
                                           SimpleTile<T, kChunk, kColumns> const& b, int first, int last,
                                           int lane) {
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    if (k < first || k >= last) continue;
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t f[4];
      b.second(f, n, k, lane);
      mma<T>(x[n], p[k], f[0], f[1]);
      mma<T>(x[n + 1], p[k], f[2], f[3]);
    }
  }
}

// Row sums of x o y over the warp's rows lane / 4 and lane / 4 + 8.
template <class T, int kColumns>
__device__ __forceinline__ float2 dot_rows(float const (&x)[kColumns / 8][4],
                                           SimpleTile<T, kChunk, kColumns> const& y, int warp, int lane) {
  float2 sum{0.f, 0.f};
#pragma unroll
  for (int n = 0; n < kColumns / 8; n += 2) {
    uint32_t rows[4];
    y.first(rows, warp, n / 2, lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float2 const upper = unpack<T>(rows[2 * e]), lower = unpack<T>(rows[2 * e + 1]);
      sum.x += x[n + e][0] * upper.x + x[n + e][1] * upper.y;
      sum.y += x[n + e][2] * lower.x + x[n + e][3] * lower.y;
    }
  }
  return {lane_sum<4>(sum.x), lane_sum<4>(sum.y)};
}

template <int kTiles>
__device__ __forceinline__ void scale_rows(float (&x)[kTiles][4], float upper, float lower) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] *= i < 2 ? upper : lower;
  }
}

// Stores the warp's rows i < count. The four lanes of a row trade their pairs, so that each has pieces of 16
// bytes.
template <class T, int kColumns>
__device__ __forceinline__ void store_rows(float const (&x)[kColumns / 8][4], T* rows, int64_t stride,
                                           int width, int first_row, int count, int lane) {
  int const t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const i = first_row + 8 * half + lane / 4;
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 4) {
      uint32_t r[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) r[e] = pack<T>(x[n + e][2 * half], x[n + e][2 * half + 1]);
      // r[e] of lane t becomes r[t] of lane e, as a transpose in blocks of 2, then of 1.
#pragma unroll
      for (int d = 2; d > 0; d /= 2) {
        bool const upper = t & d;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (e & d) continue;
          uint32_t const given = __shfl_xor_sync(0xffffffffu, upper ? r[e] : r[e + d], d);
          r[e] = upper ? given : r[e];
          r[e + d] = upper ? r[e + d] : given;
        }
      }
      int const column = 8 * (n + t);
      if (i < count && column < width) {
        *reinterpret_cast<uint4*>(rows + i * stride + column) = uint4{r[0], r[1], r[2], r[3]};
      }
    }
  }
}

// The same in fp32.
template <int kColumns>
__device__ __forceinline__ void store_rows(float const (&x)[kColumns / 8][4], float* rows, int64_t stride,
                                           int width, int first_row, int count, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const i = first_row + 8 * half + lane / 4;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      int const column = 8 * n + 2 * (lane % 4);
      if (i < count && column < width) {
        *reinterpret_cast<float2*>(rows + i * stride + column) = {x[n][2 * half], x[n][2 * half + 1]};
      }
    }
  }
}

// Sums over j < m and the warp's rows i >= m of x, zero on and above the diagonal, for every token m.
__device__ __forceinline__ void sum_crossing(float const (&x)[kChunk / 8][4], float* sums, int warp,
                                             int lane) {
  int const t = lane % 4;
  float before[2] = {};
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    int const m = 8 * n + 2 * t;
    float sum[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const i = 16 * warp + 8 * half + lane / 4;
      float const* const pair = &x[n][2 * half];
      float through = pair[0] + pair[1];
#pragma unroll
      for (int d = 1; d < 4; d *= 2) {
        float const left = __shfl_up_sync(0xffffffffu, through, d, 4);
        if (t >= d) through += left;
      }
      float const left = __shfl_up_sync(0xffffffffu, through, 1, 4);
      float const until = before[half] + (t > 0 ? left : 0.f);
      before[half] += __shfl_sync(0xffffffffu, through, 3, 4);
      if (i >= m) sum[0] += until;
      if (i >= m + 1) sum[1] += until + pair[0];
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int d = 4; d < kWarp; d *= 2) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], d);
      if (lane < 4) sums[m + e] = sum[e];
    }
  }
}

// A thread's part of <a, b>. A state that the operator was given (data not null) is taken as it is, in fp32:
// where sequences are short, little else makes a gate's gradient.
template <class T, int kValues, int kKeys>
__device__ float dot_states(Inputs const& p, T const* a, State const& a_given, T const* b,
                            State const& b_given) {
  auto const load = [&](float (&x)[8], T const* edge, State const& state, int e) {
    if (state.data == nullptr) {
      uint4 const piece = *reinterpret_cast<uint4 const*>(edge + e);
      uint32_t const pairs[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 const pair = unpack<T>(pairs[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
      }
      return;
    }
    int const value = e / kKeys, key = e % kKeys;
    bool const present = value < p.value_dim && key < p.key_dim;
    float const* const from = state.data + value * state.value_stride + key * state.key_stride;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = present ? from[i * state.key_stride] : 0.f;
  };
  float sum = 0.f;
  auto const add = [&](int e) {
    float x[8], y[8];
    load(x, a, a_given, e);
    load(y, b, b_given, e);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
  };
  constexpr int kStep = kSimpleThreads * 8;
  if (a_given.data == nullptr && b_given.data == nullptr) {
#pragma unroll 4
    for (int e = threadIdx.x * 8; e < kValues * kKeys; e += kStep) add(e);
  } else {
#pragma unroll 1
    for (int e = threadIdx.x * 8; e < kValues * kKeys; e += kStep) add(e);
  }
  return sum;
}

// Block (chunk, value head).
template <class T, int kKeys, int kTiles>
__global__ void __launch_bounds__(kSimpleThreads, 2)
    simple_gradients(__grid_constant__ BackwardParams const p, __grid_constant__ GradientsWorkspace const w,
                     bool whole_rows) {
  using Shared = GradientsShared<T, kKeys, kTiles>;
  constexpr int kValues = Shared::kValues, kEdge = kValues * kKeys;
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  int const warp = threadIdx.x / kWarp;
  int lane = threadIdx.x % kWarp;
  auto const forget_addresses = [&] {  // which are cheaper to compute again than to keep in registers
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    lane = thread % kWarp;
  };
  int const head = static_cast<int>(blockIdx.x % p.value_heads), key_head = head / (p.value_heads / p.heads);
  Segment const chunk = find_segment(p, kChunk, blockIdx.x / p.value_heads);
  if (chunk.length == 0) return;
  int const tokens = static_cast<int>(chunk.length);
  T const* const edge = static_cast<T const*>(w.edges) + int64_t{blockIdx.x} * kEdge;
  T const* const dedge = static_cast<T const*>(w.dedges) + int64_t{blockIdx.x} * kEdge;

  if (warp == 0) s.gates.copy(p, chunk.row, chunk.begin, tokens, head);
  s.q.copy(token_row<T const>(p.q, chunk.row, chunk.begin, key_head), p.q.token, tokens, p.key_dim,
           whole_rows);
  s.k.copy(token_row<T const>(p.k, chunk.row, chunk.begin, key_head), p.k.token, tokens, p.key_dim,
           whole_rows);
  s.v.copy(token_row<T const>(p.v, chunk.row, chunk.begin, head), p.v.token, tokens, p.value_dim, whole_rows);
  s.dout.copy(token_row<T const>(p.dout, chunk.row, chunk.begin, head), p.dout.token, tokens, p.value_dim,
              whole_rows);
  commit_copies();
  s.edge.copy(edge, kKeys, kValues, kKeys, true);
  commit_copies();
  if (p.dg.data != nullptr) {
    auto const given = [&](float const* states, bool at_border) {
      int64_t const index = chunk.n * p.value_heads + head;
      return dense_state(at_border ? const_cast<float*>(states) : nullptr,
                         at_border && states != nullptr ? index : 0, p.key_dim, p.value_dim, p.state_v_first);
    };
    float const through = dot_states<T, kValues, kKeys>(p, edge, given(p.initial_state, chunk.offset == 0),
                                                        dedge, given(p.dfinal_state, chunk.last));
    float const sum = lane_sum(through);
    if (lane == 0) s.through[warp] = sum;
  }
  wait_groups<1>();
  if (warp == 0) {
    ChunkDecays const d(p, s.gates, tokens, head, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      s.log2_sum[lane + h * kWarp] = d.log2_sum[h];
      s.beta[lane + h * kWarp] = d.beta[h];
    }
  }
  __syncthreads();

  // Rows of this lane, in fragments.
  int const upper = 16 * warp + lane / 4, lower = upper + 8, t = 2 * (lane % 4);
  float const upper_sum = s.log2_sum[upper], lower_sum = s.log2_sum[lower], last_sum = s.log2_sum[kChunk - 1];
  auto const per_head = [&](float* data) {
    return data + ((chunk.row * p.tokens + chunk.begin) * p.value_heads + head) * p.key_dim;
  };
  auto const store_keys = [&](float const(&x)[kKeys / 8][4], Strided const& out, float* heads) {
    if (heads == nullptr) {
      store_rows<T, kKeys>(x, token_row<T>(out, chunk.row, chunk.begin, head), out.token, p.key_dim,
                           16 * warp, tokens, lane);
    } else {
      store_rows<kKeys>(x, per_head(heads), int64_t{p.value_heads} * p.key_dim, p.key_dim, 16 * warp, tokens,
                        lane);
    }
  };

  {
    uint32_t c[kChunk / 16][4];
    {
      float x[kChunk / 8][4] = {}, qk[kChunk / 8][4] = {};
      multiply_tokens(x, s.dout, s.v, 0, 2 * warp + 2, warp, lane);
      if (p.dg.data != nullptr) multiply_tokens(qk, s.q, s.k, 0, 2 * warp + 2, warp, lane);
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
        float2 const sum = *reinterpret_cast<float2 const*>(s.log2_sum + 8 * n + t);
        float2 const beta = *reinterpret_cast<float2 const*>(s.beta + 8 * n + t);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int const row = i < 2 ? upper : lower, j = 8 * n + t + i % 2;
          float const decay = exp2_fast((i < 2 ? upper_sum : lower_sum) - (i % 2 == 0 ? sum.x : sum.y));
          x[n][i] = j <= row ? p.scale * (i % 2 == 0 ? beta.x : beta.y) * decay * x[n][i] : 0.f;
          qk[n][i] = j < row ? x[n][i] * qk[n][i] : 0.f;
        }
        c[n / 2][n % 2 * 2] = pack<T>(x[n][0], x[n][1]);
        c[n / 2][n % 2 * 2 + 1] = pack<T>(x[n][2], x[n][3]);
      }
      if (p.dg.data != nullptr) sum_crossing(qk, s.crossing[warp], warp, lane);
    }
    wait_groups<0>();
    __syncthreads();  // S is here
    forget_addresses();
    float dq[kKeys / 8][4] = {};
    multiply_state<false, T, kValues, kKeys>(dq, s.dout, s.edge, warp, lane);
    __syncthreads();  // nobody needs it any more
    s.edge.copy(dedge, kKeys, kValues, kKeys, true);
    commit_copies();
    forget_addresses();
    scale_rows(dq, p.scale * exp2_fast(upper_sum), p.scale * exp2_fast(lower_sum));
    if (p.dg.data != nullptr) {
      float2 const sums = dot_rows<T, kKeys>(dq, s.q, warp, lane);
      if (lane % 4 == 0) s.from_start[upper] = sums.x, s.from_start[lower] = sums.y;
    }
    add_tokens(dq, c, s.k, 0, warp + 1, lane);
    store_keys(dq, p.dq, w.dq);
  }

  forget_addresses();
  uint32_t products[kChunk / 16][4];  // of this chunk's tokens, transposed: those of dV, then of dK
  auto const with_decays = [&](float const(&x)[kChunk / 8][4], uint32_t (&packed)[kChunk / 16][4]) {
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      float2 const sum = *reinterpret_cast<float2 const*>(s.log2_sum + 8 * n + t);
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const row = i < 2 ? upper : lower, column = 8 * n + t + i % 2;
        float const decay = exp2_fast((i % 2 == 0 ? sum.x : sum.y) - (i < 2 ? upper_sum : lower_sum));
        y[i] = column >= row ? p.scale * decay * x[n][i] : 0.f;
      }
      packed[n / 2][n % 2 * 2] = pack<T>(y[0], y[1]);
      packed[n / 2][n % 2 * 2 + 1] = pack<T>(y[2], y[3]);
    }
  };
  {
    float x[kChunk / 8][4] = {};
    multiply_tokens(x, s.k, s.q, 2 * warp, kChunk / 8, warp, lane);
    with_decays(x, products);
  }
  wait_groups<0>();
  __syncthreads();  // dS is here
  float const upper_out = exp2_fast(last_sum - upper_sum), lower_out = exp2_fast(last_sum - lower_sum);
  float const upper_beta = s.beta[upper], lower_beta = s.beta[lower];
  {
    float dv[kValues / 8][4] = {};
    multiply_state<true, T, kKeys, kValues>(dv, s.k, s.edge, warp, lane);
    scale_rows(dv, upper_out, lower_out);
    if (p.dg.data != nullptr) {
      float2 const sums = dot_rows<T, kValues>(dv, s.v, warp, lane);
      if (lane % 4 == 0) s.to_end[upper] = upper_beta * sums.x, s.to_end[lower] = lower_beta * sums.y;
    }
    add_tokens(dv, products, s.dout, warp, kChunk / 16, lane);
    if (p.dbeta.data != nullptr) {
      float2 const sums = dot_rows<T, kValues>(dv, s.v, warp, lane);
      if (lane % 4 < 2) {
        int const i = lane % 4 == 0 ? upper : lower;
        if (i < tokens) {
          *token_row<float>(p.dbeta, chunk.row, chunk.begin + i, head) =
              (lane % 4 == 0 ? sums.x : sums.y) * strength_derivative(p, s.gates.beta[i]);
        }
      }
    }
    scale_rows(dv, upper_beta, lower_beta);
    store_rows<T, kValues>(dv, token_row<T>(p.dv, chunk.row, chunk.begin, head), p.dv.token, p.value_dim,
                           16 * warp, tokens, lane);
  }
  {
    {
      float x[kChunk / 8][4] = {};
      multiply_tokens(x, s.v, s.dout, 2 * warp, kChunk / 8, warp, lane);
      with_decays(x, products);
    }
    float dk[kKeys / 8][4] = {};
    multiply_state<false, T, kValues, kKeys>(dk, s.v, s.edge, warp, lane);
    scale_rows(dk, upper_out, lower_out);
    add_tokens(dk, products, s.q, warp, kChunk / 16, lane);
    scale_rows(dk, upper_beta, lower_beta);
    store_keys(dk, p.dk, w.dk);
  }

  if (p.dg.data == nullptr) return;
  __syncthreads();
  if (warp > 0) return;
  float through = 0.f;
#pragma unroll
  for (int i = 0; i < kSimpleWarps; ++i) through += s.through[i];
  through *= exp2_fast(last_sum);
  float before[2], after[2];  // sums of T over j < m, and of F over i >= m
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int const m = lane + h * kWarp;
    before[h] = m > 0 ? s.to_end[m - 1] : 0.f;
    after[h] = s.from_start[kChunk - 1 - m];
  }
  prefix_sums(before, lane);
  prefix_sums(after, lane);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int const m = lane + h * kWarp;
    float dg = through + before[h] + __shfl_xor_sync(0xffffffffu, after[1 - h], kWarp - 1);
#pragma unroll
    for (int i = 0; i < kSimpleWarps; ++i) dg += s.crossing[i][m];
    if (m < tokens) *token_row<float>(p.dg, chunk.row, chunk.begin + m, head) = dg;
  }
}

}  // namespace lt2::gdn::portable
