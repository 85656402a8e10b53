// What is left of the backward pass once both scans are done: everything of a chunk at once, all chunks in
// parallel.
#pragma once

#include "gdn/cuda/portable/micro.cuh"

namespace lt2::gdn::portable {

struct GradientShared : Operands {
  float dscores[kChunk][kChunk + 1];  // dL/d(q_i . k_j), lower triangle
  float dgram[kChunk][kChunk + 1];    // dL/d(k_i . k_j), strictly lower
  float crossing[kChunk]
                [kChunk + 1];  // log decay from j to i; later what of the loss passes from token j to i
  float g[kChunk], beta[kChunk];
  float from_start[kChunk],
      to_end[kChunk];  // decay from the chunk's start through i, and from after i to its end
  Norms norms;
  float dfrom_start[kChunk], dto_end[kChunk];  // dL / d log of the two decays
  float scratch[kGradientThreads / kWarp];
};

// Gradients of the normalised q and k (per value head, into the workspace), of the log decay and of beta.
//
// With r, du from the scans, u = beta r, dy = beta du, S before and dS after the chunk, E_ij = e^{g_j+1 + ..
// + g_i}:
//   dP = scale E o (dO U^T) on and below the diagonal,   dM = -E o (dY U^T) below it
//   dQ = scale from_start o (dO S^T) + dP K
//   dK = -from_start o (dY S^T) + to_end o (U dS^T) + dP^T Q + (dM + dM^T) K,   dbeta = r . du
// dL/dg_m is what of the loss passes token m: from the chunk's start to tokens i >= m, from tokens j < m to
// its end, from j < m to i >= m, and from start to end. Without the delta rule every term with dY is gone.
// Each term carries the decay e^{g_m} itself, so nothing cancels at strong gates, and at g_m = -inf every one
// is exactly 0.
template <class T>
__global__ void __launch_bounds__(kGradientThreads, 2)
    chunk_gradients(__grid_constant__ BackwardParams const p, __grid_constant__ Workspace const w) {
  extern __shared__ __align__(16) char shared_bytes[];
  GradientShared& shared = *reinterpret_cast<GradientShared*>(shared_bytes);
  int const head = static_cast<int>(blockIdx.x % p.value_heads), key_head = head / (p.value_heads / p.heads);
  int64_t const number = blockIdx.x / p.value_heads;
  Chunk const chunk = find_chunk(p, number);
  if (chunk.tokens == 0) return;

  int const K = p.key_dim, V = p.value_dim, tokens = chunk.tokens;
  int const thread = threadIdx.x;
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
    shared.g[thread] = thread < tokens ? log_decay(p, chunk.row, chunk.begin + thread, head) : 0.f;
    shared.beta[thread] = thread < tokens ? write_strength(p, chunk.row, chunk.begin + thread, head) : 0.f;
  }
  __syncthreads();
  norms_and_dbeta<T>(p, chunk, head, residual_rows, dwrite_rows, shared.norms);
  // Sums, not differences of sums: strong gates and -inf cancel nothing.
  if (thread < kChunk) {
    float sum = 0.f;
    for (int i = thread; i < kChunk; ++i) {
      if (i > thread) sum += shared.g[i];
      shared.crossing[i][thread] = sum;
    }
    shared.to_end[thread] = expf(sum);
  } else if (thread == kChunk) {
    float sum = 0.f;
    for (int i = 0; i < kChunk; ++i) {
      sum += shared.g[i];
      shared.from_start[i] = expf(sum);
    }
  }
  __syncthreads();

  auto const query = [&](int i, int c) {
    return i < tokens && c < K ? to_float(q_rows[i * p.q.token + c]) * shared.norms.q[i] : 0.f;
  };
  auto const key = [&](int i, int c) {
    return i < tokens && c < K ? to_float(k_rows[i * p.k.token + c]) * shared.norms.k[i] : 0.f;
  };
  auto const dout = [&](int i, int c) {
    return i < tokens ? to_float(dout_rows[i * p.dout.token + c]) : 0.f;
  };
  auto const write = [&](int i, int c) {
    return i < tokens ? residual_rows[i * value_stride + c] * shared.beta[i] : 0.f;
  };
  auto const dvalue = [&](int i, int c) {
    return i < tokens ? dwrite_rows[i * value_stride + c] * shared.beta[i] : 0.f;
  };

  auto const at = [](auto& matrix, int i, int j) -> float& {
    return matrix[Micro::row(i)][Micro::column(j)];
  };
  Micro product{};
  multiply<Along::kDepth, Along::kDepth>(shared, product, V, dout, write);
  each([&](int i, int j) {
    bool const visible = Micro::row(i) >= Micro::column(j);
    float const decay = visible ? expf(at(shared.crossing, i, j)) : 0.f;
    at(shared.crossing, i, j) = decay;
    at(shared.dscores, i, j) = p.scale * decay * product.x[i][j];
  });
  if (p.delta) {
    product = {};
    multiply<Along::kDepth, Along::kDepth>(shared, product, V, dvalue, write);
    each([&](int i, int j) {
      bool const earlier = Micro::row(i) > Micro::column(j);
      at(shared.dgram, i, j) = earlier ? -at(shared.crossing, i, j) * product.x[i][j] : 0.f;
    });
  }
  product = {};
  multiply<Along::kDepth, Along::kDepth>(shared, product, K, query, key);
  each([&](int i, int j) {
    bool const earlier = Micro::row(i) > Micro::column(j);
    at(shared.crossing, i, j) = earlier ? at(shared.dscores, i, j) * product.x[i][j] : 0.f;
  });
  if (p.delta) {
    product = {};
    multiply<Along::kDepth, Along::kDepth>(shared, product, K, key, key);
    each([&](int i, int j) { at(shared.crossing, i, j) += at(shared.dgram, i, j) * product.x[i][j]; });
  }

