// The loss of an indexer over selections, for 2-byte operands: as loss.cuh, but a warp takes 16 keys of a
// query at a time, gathered, with heads on the rows of its products. The gradients of the scores are kept,
// N dI [B, T, topk], as many floats as there are indices; so later passes read index operands alone.
#pragma once

#include "dsa/cuda/portable/gather.cuh"
#include "dsa/cuda/portable/loss.cuh"

namespace lt2::dsa::portable::gather {

inline constexpr int kWarps = kThreads / kWarp, kKeys = 16, kStages = 4, kMostHeads = 16;
inline constexpr int64_t kMostKeys = 2048, kMostQueryHeads = 32;  // of a selection; by shared memory

inline bool takes(LossParams const& p) {
  auto const fits = [](int64_t dim) { return dim == 64 || dim == 128; };
  return p.dtype != Dtype::kFloat32 && !p.dense && fits(p.dim) && fits(p.index_dim) &&
         p.index_heads <= kMostHeads && p.query_heads / p.key_heads <= kMostHeads &&
         p.query_heads <= kMostQueryHeads && p.topk <= kMostKeys && p.tokens * p.topk <= INT32_MAX;
}

// What rows of 16 query heads, or of index heads, give: fragments' sums over rows for the 16 keys of a tile.
// Afterwards every lane has those of keys 8 n + 2 (lane % 4) + e.
__device__ __forceinline__ void sum_rows(float (&x)[2][2]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2)
        x[n][e] += __shfl_xor_sync(0xffffffffu, x[n][e], distance);
    }
  }
}

template <int kDim, int kIndexDim>
struct RowsShared {
  static constexpr int kWider = kDim > kIndexDim ? kDim : kIndexDim;
  alignas(16) char tiles[kWarps][kStages][RowTile<kWider>::kBytes];
  float sums[kWarps];
  // then queries of the attention [HQ, D] and of the indexer [HI, DI], lse [HQ], weights [HI], p and I of the
  // query's keys [topk each]; p is -1 where there is none
};

template <int kDim, int kIndexDim>
int64_t rows_bytes(LossParams const& p) {
  return sizeof(RowsShared<kDim, kIndexDim>) + p.query_heads * RowTile<kDim>::kRowBytes +
         p.index_heads * RowTile<kIndexDim>::kRowBytes +
         (p.query_heads + p.index_heads + 2 * p.topk) * static_cast<int64_t>(sizeof(float));
}

inline __device__ float block_max(float x, float* scratch) {
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = fmaxf(x, scratch[w]);
  return x;
}

