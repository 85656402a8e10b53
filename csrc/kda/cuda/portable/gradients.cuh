// What is left of the backward pass once both scans are done: everything of a chunk at once, all chunks in
// parallel.
#pragma once

#include "gdn/cuda/portable/micro.cuh"
#include "kda/cuda/portable/problem.cuh"

namespace lt2::kda::portable {

inline constexpr int kGroup = kChunk;  // channels at a time
inline constexpr int kParts = kGradientThreads / kGroup;
inline constexpr int kGateThreads = 1024;

struct GradientShared : Operands {
  float pairs[kChunk][kChunk + 1];  // dP on and below the diagonal; dA_ij at [j][i] above it
  float q[kChunk][kGroup], k[kChunk][kGroup], decay[kChunk][kGroup];
  float beta[kChunk];
  Norms norms;
  float through[kGroup], last[kGroup];  // <S, dS> and e^{sum of g} by channel
};
static_assert(sizeof(Operands) >= sizeof(float) * kChunk * kGroup);  // the log decays, between two products

// Gradients of the normalised q and k (per value head, into the workspace), of the log decays and of beta.
//
// With r, du from the scans, u = beta r, dy = beta du, S before and dS after the chunk, D_ij the decays of
// the tokens after j up to and with i, head_i those from the start, tail_i those after i (vectors over
// channels):
//   dP = lower(dO U^T)                    dA = -strict_lower(dY U^T), without delta 0
//   dQ = scale (head o (dO S^T) + sum_j dP_ij D_ij k_j)
//   dK = -head o (dY S^T) + tail o (U dS^T) + sum_j dA_ij D_ij k_j + sum_i D_ij (scale dP_ij q_i + dA_ij k_i)
// dg of a token is what of the loss passes it, as in gdn's kernel but by channel. The sums over a chunk go by
// Horner's rule, one thread per channel and row: no decay is divided by, and e^g = 0 gives exact zeros.
template <class T>
__global__ void __launch_bounds__(kGradientThreads, 1)
    chunk_gradients(__grid_constant__ BackwardParams const p, __grid_constant__ Workspace const w) {
  extern __shared__ __align__(16) char shared_bytes[];
  GradientShared& shared = *reinterpret_cast<GradientShared*>(shared_bytes);
  int const head = static_cast<int>(blockIdx.x % p.value_heads), key_head = head / (p.value_heads / p.heads);
  int64_t const number = blockIdx.x / p.value_heads;
  Chunk const chunk = find_chunk(p, number);
  if (chunk.tokens == 0) return;

  int const K = p.key_dim, V = p.value_dim, tokens = chunk.tokens, thread = threadIdx.x;
  T const* const q_rows = token_row<T const>(p.q, chunk.row, chunk.begin, key_head);
  T const* const k_rows = token_row<T const>(p.k, chunk.row, chunk.begin, key_head);
  T const* const dout_rows = token_row<T const>(p.dout, chunk.row, chunk.begin, head);
  int64_t const first_row = (chunk.row * p.tokens + chunk.begin) * p.value_heads + head;
  float const* const residual_rows = w.residuals + first_row * V;
  float const* const dwrite_rows = w.dwrites + first_row * V;
  int64_t const value_stride = static_cast<int64_t>(p.value_heads) * V;
  int64_t const key_stride = static_cast<int64_t>(p.value_heads) * K;
  int64_t const state_size = static_cast<int64_t>(K) * V;
  float const* const state = w.states + (number * p.value_heads + head) * state_size;
  float const* const dstate = w.dstates + (number * p.value_heads + head) * state_size;

  if (thread < kChunk) {
    shared.beta[thread] = thread < tokens ? write_strength(p, chunk.row, chunk.begin + thread, head) : 0.f;
  }
  norms_and_dbeta<T>(p, chunk, head, residual_rows, dwrite_rows, shared.norms);
  __syncthreads();

  auto const dout = [&](int i, int c) {
    return i < tokens ? to_float(dout_rows[i * p.dout.token + c]) : 0.f;
  };
  auto const write = [&](int i, int c) {
    return i < tokens ? residual_rows[i * value_stride + c] * shared.beta[i] : 0.f;
  };
  auto const dvalue = [&](int i, int c) {
    return i < tokens ? dwrite_rows[i * value_stride + c] * shared.beta[i] : 0.f;
  };

  Micro product{};
  multiply<Along::kDepth, Along::kDepth>(shared, product, V, dout, write);
  each([&](int i, int j) {
    if (Micro::row(i) >= Micro::column(j)) shared.pairs[Micro::row(i)][Micro::column(j)] = product.x[i][j];
  });
  product = {};
  if (p.delta) multiply<Along::kDepth, Along::kDepth>(shared, product, V, dvalue, write);
  each([&](int i, int j) {
    if (Micro::row(i) > Micro::column(j)) shared.pairs[Micro::column(j)][Micro::row(i)] = -product.x[i][j];
  });

  for (int first = 0; first < K; first += kGroup) {
    auto* const logs = reinterpret_cast<float (*)[kGroup]>(&shared.a[0][0]);
    __syncthreads();
    for (int e = thread; e < kChunk * kGroup; e += kGradientThreads) {
      int const i = e / kGroup, c = e % kGroup;
      bool const inside = i < tokens && first + c < K;
      float const g = inside ? log_decay(p, chunk.row, chunk.begin + i, head, first + c) : 0.f;
      logs[i][c] = g;
      shared.decay[i][c] = expf(g);
      shared.q[i][c] = inside ? to_float(q_rows[i * p.q.token + first + c]) * shared.norms.q[i] : 0.f;
      shared.k[i][c] = inside ? to_float(k_rows[i * p.k.token + first + c]) * shared.norms.k[i] : 0.f;
    }
    __syncthreads();
    float from_start[kMicro][kMicro], to_end[kMicro][kMicro];
#pragma unroll
    for (int j = 0; j < kMicro; ++j) {  // sums, not differences of sums
      int const c = Micro::column(j);
      float sum = 0.f;
      for (int i = 0; i < Micro::row(0); ++i) sum += logs[i][c];
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
        sum += logs[Micro::row(i)][c];
        from_start[i][j] = expf(sum);
      }
      sum = 0.f;
      for (int i = kChunk - 1; i > Micro::row(kMicro - 1); --i) sum += logs[i][c];
#pragma unroll
      for (int i = kMicro - 1; i >= 0; --i) {
        to_end[i][j] = expf(sum);
        sum += logs[Micro::row(i)][c];
      }
      if (Micro::row(kMicro - 1) == kChunk - 1) shared.last[c] = from_start[kMicro - 1][j];
    }

    auto const state_row = [&](int c, int d) { return first + c < K ? state[(first + c) * V + d] : 0.f; };
    auto const dstate_row = [&](int c, int d) { return first + c < K ? dstate[(first + c) * V + d] : 0.f; };
    auto const store = [&](float* rows, auto const& value) {
      each([&](int i, int j) {
        int const row = Micro::row(i), c = first + Micro::column(j);
        if (row < tokens && c < K) rows[first_row * K + row * key_stride + c] = value(i, j);
      });
    };
    product = {};
    multiply<Along::kDepth, Along::kDepth>(shared, product, V, dout, state_row);
    store(w.dq, [&](int i, int j) { return p.scale * from_start[i][j] * product.x[i][j]; });
    product = {};
    if (p.delta) multiply<Along::kDepth, Along::kDepth>(shared, product, V, dvalue, state_row);
    store(w.dk, [&](int i, int j) { return -from_start[i][j] * product.x[i][j]; });
    product = {};
    multiply<Along::kDepth, Along::kDepth>(shared, product, V, write, dstate_row);
    store(w.carried, [&](int i, int j) { return to_end[i][j] * product.x[i][j]; });
    for (int c = thread / kWarp; c < kGroup && first + c < K; c += kGradientThreads / kWarp) {
      float sum = 0.f;
      for (int d = thread % kWarp; d < V; d += kWarp) sum += state_row(c, d) * dstate_row(c, d);
      sum = lane_sum(sum);
      if (thread % kWarp == 0) shared.through[c] = sum * shared.last[c];
    }
    __syncthreads();

    int const c = thread % kGroup;
    for (int i = thread / kGroup; i < tokens && first + c < K; i += kParts) {
      float by_p = 0.f, by_a = 0.f, from = 0.f;
      for (int j = 0; j < i; ++j) {
        float const k = shared.k[j][c], decay = shared.decay[j + 1][c];
        by_p = (by_p + shared.pairs[i][j] * k) * decay;
        by_a = (by_a + shared.pairs[j][i] * k) * decay;
      }
      for (int m = tokens - 1; m > i; --m) {
        from += p.scale * shared.pairs[m][i] * shared.q[m][c] + shared.pairs[i][m] * shared.k[m][c];
        from *= shared.decay[m][c];
      }
      float const q = shared.q[i][c], k = shared.k[i][c], self = p.scale * shared.pairs[i][i];
      int64_t const at = first_row * K + i * key_stride + first + c;
      float const dq = w.dq[at] + p.scale * by_p, dk = w.dk[at], after = w.carried[at];
      w.dq[at] = dq + self * k;
      w.dk[at] = dk + after + by_a + from + self * q;
      w.carried[at] = k * after;
      token_row<float>(p.dg, chunk.row, chunk.begin + i, head)[first + c] = q * dq + k * (dk + by_a - from);
    }
    __syncthreads();
    if (thread < kGroup && first + c < K) {
      float later = shared.through[c], earlier = 0.f;
      for (int i = tokens - 1; i >= 0; --i) {
        float& dg = token_row<float>(p.dg, chunk.row, chunk.begin + i, head)[first + c];
        later += dg;
        dg = later;
      }
      for (int i = 0; i < tokens; ++i) {
        float& dg = token_row<float>(p.dg, chunk.row, chunk.begin + i, head)[first + c];
        bool const reset = log_decay(p, chunk.row, chunk.begin + i, head, first + c) <= kNoDecay;
        dg = reset ? 0.f : dg + earlier;
        earlier += w.carried[first_row * K + i * key_stride + first + c];
      }
    }
  }
}

