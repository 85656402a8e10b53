// Gradients of attention over a selection. With p = e^(s - lse), delta = o . do - dlse and dp = do . v:
//   ds = p (dp - delta);  dq = scale sum ds k over the keys of a query;
//   dk = scale sum ds q, dv = sum p do over the queries of a key.
// The queries of a key are listed in ascending order (lists.cuh), so that no sum depends on scheduling.
#pragma once

#include "dsa/cuda/portable/attention_forward.cuh"
#include "dsa/cuda/portable/lists.cuh"

namespace lt2::dsa::portable {

// delta [B, T, HQ], a warp each.
template <class T>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(AttentionBackwardParams const p, float* delta, int const* condition) {
  if (skipped(condition)) return;
  int64_t const heads = p.batch * p.tokens * p.query_heads;
  int const lane = threadIdx.x % kWarp;
  for (int64_t i = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; i < heads;
       i += int64_t{gridDim.x} * (kThreads / kWarp)) {
    int64_t const query = i / p.query_heads, row = query / p.tokens, token = query % p.tokens;
    T const* const o = row_of<T const>(p.o, row, token, i % p.query_heads);
    T const* const dout = row_of<T const>(p.dout, row, token, i % p.query_heads);
    float sum = 0.f;
    for (int64_t d = lane; d < p.value_dim; d += kWarp) sum += to_float(o[d]) * to_float(dout[d]);
    sum = lane_sum(sum);
    if (lane == 0) delta[i] = sum - (p.dlse == nullptr ? 0.f : p.dlse[i]);
  }
}

template <class T, int kLanes, int kHeads>
__global__ void __launch_bounds__(kThreads)
    query_gradients(AttentionBackwardParams const p, Cut const cut, float const* delta, int64_t units,
                    int const* condition) {
  constexpr int kGroups = kThreads / kLanes, kBatch = sizeof(T) == 4 || kLanes == 32 ? 1 : 2,
                kRow = kLanes * kElements;
  __shared__ float scratch[kGroups * kHeads * kRow];
  if (skipped(condition)) return;
  int const group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int64_t u = blockIdx.x; u < units; u += gridDim.x) {
    AttentionUnit const unit(p, cut, u, kHeads);
    Sight const seen = sight(p, unit.row, unit.token);
    int32_t const* const indices = indices_of(p, unit.query);
    int64_t const first_head = unit.query * p.query_heads + unit.head;
    float q[kHeads][kElements], dout[kHeads][kElements], dq[kHeads][kElements] = {}, lse[kHeads],
                                                         shift[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      bool const present = h < unit.heads;
      load_floats(q[h], row_of<T const>(p.q, unit.row, unit.token, unit.head + h), lane, p.dim, present);
      load_floats(dout[h], row_of<T const>(p.dout, unit.row, unit.token, unit.head + h), lane, p.value_dim,
                  present);
      lse[h] = present ? p.lse[first_head + h] : 0.f;
      shift[h] = present ? delta[first_head + h] : 0.f;
    }
    for (int64_t first = 0; first < p.topk; first += kGroups * kBatch) {
      Piece<T> k[kBatch], v[kBatch];
      bool present[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        int const key = selected_key(p, indices, seen, first + j * kGroups + group);
        present[j] = key >= 0;
        k[j] = load_piece(row_of<T const>(p.k, unit.row, key, unit.key_head), lane, p.dim, present[j]);
        v[j] = load_piece(row_of<T const>(p.v, unit.row, key, unit.key_head), lane, p.value_dim, present[j]);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          float const s = p.scale * lane_sum<kLanes>(dot(q[h], k[j]));
          float const dp = lane_sum<kLanes>(dot(dout[h], v[j]));
          float const ds = present[j] ? exp2f((s - lse[h]) * kLog2E) * (dp - shift[h]) : 0.f;
          add_scaled(dq[h], ds, k[j]);
        }
      }
    }
    sum_groups<kLanes>(dq, scratch, group, lane, [&](int h, int d, float sum) {
      if (h >= unit.heads || d >= p.dim) return;
      row_of<T>(p.dq, unit.row, unit.token, unit.head + h)[d] = from_float<T>(p.scale * sum);
    });
  }
}

// dk and dv of one key and key head.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) key_gradients(AttentionBackwardParams const p, Lists const lists,
                                                          float const* delta, int const* condition) {
  constexpr int kGroups = kThreads / kLanes, kBatch = 4, kRow = kLanes * kElements;
  __shared__ float scratch[kGroups * 2 * kRow];
  if (skipped(condition)) return;
  int const group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  int64_t const units = p.batch * p.keys * p.key_heads, heads = p.query_heads / p.key_heads;
  for (int64_t u = blockIdx.x; u < units; u += gridDim.x) {
    int64_t const key_head = u % p.key_heads, key = u / p.key_heads % p.keys;
    int64_t const row = u / p.key_heads / p.keys;
    int64_t const* const starts = lists.starts + row * (p.keys + 1) + key;
    int32_t const* const queries = lists.queries + row * p.tokens * p.topk + starts[0];
    int64_t const pairs = (starts[1] - starts[0]) * heads;
    float k[kElements], v[kElements], gradient[2][kElements] = {};  // dk, dv
    load_floats(k, row_of<T const>(p.k, row, key, key_head), lane, p.dim, pairs > 0);
    load_floats(v, row_of<T const>(p.v, row, key, key_head), lane, p.value_dim, pairs > 0);
    for (int64_t first = 0; first < pairs; first += kGroups * kBatch) {
      Piece<T> q[kBatch], dout[kBatch];
      float lse[kBatch], shift[kBatch];
      bool present[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        int64_t const i = first + j * kGroups + group;
        present[j] = i < pairs;
        int64_t const token = present[j] ? queries[i / heads] : 0, head = key_head * heads + i % heads;
        q[j] = load_piece(row_of<T const>(p.q, row, token, head), lane, p.dim, present[j]);
        dout[j] = load_piece(row_of<T const>(p.dout, row, token, head), lane, p.value_dim, present[j]);
        int64_t const at = (row * p.tokens + token) * p.query_heads + head;
        lse[j] = present[j] ? p.lse[at] : 0.f;
        shift[j] = present[j] ? delta[at] : 0.f;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        float const s = p.scale * lane_sum<kLanes>(dot(k, q[j]));
        float const dp = lane_sum<kLanes>(dot(v, dout[j]));
        float const weight = present[j] ? exp2f((s - lse[j]) * kLog2E) : 0.f;
        add_scaled(gradient[1], weight, dout[j]);
        add_scaled(gradient[0], present[j] ? weight * (dp - shift[j]) : 0.f, q[j]);
      }
    }
    sum_groups<kLanes>(gradient, scratch, group, lane, [&](int which, int d, float sum) {
      if (which == 0 && d < p.dim) row_of<T>(p.dk, row, key, key_head)[d] = from_float<T>(p.scale * sum);
      if (which == 1 && d < p.value_dim) row_of<T>(p.dv, row, key, key_head)[d] = from_float<T>(sum);
    });
  }
}

}  // namespace lt2::dsa::portable