// Of LossForwardParams losses, log_sums and masses of a query, of LossBackwardParams its N dI.
template <class T, int kDim, int kIndexDim, class Params>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(__grid_constant__ Params const p, float* all_gradients, int const* condition) {
  if (skipped(condition)) return;
  using Keys = RowTile<kDim>;
  using IndexKeys = RowTile<kIndexDim>;
  extern __shared__ __align__(16) char bytes[];
  auto& shared = *reinterpret_cast<RowsShared<kDim, kIndexDim>*>(bytes);
  char* const queries = bytes + sizeof(shared);
  char* const index_queries = queries + p.query_heads * Keys::kRowBytes;
  float* const lse = reinterpret_cast<float*>(index_queries + p.index_heads * IndexKeys::kRowBytes);
  float* const weights = lse + p.query_heads;
  float* const pair_p = weights + p.index_heads;
  float* const pair_i = pair_p + p.topk;
  int const thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  int const topk = static_cast<int>(p.topk), key_heads = static_cast<int>(p.key_heads);
  int const group = static_cast<int>(p.query_heads / p.key_heads),
            index_heads = static_cast<int>(p.index_heads);
  int64_t const query = blockIdx.x, row = query / p.tokens, token = query % p.tokens;
  Sight const seen = sight(p, row, token);
  int32_t const* const indices = indices_of(p, query);
  auto const load_rows = [&](char* to, Heads const& x, int64_t heads, auto tile) {
    using Tile = decltype(tile);
    for (int i = thread; i < heads * (Tile::kDim / 8); i += kThreads) {
      int const h = i / (Tile::kDim / 8), chunk = i % (Tile::kDim / 8);
      *reinterpret_cast<uint4*>(to + Tile::offset(h, chunk)) =
          *reinterpret_cast<uint4 const*>(row_of<T const>(x, row, token, h) + chunk * 8);
    }
  };
  load_rows(queries, p.q, p.query_heads, Keys{});
  load_rows(index_queries, p.index_q, p.index_heads, IndexKeys{});
  for (int h = thread; h < p.query_heads; h += kThreads) lse[h] = p.lse[query * p.query_heads + h] * kLog2E;
  for (int j = thread; j < index_heads; j += kThreads) weights[j] = weight_of(p, row, token, j);
  __syncthreads();

  // A tile: the keys of one key head, or after the last the index keys, of 16 selected ones.
  int const steps = (topk + kKeys - 1) / kKeys, own = max(0, (steps - warp + kWarps - 1) / kWarps);
  int const tiles = own * (key_heads + 1);
  auto const key_of = [&](int step) {
    return lane < kKeys ? selected_key(p, indices, seen, (warp + step * kWarps) * kKeys + lane) : -1;
  };
  int load_step = 0, load_head = 0, load_key = key_of(0);
  auto const load = [&](int stage) {
    if (load_step < own) {
      char* const to = shared.tiles[warp][stage];
      if (load_head < key_heads) {
        Keys::copy(to, row_of<T const>(p.k, row, 0, load_head), p.k.token, load_key, lane);
      } else {
        IndexKeys::copy(to, row_of<T const>(p.index_k, row, 0, 0), p.index_k.token, load_key, lane);
      }
      if (++load_head > key_heads) {
        load_head = 0;
        load_key = key_of(++load_step);
      }
    }
    commit_copies();
  };
  for (int i = 0; i < kStages; ++i) load(i);
  float const scale = p.scale * kLog2E;
  float weight[2][2] = {};
  for (int i = 0, step = 0, head = 0; i < tiles; ++i) {
    int const stage = i % kStages;
    wait_copies_but<kStages - 1>();
    __syncwarp();
    char const* const tile = shared.tiles[warp][stage];
    float s[2][4] = {};
    if (head < key_heads) {
      uint32_t q[kDim / 16][4];
      Keys::load_fragments(q, queries, head * group, group, lane);
      Keys::template multiply<T>(s, q, tile, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const h = lane / 4 + 8 * half;
        if (h >= group) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            weight[n][e] += exp2f(s[n][2 * half + e] * scale - lse[head * group + h]);
        }
      }
      ++head;
    } else {
      uint32_t q[kIndexDim / 16][4];
      IndexKeys::load_fragments(q, index_queries, 0, index_heads, lane);
      IndexKeys::template multiply<T>(s, q, tile, lane);
      float score[2][2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const j = lane / 4 + 8 * half;
        if (j >= index_heads) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            score[n][e] += weights[j] * fmaxf(p.index_scale * s[n][2 * half + e], 0.f);
        }
      }
      sum_rows(weight);
      sum_rows(score);
      int const key = key_of(step);
      unsigned const present = __ballot_sync(0xffffffffu, key >= 0);
      if (lane < 4) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int const at = 8 * n + 2 * lane + e, slot = (warp + step * kWarps) * kKeys + at;
            if (slot >= topk) continue;
            pair_p[slot] = present >> at & 1 ? weight[n][e] / static_cast<float>(p.query_heads) : -1.f;
            pair_i[slot] = score[n][e];
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) weight[n][0] = weight[n][1] = 0.f;
      head = 0;
      ++step;
    }
    __syncwarp();
    load(stage);
  }
  __syncthreads();

  if constexpr (std::is_same_v<Params, LossBackwardParams>) {
    float* const gradients = all_gradients + query * p.topk;
    float const log_sum = p.log_sums[query], mass = p.masses[query];
    for (int i = thread; i < topk; i += kThreads) {
      float const weight = pair_p[i];
      gradients[i] = weight == -1.f ? 0.f : mass * expf(pair_i[i] - log_sum) - weight;
    }
  } else {
    float most = -INFINITY;
    for (int i = thread; i < topk; i += kThreads) {
      if (pair_p[i] != -1.f) most = fmaxf(most, pair_i[i]);
    }
    most = block_max(most, shared.sums);
    float total = 0.f, mass = 0.f, loss = 0.f, count = 0.f;
    for (int i = thread; i < topk; i += kThreads) {
      float const weight = pair_p[i], score = pair_i[i];
      if (weight == -1.f) continue;
      if (most > -INFINITY) total += expf(score - most);
      mass += weight;
      if (weight != 0.f) loss += weight * (logf(weight) - score);
      count += 1.f;
    }
    total = block_sum<kThreads>(total, shared.sums);
    mass = block_sum<kThreads>(mass, shared.sums);
    loss = block_sum<kThreads>(loss, shared.sums);
    count = block_sum<kThreads>(count, shared.sums);
    bool const empty = count == 0.f;
    float const log_sum = most + logf(total);
    if (thread == 0) {
      p.losses[query] = empty ? 0.f : loss + mass * log_sum;
      p.log_sums[query] = empty ? 0.f : log_sum;
      p.masses[query] = empty ? -1.f : mass;
    }
  }
}