// Turns dL/d(log decay) in p.dg into that of the raw gate, in place, and sums up dA_log and ddt_bias. Block
// -> (sequence, value head); a warp has 32 channels of every 32nd token.
static __global__ void __launch_bounds__(kGateThreads)
    gate_gradients(__grid_constant__ BackwardParams const p) {
  __shared__ float scratch[kGateThreads / kWarp], sums[kGateThreads / kWarp][kWarp];
  int const head = static_cast<int>(blockIdx.x % p.value_heads);
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Sequence const s = sequence(p, blockIdx.x / p.value_heads);
  float const rate = -expf(p.A_log[head]);
  float dA_log = 0.f;
  for (int first = 0; first < p.key_dim; first += kWarp) {
    int const c = first + lane;
    float ddt_bias = 0.f;
    if (c < p.key_dim) {
      float const bias = p.dt_bias[head * p.key_dim + c];
      for (int64_t t = warp; t < s.length; t += kGateThreads / kWarp) {
        float& dg = token_row<float>(p.dg, s.row, s.begin + t, head)[c];
        float const x = token_row<float const>(p.g, s.row, s.begin + t, head)[c] + bias, d = dg;
        dA_log += d == 0.f ? 0.f : d * rate * softplus(x);
        dg = d * rate * softplus_derivative(x);
        ddt_bias += dg;
      }
    }
    sums[warp][lane] = ddt_bias;
    __syncthreads();
    if (warp == 0 && c < p.key_dim) {
      float total = 0.f;
      for (int i = 0; i < kGateThreads / kWarp; ++i) total += sums[i][lane];
      p.ddt_bias[blockIdx.x * static_cast<int64_t>(p.key_dim) + c] = total;
    }
    __syncthreads();
  }
  dA_log = block_sum<kGateThreads>(dA_log, scratch);
  if (threadIdx.x == 0) p.dA_log[blockIdx.x] = dA_log;
}

}  // namespace lt2::kda::portable
