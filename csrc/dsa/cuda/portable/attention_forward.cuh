// Attention of one query and some heads of one key head over a part of its selection: each group of lanes
// takes keys of its own with a softmax of its own, the block joins them, a second kernel joins the parts.
#pragma once

#include "common/cuda/softmax.cuh"
#include "dsa/cuda/portable/rows.cuh"

namespace lt2::dsa::portable {

// How queries are cut into blocks.
struct Cut {
  int64_t head_blocks;  // of the query heads of a key head
  int splits;           // of a selection
  int64_t keys;         // of a split
  float* partial;       // [B, T, HQ, splits, DV + 2], where there is more than one
};

struct AttentionUnit {
  int64_t row, token, query, key_head, head;  // query = row T + token; head: the first
  int heads, split;

  __device__ AttentionUnit(AttentionParams const& p, Cut const& cut, int64_t unit, int most) {
    split = static_cast<int>(unit % cut.splits);
    unit /= cut.splits;
    int64_t const group = p.query_heads / p.key_heads, first = unit % cut.head_blocks * most;
    unit /= cut.head_blocks;
    key_head = unit % p.key_heads;
    query = unit / p.key_heads;
    row = query / p.tokens;
    token = query % p.tokens;
    head = key_head * group + first;
    heads = static_cast<int>(min(group - first, int64_t{most}));
  }
};

template <class T, int kLanes, int kHeads>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(AttentionForwardParams const p, Cut const cut, int64_t units, int const* condition) {
  constexpr int kGroups = kThreads / kLanes, kBatch = sizeof(T) == 4 ? 2 : 4, kRow = kLanes * kElements;
  __shared__ float scratch[kGroups][kHeads][kRow], tops[kGroups][kHeads], sums[kGroups][kHeads];
  if (skipped(condition)) return;
  int const group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int64_t u = blockIdx.x; u < units; u += gridDim.x) {
    AttentionUnit const unit(p, cut, u, kHeads);
    Sight const seen = sight(p, unit.row, unit.token);
    int32_t const* const indices = indices_of(p, unit.query);
    float q[kHeads][kElements], o[kHeads][kElements] = {}, top[kHeads], sum[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      load_floats(q[h], row_of<T const>(p.q, unit.row, unit.token, unit.head + h), lane, p.dim,
                  h < unit.heads);
      top[h] = -INFINITY;
      sum[h] = 0.f;
    }
    int64_t const begin = unit.split * cut.keys, end = min(begin + cut.keys, p.topk);
    for (int64_t first = begin; first < end; first += kGroups * kBatch) {
      Piece<T> k[kBatch], v[kBatch];
      bool present[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        int64_t const i = first + j * kGroups + group;
        int const key = i < end ? selected_key(p, indices, seen, i) : -1;
        present[j] = key >= 0;
        k[j] = load_piece(row_of<T const>(p.k, unit.row, key, unit.key_head), lane, p.dim, present[j]);
        v[j] = load_piece(row_of<T const>(p.v, unit.row, key, unit.key_head), lane, p.value_dim, present[j]);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float s[kBatch], highest = top[h];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          s[j] = p.scale * lane_sum<kLanes>(dot(q[h], k[j]));
          if (!present[j]) s[j] = -INFINITY;
          highest = fmaxf(highest, s[j]);
        }
        float const base = finite_or_zero(highest), decay = exp2f((top[h] - base) * kLog2E);
        top[h] = highest;
        sum[h] *= decay;
#pragma unroll
        for (int i = 0; i < kElements; ++i) o[h][i] *= decay;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          float const weight = exp2f((s[j] - base) * kLog2E);
          sum[h] += weight;
          add_scaled(o[h], weight, v[j]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (lane == 0) tops[group][h] = top[h], sums[group][h] = sum[h];
#pragma unroll
      for (int i = 0; i < kElements; ++i) scratch[group][h][lane * kElements + i] = o[h][i];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < kHeads * kRow; e += kThreads) {
      int const h = e / kRow, d = e % kRow;
      if (h >= unit.heads || d >= p.value_dim) continue;
      float highest = -INFINITY, total = 0.f, value = 0.f;
      for (int g = 0; g < kGroups; ++g) highest = fmaxf(highest, tops[g][h]);
      float const base = finite_or_zero(highest);
      for (int g = 0; g < kGroups; ++g) {
        float const weight = exp2f((tops[g][h] - base) * kLog2E);
        total += weight * sums[g][h];
        value += weight * scratch[g][h][d];
      }
      int64_t const head = unit.query * p.query_heads + unit.head + h;
      if (cut.splits > 1) {
        float* const partial = cut.partial + (head * cut.splits + unit.split) * (p.value_dim + 2);
        partial[2 + d] = value;
        if (d == 0) partial[0] = highest, partial[1] = total;
      } else {
        row_of<T>(p.o, unit.row, unit.token, unit.head + h)[d] =
            from_float<T>(total == 0.f ? 0.f : value / total);
        if (d == 0) p.lse[head] = highest + logf(total);
      }
    }
  }
}

// o and lse out of the parts of a selection; one block a query and head.
template <class T>
__global__ void __launch_bounds__(kThreads) join_splits(AttentionForwardParams const p, Cut const cut) {
  int64_t const head = blockIdx.x, query = head / p.query_heads;
  float const* const partial = cut.partial + head * cut.splits * (p.value_dim + 2);
  auto const part = [&](int s) { return partial + s * (p.value_dim + 2); };
  float highest = -INFINITY, total = 0.f;
  for (int s = 0; s < cut.splits; ++s) highest = fmaxf(highest, part(s)[0]);
  float const base = finite_or_zero(highest);
  for (int s = 0; s < cut.splits; ++s) total += exp2f((part(s)[0] - base) * kLog2E) * part(s)[1];
  T* const o = row_of<T>(p.o, query / p.tokens, query % p.tokens, head % p.query_heads);
  for (int64_t d = threadIdx.x; d < p.value_dim; d += kThreads) {
    float value = 0.f;
    for (int s = 0; s < cut.splits; ++s) value += exp2f((part(s)[0] - base) * kLog2E) * part(s)[2 + d];
    o[d] = from_float<T>(total == 0.f ? 0.f : value / total);
  }
  if (threadIdx.x == 0) p.lse[head] = highest + logf(total);
}

}  // namespace lt2::dsa::portable
