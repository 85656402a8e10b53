// Divergence of the indexer's scores I from the attention weights p over the keys of each query, and its
// gradients. With Z = sum e^I, m = sum p and N rows that have a key:
//   loss = (1 / N) sum over rows of sum p (log p - I) + m log Z
//   dI = (m e^I / Z - p) / N;  with x_j = scale q_j . k:
//   dw_j = sum dI relu(x_j),  dq_j = scale w_j sum dI [x_j > 0] k,  dk = scale sum dI w_j [x_j > 0] q_j
// Three passes over the pairs, each of which computes p and I again: nothing of their number is kept. A group
// of kLanes lanes takes a pair, 8 elements of a row a lane; groups add up in a fixed order.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/cuda/launch.cuh"
#include "dsa/cuda/portable/lists.cuh"

namespace lt2::dsa::portable {

inline constexpr int kScored = 512;  // pairs whose dI a block keeps at a time

// Of the backward pass. A condition is that of rows.cuh: where it is zero nothing is computed.
struct LossParts {
  Lists lists;       // where there is a selection
  float* gradients;  // [B, T, topk], of loss_gather.cuh
  int64_t floats;
};

// What a block keeps in shared memory of a query, or of a key: rows as floats.
struct SharedRows {
  float *heads, *index;  // [HQ, D] and [HI, DI], or [H, D] and [DI]
  float *weights, *lse;  // [HI], [HQ]; of a query
  float* scored;         // [kScored]
  float* sums;           // [kThreads / kLanes, 8 kLanes], [HI, DI] after them
};

inline __device__ SharedRows cut_shared(LossParams const& p, float* shared, int64_t heads, int64_t index) {
  SharedRows s{};
  s.heads = shared;
  s.index = s.heads + heads * p.dim;
  s.weights = s.index + index * p.index_dim;
  s.lse = s.weights + p.index_heads;
  s.scored = s.lse + p.query_heads;
  s.sums = s.scored + kScored;
  return s;
}

inline int64_t shared_floats(LossParams const& p, int64_t heads, int64_t index) {
  return heads * p.dim + index * p.index_dim + p.index_heads + p.query_heads + kScored +
         kThreads * kElements + p.index_heads * p.index_dim;
}

template <class T>
__device__ void widen_row(T const* row, int64_t dim, float* out) {
  for (int64_t d = threadIdx.x; d < dim; d += kThreads) out[d] = to_float(row[d]);
}

template <int kLanes, class T>
__device__ float dot_lanes(float const* x, Piece<T> const& y, int lane, int64_t dim) {
  float sum = 0.f;
  if (lane * kElements < dim) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum += x[lane * kElements + i] * to_float(y.x[i]);
  }
  return lane_sum<kLanes>(sum);
}

__device__ inline float weight_of(LossParams const& p, int64_t row, int64_t token, int64_t head) {
  return p.weights.data == nullptr ? 1.f : *row_of<float const>(p.weights, row, token, head);
}

// The keys of a query: slot i of its selection, or the i-th key that it sees.
struct QueryKeys {
  Sight seen;
  int32_t const* indices;
  int64_t slots;
  bool dense;

  __device__ QueryKeys(LossParams const& p, int64_t row, int64_t token)
      : seen(sight(p, row, token)),
        indices(p.dense ? nullptr : indices_of(p, row * p.tokens + token)),
        slots(p.dense ? seen.count : p.topk),
        dense(p.dense) {}

  __device__ int key(LossParams const& p, int64_t i) const {
    if (!dense) return selected_key(p, indices, seen, i);
    return i < slots ? seen.first + static_cast<int>(i) : -1;
  }
};

struct Pair {
  float weight, score;  // p and I
};