  float dfrom_start[kMicro] = {}, dto_end[kMicro] = {};
  for (int first = 0; first < K; first += kChunk) {
    auto const state_row = [&](int c, int d) { return first + c < K ? state[(first + c) * V + d] : 0.f; };
    auto const dstate_row = [&](int c, int d) { return first + c < K ? dstate[(first + c) * V + d] : 0.f; };
    auto const key_column = [&](int c, int j) { return key(j, first + c); };
    auto const query_column = [&](int c, int j) { return query(j, first + c); };
    auto const store = [&](float* gradients, Micro const& x) {
      each([&](int i, int j) {
        int const row = Micro::row(i), c = first + Micro::column(j);
        if (row < tokens && c < K) gradients[first_row * K + row * key_stride + c] = x.x[i][j];
      });
    };

    Micro gradient{};
    multiply<Along::kDepth, Along::kDepth>(shared, gradient, V, dout, state_row);
    each([&](int i, int j) {
      gradient.x[i][j] *= p.scale * shared.from_start[Micro::row(i)];
      dfrom_start[i] += gradient.x[i][j] * query(Micro::row(i), first + Micro::column(j));
    });
    multiply<Along::kDepth, Along::kRow>(
        shared, gradient, kChunk, [&](int i, int j) { return shared.dscores[i][j]; }, key_column);
    store(w.dq, gradient);

    gradient = {};
    if (p.delta) multiply<Along::kDepth, Along::kDepth>(shared, gradient, V, dvalue, state_row);
    product = {};
    multiply<Along::kDepth, Along::kDepth>(shared, product, V, write, dstate_row);
    each([&](int i, int j) {
      int const row = Micro::row(i);
      float const x = key(row, first + Micro::column(j));
      float const before = -shared.from_start[row] * gradient.x[i][j],
                  after = shared.to_end[row] * product.x[i][j];
      dfrom_start[i] += before * x;
      dto_end[i] += after * x;
      gradient.x[i][j] = before + after;
    });
    multiply<Along::kRow, Along::kRow>(
        shared, gradient, kChunk, [&](int i, int j) { return shared.dscores[j][i]; }, query_column);
    if (p.delta) {
      multiply<Along::kDepth, Along::kRow>(
          shared, gradient, kChunk, [&](int i, int j) { return shared.dgram[max(i, j)][min(i, j)]; },
          key_column);
    }
    store(w.dk, gradient);
  }

  if (p.dg.data == nullptr) return;
  float through = 0.f;  // <S, dS>
  for (int64_t e = thread; e < state_size; e += kGradientThreads) through += state[e] * dstate[e];
  through = block_sum<kGradientThreads>(through, shared.scratch) * shared.from_start[kChunk - 1];
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    float const start = lane_sum<kSide>(dfrom_start[i]), end = lane_sum<kSide>(dto_end[i]);
    if (thread % kSide == 0) {
      shared.dfrom_start[Micro::row(i)] = start;
      shared.dto_end[Micro::row(i)] = end;
    }
  }
  if (thread < kChunk) {  // crossing(i, m) <- sum over j < m
    float sum = 0.f;
    for (int j = 0; j < kChunk; ++j) {
      float const x = shared.crossing[thread][j];
      shared.crossing[thread][j] = sum;
      sum += x;
    }
  }
  __syncthreads();
  if (thread < tokens) {
    float dg = through;
    for (int j = 0; j < thread; ++j) dg += shared.dto_end[j];
    for (int i = thread; i < tokens; ++i) dg += shared.dfrom_start[i] + shared.crossing[i][thread];
    *token_row<float>(p.dg, chunk.row, chunk.begin + thread, head) = dg;
  }
}

// Turns dL/d(log decay) in p.dg into dL/da, in place, and sums up dA_log and ddt_bias. Block -> (sequence,
// value head).
static __global__ void __launch_bounds__(kGradientThreads)
    gate_gradients(__grid_constant__ BackwardParams const p) {
  __shared__ float scratch[kGradientThreads / kWarp];
  int const head = static_cast<int>(blockIdx.x % p.value_heads);
  Sequence const s = sequence(p, blockIdx.x / p.value_heads);
  float const rate = -expf(p.A_log[head]), bias = p.dt_bias[head];
  float dA_log = 0.f, ddt_bias = 0.f;
  for (int64_t t = threadIdx.x; t < s.length; t += kGradientThreads) {
    float* const dg = token_row<float>(p.dg, s.row, s.begin + t, head);
    float const x = *token_row<float const>(p.g, s.row, s.begin + t, head) + bias;
    float const da = *dg * rate * softplus_derivative(x);
    dA_log += *dg == 0.f ? 0.f : *dg * rate * softplus(x);
    ddt_bias += da;
    *dg = da;
  }
  dA_log = block_sum<kGradientThreads>(dA_log, scratch);
  ddt_bias = block_sum<kGradientThreads>(ddt_bias, scratch);
  if (threadIdx.x == 0) {
    p.dA_log[blockIdx.x] = dA_log;
    p.ddt_bias[blockIdx.x] = ddt_bias;
  }
}

}  // namespace lt2::gdn::portable