template <int kIndexDim>
struct QueryShared {
  union {
    alignas(16) char tiles[kWarps][kStages][RowTile<kIndexDim>::kBytes];
    float sums[kWarps][kMostHeads][kIndexDim];
  };
  float dweights[kWarps][kMostHeads];
};

// dq and dw of a query.
template <class T, int kIndexDim>
__global__ void __launch_bounds__(kThreads)
    query_kernel(__grid_constant__ LossBackwardParams const p, __grid_constant__ LossParts const parts,
                 int const* condition) {
  if (skipped(condition)) return;
  using Keys = RowTile<kIndexDim>;
  extern __shared__ __align__(16) char bytes[];
  auto& shared = *reinterpret_cast<QueryShared<kIndexDim>*>(bytes);
  int const thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  int const topk = static_cast<int>(p.topk), heads = static_cast<int>(p.index_heads);
  int64_t const query = blockIdx.x, row = query / p.tokens, token = query % p.tokens;
  Sight const seen = sight(p, row, token);
  int32_t const* const indices = indices_of(p, query);
  float const* const gradients = parts.gradients + query * p.topk;
  auto const* const k = row_of<T const>(p.index_k, row, 0, 0);
  int const steps = (topk + kKeys - 1) / kKeys, own = max(0, (steps - warp + kWarps - 1) / kWarps);
  auto const slot_of = [&](int step) { return (warp + step * kWarps) * kKeys; };
  auto const load = [&](int step) {
    int const key = lane < kKeys ? selected_key(p, indices, seen, slot_of(step) + lane) : -1;
    Keys::copy(shared.tiles[warp][step % kStages], k, p.index_k.token, key, lane);
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) load(i);
  uint32_t q[kIndexDim / 16][4];
  Keys::load_fragments(q, row_of<T const>(p.index_q, row, token, 0), p.index_q.head, heads, lane);
  float dq[kIndexDim / 8][4] = {}, dw[2] = {};
#pragma unroll 1
  for (int step = 0; step < own; ++step) {
    float own_gradients[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int const slot = slot_of(step) + 8 * n + 2 * (lane % 4) + e;
        own_gradients[n][e] = slot < topk ? gradients[slot] : 0.f;
      }
    }
    wait_copies_but<kStages - 1>();
    __syncwarp();
    char const* const tile = shared.tiles[warp][step % kStages];
    float x[2][4] = {};
    Keys::template multiply<T>(x, q, tile, lane);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const felt = x[n][i] > 0.f ? own_gradients[n][i % 2] : 0.f;
        dw[i / 2] += felt * fmaxf(x[n][i], 0.f);
        x[n][i] = felt;
      }
    }
    uint32_t a[4];
    pack_fragments<T>(a, x);
    Keys::template accumulate<T>(dq, a, tile, lane, [](float (&)[4]) {});
    __syncwarp();
    load(step + kStages);
  }
  wait_copies();
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    dw[half] += __shfl_xor_sync(0xffffffffu, dw[half], 1);
    dw[half] += __shfl_xor_sync(0xffffffffu, dw[half], 2);
    int const j = lane / 4 + 8 * half;
