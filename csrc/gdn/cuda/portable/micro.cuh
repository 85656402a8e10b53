// Products of a chunk in fp32 by a block, and the ends of a backward pass: norms, dbeta, dq and dk.
#pragma once

#include "gdn/cuda/portable/problem.cuh"

namespace lt2::gdn::portable {

inline constexpr int kGradientThreads = 256;
inline constexpr int kMicro = 4;  // a thread owns kMicro x kMicro elements of a [chunk, 64] product
inline constexpr int kSide = kChunk / kMicro;  // threads along each axis of it
inline constexpr int kDepth = 32;              // of the operands in shared memory at a time
inline constexpr int kPitch = kChunk + 4;      // of rows that are read as float4
static_assert(kSide * kSide == kGradientThreads && kSide < kWarp && kWarp % kSide == 0);

struct Operands {
  alignas(16) float a[kDepth][kPitch];
  alignas(16) float b[kDepth][kPitch];
};

// A thread's part of a [64, 64] product: rows 4 ty + i, columns 4 tx + j.
struct Micro {
  float x[kMicro][kMicro];

  __device__ static int row(int i) { return threadIdx.x / kSide * kMicro + i; }
  __device__ static int column(int j) { return threadIdx.x % kSide * kMicro + j; }
};

template <class F>
__device__ void each(F const& f) {
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
#pragma unroll
    for (int j = 0; j < kMicro; ++j) f(i, j);
  }
}

// Which index of an operand adjacent threads step through when they load it.
enum class Along { kRow, kDepth };

template <Along kAlong, class F>
__device__ void load_operand(float (&tile)[kDepth][kPitch], int depth, int first, F const& element) {
#pragma unroll 4
  for (int e = 0; e < kDepth * kChunk / kGradientThreads; ++e) {
    int const n = e * kGradientThreads + threadIdx.x;
    int const d = kAlong == Along::kDepth ? n % kDepth : n / kChunk;
    int const i = kAlong == Along::kDepth ? n / kDepth : n % kChunk;
    tile[d][i] = first + d < depth ? element(i, first + d) : 0.f;
  }
}

// c(i, j) += sum over d < depth of a(i, d) b(j, d).
template <Along kAlongA, Along kAlongB, class A, class B>
__device__ void multiply(Operands& shared, Micro& c, int depth, A const& a, B const& b) {
  for (int first = 0; first < depth; first += kDepth) {
    __syncthreads();
    load_operand<kAlongA>(shared.a, depth, first, a);
    load_operand<kAlongB>(shared.b, depth, first, b);
    __syncthreads();
#pragma unroll 4
    for (int d = 0; d < kDepth; ++d) {
      float4 const x = *reinterpret_cast<float4 const*>(&shared.a[d][Micro::row(0)]);
      float4 const y = *reinterpret_cast<float4 const*>(&shared.b[d][Micro::column(0)]);
      float const xs[] = {x.x, x.y, x.z, x.w}, ys[] = {y.x, y.y, y.z, y.w};
      each([&](int i, int j) { c.x[i][j] += xs[i] * ys[j]; });
    }
  }
}

// Reciprocal norms of the rows of q and k of a chunk, or ones.
struct Norms {
  float q[kChunk], k[kChunk];
};