// Of the query in shared memory and a key of its batch row; `key` may be -1. All lanes of a warp call.
template <class T, int kLanes>
__device__ Pair pair_of_key(LossParams const& p, SharedRows const& s, int64_t row, int key, int lane) {
  bool const there = key >= 0;
  int64_t const group = p.query_heads / p.key_heads;
  Pair pair{0.f, 0.f};
  for (int64_t h = 0; h < p.key_heads; ++h) {
    Piece<T> const k = load_piece(row_of<T const>(p.k, row, key, h), lane, p.dim, there);
    for (int64_t j = h * group; j < (h + 1) * group; ++j) {
      float const x = p.scale * dot_lanes<kLanes>(s.heads + j * p.dim, k, lane, p.dim);
      pair.weight += exp2f((x - s.lse[j]) * kLog2E);
    }
  }
  pair.weight = there ? pair.weight / static_cast<float>(p.query_heads) : 0.f;
  Piece<T> const k = load_piece(row_of<T const>(p.index_k, row, key, 0), lane, p.index_dim, there);
  for (int64_t j = 0; j < p.index_heads; ++j) {
    float const x = p.index_scale * dot_lanes<kLanes>(s.index + j * p.index_dim, k, lane, p.index_dim);
    pair.score += s.weights[j] * fmaxf(x, 0.f);
  }
  return pair;
}

template <class T>
__device__ void load_query(LossParams const& p, SharedRows const& s, int64_t row, int64_t token) {
  __syncthreads();
  for (int64_t h = 0; h < p.query_heads; ++h) {
    widen_row(row_of<T const>(p.q, row, token, h), p.dim, s.heads + h * p.dim);
  }
  for (int64_t j = 0; j < p.index_heads; ++j) {
    widen_row(row_of<T const>(p.index_q, row, token, j), p.index_dim, s.index + j * p.index_dim);
  }
  for (int64_t j = threadIdx.x; j < p.index_heads; j += kThreads) s.weights[j] = weight_of(p, row, token, j);
  for (int64_t h = threadIdx.x; h < p.query_heads; h += kThreads)
    s.lse[h] = p.lse[(row * p.tokens + token) * p.query_heads + h];
  __syncthreads();
}

// losses, log_sums and masses of a query.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    loss_rows(__grid_constant__ LossForwardParams const p, int const* condition) {
  if (skipped(condition)) return;
  constexpr int kGroups = kThreads / kLanes;
  extern __shared__ float shared[];
  SharedRows const s = cut_shared(p, shared, p.query_heads, p.index_heads);
  int const group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int64_t query = blockIdx.x; query < p.batch * p.tokens; query += gridDim.x) {
    int64_t const row = query / p.tokens, token = query % p.tokens;
    load_query<T>(p, s, row, token);
    QueryKeys const keys(p, row, token);
    float most = -INFINITY, total = 0.f, mass = 0.f, loss = 0.f, count = 0.f;
    for (int64_t first = 0; first < keys.slots; first += kGroups) {
      int const key = keys.key(p, first + group);
      Pair const pair = pair_of_key<T, kLanes>(p, s, row, key, lane);
      if (key >= 0) {
        float const higher = fmaxf(most, pair.score);
        if (higher > -INFINITY) total = total * expf(most - higher) + expf(pair.score - higher);
        most = higher;
        mass += pair.weight;
        if (pair.weight != 0.f) loss += pair.weight * (logf(pair.weight) - pair.score);
        count += 1.f;
      }
    }
    float* const sums = s.sums;  // [5, kGroups]
    if (lane == 0) {
      sums[group] = most;
      sums[kGroups + group] = total;
      sums[2 * kGroups + group] = mass;
      sums[3 * kGroups + group] = loss;
      sums[4 * kGroups + group] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int g = 1; g < kGroups; ++g) most = fmaxf(most, sums[g]);
      float all[4] = {};
      for (int g = 0; g < kGroups; ++g) {
        if (most > -INFINITY) all[0] += sums[kGroups + g] * expf(sums[g] - most);
        for (int i = 1; i < 4; ++i) all[i] += sums[(i + 1) * kGroups + g];
      }
      bool const empty = all[3] == 0.f;
      float const log_sum = most + logf(all[0]);
      p.losses[query] = empty ? 0.f : all[2] + all[1] * log_sum;
      p.log_sums[query] = empty ? 0.f : log_sum;
      p.masses[query] = empty ? -1.f : all[1];
    }
  }
}