#pragma unroll
    for (int c = 0; c < kIndexDim / 8; ++c) {
      *reinterpret_cast<float2*>(&shared.sums[warp][j][8 * c + 2 * (lane % 4)]) = {dq[c][2 * half],
                                                                                   dq[c][2 * half + 1]};
    }
    if (lane % 4 == 0) shared.dweights[warp][j] = dw[half];
  }
  __syncthreads();
  float const factor = p.index_scale * (*p.dmean / *p.rows);
  bool const empty = p.masses[query] == -1.f;  // then weights may be anything
  for (int e = thread; e < heads * kIndexDim; e += kThreads) {
    int const j = e / kIndexDim, d = e % kIndexDim;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][j][d];
    row_of<T>(p.dq, row, token, j)[d] =
        from_float<T>(empty ? 0.f : factor * weight_of(p, row, token, j) * sum);
  }
  if (p.dweights.data == nullptr) return;
  for (int j = thread; j < heads; j += kThreads) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.dweights[w][j];
    *row_of<float>(p.dweights, row, token, j) = empty ? 0.f : factor * sum;
  }
}

// dk of a key, over the (query, slot) pairs that select it; kIndexDim / 8 lanes take a pair.
template <class T, int kIndexDim>
__global__ void __launch_bounds__(kThreads)
    key_kernel(__grid_constant__ LossBackwardParams const p, __grid_constant__ LossParts const parts,
               int const* condition) {
  if (skipped(condition)) return;
  constexpr int kLanes = kIndexDim / kElements, kGroups = kThreads / kLanes, kBatch = 4;
  __shared__ float scratch[kGroups * kLanes * kElements];
  int const group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  int64_t const key = blockIdx.x % p.keys, row = blockIdx.x / p.keys;
  int64_t const* const starts = parts.lists.starts + row * (p.keys + 1) + key;
  int32_t const* const list = parts.lists.queries + row * p.tokens * p.topk + starts[0];
  int64_t const count = starts[1] - starts[0];
  float k[kElements], sum[1][kElements] = {};
  load_floats(k, row_of<T const>(p.index_k, row, key, 0), lane, kIndexDim, count > 0);
  for (int64_t first = 0; first < count; first += kGroups) {
    int64_t const i = first + group;
    bool const there = i < count;
    int const pair = there ? list[i] : 0;
    int64_t const token = pair / p.topk;
    float const gradient = there ? parts.gradients[row * p.tokens * p.topk + pair] : 0.f;
    for (int64_t begin = 0; begin < p.index_heads; begin += kBatch) {
      Piece<T> q[kBatch];
      float weights[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        bool const present = there && begin + b < p.index_heads;
        q[b] = load_piece(row_of<T const>(p.index_q, row, token, begin + b), lane, kIndexDim, present);
        weights[b] = present ? weight_of(p, row, token, begin + b) : 0.f;
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        float const x = lane_sum<kLanes>(dot(k, q[b]));
        add_scaled(sum[0], x > 0.f ? gradient * weights[b] : 0.f, q[b]);
      }
    }
  }
  float const factor = p.index_scale * (*p.dmean / *p.rows);
  sum_groups<kLanes>(sum, scratch, group, lane, [&](int, int d, float total) {
    row_of<T>(p.dk, row, key, 0)[d] = from_float<T>(count == 0 ? 0.f : factor * total);
  });
}

template <class T, int kDim, int kIndexDim, class Params>
Status launch_rows(Params const& p, float* gradients, void* stream, int const* condition) {
  return launch(rows_kernel<T, kDim, kIndexDim, Params>, p.batch * p.tokens, kThreads,
                static_cast<int>(rows_bytes<kDim, kIndexDim>(p)), stream, p, gradients, condition);
}

template <class T, int kDim, int kIndexDim>
Status launch_gradients(LossBackwardParams const& p, LossParts const& parts, void* stream,
                        int const* condition) {
  Status status = launch_rows<T, kDim, kIndexDim>(p, parts.gradients, stream, condition);
  if (status != kOk) return status;
  status = launch(query_kernel<T, kIndexDim>, p.batch * p.tokens, kThreads, sizeof(QueryShared<kIndexDim>),
                  stream, p, parts, condition);
  if (status == kOk) status = list_queries(p, parts.lists, stream, condition);
  if (status != kOk) return status;
  return launch(key_kernel<T, kIndexDim>, p.batch * p.keys, kThreads, 0, stream, p, parts, condition);
}

}  // namespace lt2::dsa::portable::gather