// The norms of a chunk, and dbeta = r . du. All threads of the block; a barrier must follow.
template <class T>
__device__ void norms_and_dbeta(BackwardParams const& p, Chunk const& chunk, int head,
                                float const* residual_rows, float const* dwrite_rows, Norms& norms) {
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tokens = chunk.tokens;
  int const K = p.key_dim, V = p.value_dim, key_head = head / (p.value_heads / p.heads);
  T const* const q_rows = token_row<T const>(p.q, chunk.row, chunk.begin, key_head);
  T const* const k_rows = token_row<T const>(p.k, chunk.row, chunk.begin, key_head);
  int64_t const value_stride = static_cast<int64_t>(p.value_heads) * V;
  for (int i = warp; i < kChunk; i += kGradientThreads / kWarp) {
    float qq = 0.f, kk = 0.f, dbeta = 0.f;
    if (i < tokens) {
      for (int c = lane; p.qk_l2norm && c < K; c += kWarp) {
        float const x = to_float(q_rows[i * p.q.token + c]), y = to_float(k_rows[i * p.k.token + c]);
        qq += x * x;
        kk += y * y;
      }
      for (int c = lane; c < V; c += kWarp) {
        dbeta += residual_rows[i * value_stride + c] * dwrite_rows[i * value_stride + c];
      }
    }
    qq = lane_sum(qq);
    kk = lane_sum(kk);
    dbeta = lane_sum(dbeta);
    if (lane == 0) {
      norms.q[i] = p.qk_l2norm ? rsqrtf(qq + kNormEpsilon) : 1.f;
      norms.k[i] = p.qk_l2norm ? rsqrtf(kk + kNormEpsilon) : 1.f;
      if (p.dbeta.data != nullptr && i < tokens) {
        if (p.beta_sigmoid) {
          float const s = sigmoid(*token_row<float const>(p.beta, chunk.row, chunk.begin + i, head));
          dbeta *= s * (1.f - s) * (p.neg_eigval ? 2.f : 1.f);
        }
        *token_row<float>(p.dbeta, chunk.row, chunk.begin + i, head) = dbeta;
      }
    }
  }
}

// dL/dx of x_hat = x rsqrt(sum x^2 + eps), a warp per row; `gradient` is dL/dx_hat.
template <class T>
__device__ void store_gradient(T const* x, T* dx, float (&gradient)[kMaxKeyDim / kWarp], int n,
                               bool normalised) {
  int const lane = threadIdx.x % kWarp;
  float xs[kMaxKeyDim / kWarp], norm = 0.f, along = 0.f;
  if (normalised) {
#pragma unroll
    for (int e = 0; e < kMaxKeyDim / kWarp; ++e) {
      int const c = e * kWarp + lane;
      xs[e] = c < n ? to_float(x[c]) : 0.f;
      norm += xs[e] * xs[e];
      along += xs[e] * gradient[e];
    }
    norm = rsqrtf(lane_sum(norm) + kNormEpsilon);
    along = lane_sum(along) * norm * norm;
#pragma unroll
    for (int e = 0; e < kMaxKeyDim / kWarp; ++e) gradient[e] = norm * (gradient[e] - along * xs[e]);
  }
#pragma unroll
  for (int e = 0; e < kMaxKeyDim / kWarp; ++e) {
    int const c = e * kWarp + lane;
    if (c < n) dx[c] = from_float<T>(gradient[e]);
  }
}

// dq and dk: sum over the value heads of a query/key head, then through the norm. Block -> (chunk, head).
template <class T>
__global__ void __launch_bounds__(kGradientThreads, 4)
    gather_heads(__grid_constant__ BackwardParams const p, __grid_constant__ Workspace const w) {
  int const head = static_cast<int>(blockIdx.x % p.heads), group = p.value_heads / p.heads;
  Chunk const chunk = find_chunk(p, blockIdx.x / p.heads);
  int const lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < chunk.tokens; i += kGradientThreads / kWarp) {
    int64_t const token = chunk.begin + i;
    int64_t const first =
        ((chunk.row * p.tokens + token) * p.value_heads + static_cast<int64_t>(head) * group) * p.key_dim;
    float dq[kMaxKeyDim / kWarp] = {}, dk[kMaxKeyDim / kWarp] = {};
    for (int h = 0; h < group; ++h) {
#pragma unroll
      for (int e = 0; e < kMaxKeyDim / kWarp; ++e) {
        int const c = e * kWarp + lane;
        if (c >= p.key_dim) continue;
        dq[e] += w.dq[first + h * p.key_dim + c];
        dk[e] += w.dk[first + h * p.key_dim + c];
      }
    }
    store_gradient(token_row<T const>(p.q, chunk.row, token, head),
                   token_row<T>(p.dq, chunk.row, token, head), dq, p.key_dim, p.qk_l2norm);
    store_gradient(token_row<T const>(p.k, chunk.row, token, head),
                   token_row<T>(p.dk, chunk.row, token, head), dk, p.key_dim, p.qk_l2norm);
  }
}

}  // namespace lt2::gdn::portable