// Of `losses`, and how many rows have a key; one block.
template <int kMeanThreads>
__global__ void __launch_bounds__(kMeanThreads) mean_kernel(LossForwardParams const p) {
  __shared__ double sums[kMeanThreads];
  __shared__ int counts[kMeanThreads];
  double sum = 0;
  int count = 0;
  for (int64_t i = threadIdx.x; i < p.batch * p.tokens; i += kMeanThreads) {
    if (p.masses[i] == -1.f) continue;
    sum += p.losses[i];
    ++count;
  }
  sums[threadIdx.x] = sum;
  counts[threadIdx.x] = count;
  __syncthreads();
  for (int half = kMeanThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
      counts[threadIdx.x] += counts[threadIdx.x + half];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    *p.mean = counts[0] == 0 ? 0.f : static_cast<float>(sums[0] / counts[0]);
    *p.rows = static_cast<float>(counts[0]);
  }
}

__device__ inline float score_gradient(Pair const& pair, LossBackwardParams const& p, int64_t query) {
  return (p.masses[query] * expf(pair.score - p.log_sums[query]) - pair.weight) * (*p.dmean / *p.rows);
}

// dq and dw of a query.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    loss_query_gradients(__grid_constant__ LossBackwardParams const p, int const* condition) {
  if (skipped(condition)) return;
  constexpr int kGroups = kThreads / kLanes;
  extern __shared__ float shared[];
  SharedRows const s = cut_shared(p, shared, p.query_heads, p.index_heads);
  float* const dq = s.sums + kThreads * kElements;  // [HI, DI]
  __shared__ float dw_parts[kThreads / 8];
  int const group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  int64_t const elements = p.index_heads * p.index_dim;
  for (int64_t query = blockIdx.x; query < p.batch * p.tokens; query += gridDim.x) {
    int64_t const row = query / p.tokens, token = query % p.tokens;
    load_query<T>(p, s, row, token);
    for (int64_t i = threadIdx.x; i < elements; i += kThreads) dq[i] = 0.f;
    if (p.dweights.data != nullptr) {
      for (int64_t j = threadIdx.x; j < p.index_heads; j += kThreads)
        *row_of<float>(p.dweights, row, token, j) = 0.f;
    }
    QueryKeys const keys(p, row, token);
    for (int64_t begin = 0; begin < keys.slots; begin += kScored) {
      int const count = static_cast<int>(min(keys.slots - begin, int64_t{kScored}));
      for (int first = 0; first < count; first += kGroups) {
        int const i = first + group, key = i < count ? keys.key(p, begin + i) : -1;
        Pair const pair = pair_of_key<T, kLanes>(p, s, row, key, lane);
        if (lane == 0 && i < count) s.scored[i] = key < 0 ? 0.f : score_gradient(pair, p, query);
      }
      __syncthreads();
      for (int64_t j = 0; j < p.index_heads; ++j) {
        float sum[1][kElements] = {}, dw = 0.f;
        for (int first = 0; first < count; first += kGroups) {
          int const i = first + group, key = i < count ? keys.key(p, begin + i) : -1;
          Piece<T> const k = load_piece(row_of<T const>(p.index_k, row, key, 0), lane, p.index_dim, key >= 0);
          float const x = p.index_scale * dot_lanes<kLanes>(s.index + j * p.index_dim, k, lane, p.index_dim);
          bool const felt = key >= 0 && x > 0.f;  // weights of a query without keys may be anything
          dw += felt ? s.scored[i] * x : 0.f;
          add_scaled(sum[0], felt ? s.scored[i] * s.weights[j] : 0.f, k);
        }
        sum_groups<kLanes>(sum, s.sums, group, lane, [&](int, int d, float total) {
          if (d < p.index_dim) dq[j * p.index_dim + d] += total;
        });
        if (lane == 0) dw_parts[group] = dw;
        __syncthreads();
        if (threadIdx.x == 0 && p.dweights.data != nullptr) {
          float total = 0.f;
          for (int g = 0; g < kGroups; ++g) total += dw_parts[g];
          *row_of<float>(p.dweights, row, token, j) += total;
        }
      }
      __syncthreads();
    }
    __syncthreads();
    for (int64_t j = 0; j < p.index_heads; ++j) {
      T* const out = row_of<T>(p.dq, row, token, j);
      for (int64_t d = threadIdx.x; d < p.index_dim; d += kThreads) {
        out[d] = from_float<T>(p.index_scale * dq[j * p.index_dim + d]);
      }
    }
  }
}

// dk of a key, over the queries that select it or, without a selection, see it.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4)
    loss_key_gradients(__grid_constant__ LossBackwardParams const p, __grid_constant__ LossParts const parts,
                       int const* condition) {
  if (skipped(condition)) return;
  constexpr int kGroups = kThreads / kLanes;
  extern __shared__ float shared[];
  SharedRows const s = cut_shared(p, shared, p.key_heads, 1);
  int const unit = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  int64_t const group = p.query_heads / p.key_heads;
  for (int64_t unit_key = blockIdx.x; unit_key < p.batch * p.keys; unit_key += gridDim.x) {
    int64_t const row = unit_key / p.keys, key = unit_key % p.keys;
    __syncthreads();
    for (int64_t h = 0; h < p.key_heads; ++h) {
      widen_row(row_of<T const>(p.k, row, key, h), p.dim, s.heads + h * p.dim);
    }
    widen_row(row_of<T const>(p.index_k, row, key, 0), p.index_dim, s.index);
    __syncthreads();
    int64_t begin = 0, count = p.tokens;
    if (!p.dense) {
      int64_t const* const starts = parts.lists.starts + row * (p.keys + 1) + key;
      begin = row * p.tokens * p.topk + starts[0];
      count = starts[1] - starts[0];
    }
    float sum[1][kElements] = {};
    for (int64_t first = 0; first < count; first += kGroups) {
      int64_t const i = first + unit;
      bool there = i < count;
      int64_t token = there ? i : 0;
      if (p.dense) {
        Sight const seen = sight(p, row, token);
        there = there && key >= seen.first && key < seen.first + seen.count;
      } else {
        token = there ? parts.lists.queries[begin + i] : 0;
      }
      if (!__any_sync(0xffffffffu, there)) continue;
      int64_t const query = row * p.tokens + token;
      Pair pair{0.f, 0.f};
      for (int64_t h = 0; h < p.key_heads; ++h) {
        for (int64_t g = h * group; g < (h + 1) * group; ++g) {
          Piece<T> const q = load_piece(row_of<T const>(p.q, row, token, g), lane, p.dim, there);
          float const x = p.scale * dot_lanes<kLanes>(s.heads + h * p.dim, q, lane, p.dim);
          pair.weight += exp2f((x - p.lse[query * p.query_heads + g]) * kLog2E);
        }
      }
      pair.weight /= static_cast<float>(p.query_heads);
      auto const index_head = [&](int64_t j, Piece<T>& q) {
        q = load_piece(row_of<T const>(p.index_q, row, token, j), lane, p.index_dim, there);
        return p.index_scale * dot_lanes<kLanes>(s.index, q, lane, p.index_dim);
      };
      Piece<T> q;
      for (int64_t j = 0; j < p.index_heads; ++j) {
        float const x = index_head(j, q);
        pair.score += weight_of(p, row, token, j) * fmaxf(x, 0.f);
      }
      float const gradient = there ? score_gradient(pair, p, query) : 0.f;
      for (int64_t j = 0; j < p.index_heads; ++j) {
        float const x = index_head(j, q);
        add_scaled(sum[0], x > 0.f ? gradient * weight_of(p, row, token, j) : 0.f, q);
      }
    }
    sum_groups<kLanes>(sum, s.sums, unit, lane, [&](int, int d, float total) {
      if (d < p.index_dim) row_of<T>(p.dk, row, key, 0)[d] = from_float<T>(p.index_scale * total);
    });
  }
}

}  // namespace lt2::dsa::portable
