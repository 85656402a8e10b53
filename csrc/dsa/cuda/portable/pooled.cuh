// The two-level search: means of blocks of keys, then for each query one block of threads that scores them,
// takes the best, scores their keys and takes the best again. Scores stay in shared memory where they fit.
#pragma once

#include "common/cuda/element.cuh"
#include "common/cuda/mma.cuh"
#include "dsa/cuda/portable/order.cuh"
#include "dsa/cuda/portable/scan.cuh"
#include "dsa/cuda/portable/scores.cuh"

namespace lt2::dsa::portable {

inline constexpr int kPooledThreads = 256, kPooledBins = 2048, kThreadBins = kPooledBins / kPooledThreads;
inline constexpr int kMeanThreads = 64;

// Queries [first, ..), one per block. Block b has row b of scores [.., stride], or if that is null its shared
// memory: `count` scores, then the blocks of keys that it chose.
struct PooledRows {
  float* scores;
  int64_t stride, count, first, slots;  // slots: means of a batch row
};

// The means of a sequence whose first key is `first` begin here: those of the sequence before end earlier.
__device__ inline int64_t first_slot(int64_t first, int64_t pool) { return ceil_div(first, pool); }

// means [B, slots, DI]; those that no sequence has are not written.
template <class T>
__global__ void __launch_bounds__(kMeanThreads) pool_keys(IndexerParams p, T* means, int64_t slots) {
  int64_t const row = blockIdx.x / slots, slot = blockIdx.x % slots;
  int64_t first = 0, keys = p.keys;
  if (p.cu_seqlens.data != nullptr) {
    int64_t n = 0, end = p.sequences;
    while (end - n > 1) {
      int64_t const middle = (n + end) / 2;
      (first_slot(offset_at(p.cu_seqlens_k, middle, p.keys), p.pool) <= slot ? n : end) = middle;
    }
    if (p.sequences == 0) return;
    first = offset_at(p.cu_seqlens_k, n, p.keys);
    keys = offset_at(p.cu_seqlens_k, n + 1, p.keys) - first;
  }
  int64_t const begin = (slot - first_slot(first, p.pool)) * p.pool;
  if (begin < 0 || begin + p.pool > keys) return;
  auto const* const k = static_cast<T const*>(p.k.data) + row * p.k.batch + (first + begin) * p.k.token;
  float const factor = 1.f / static_cast<float>(p.pool);
  for (int64_t d = threadIdx.x; d < p.dim; d += kMeanThreads) {
    float sum = 0.f;
#pragma unroll 16
    for (int64_t s = 0; s < p.pool; ++s) sum += to_float(k[s * p.k.token + d]) * factor;
    means[(row * slots + slot) * p.dim + d] = from_float<T>(sum);
  }
}

// What one head has of a score.
__device__ inline float head_score(IndexerParams const& p, float dot, float weight) {
  float const x = dot * p.scale;
  return (p.relu && x < 0.f ? 0.f : x) * weight;  // NaN stays
}

// One query against keys. kDim = 0: any dtype, dim and number of heads; the query is in shared memory.
template <class T, int kDim, int kHeadTiles>
struct Scorer;

template <class T>
struct Scorer<T, 0, 0> {
  float const *q, *weights;  // [HI, DI], [HI]
  bool aligned;

  static __host__ __device__ int64_t floats(IndexerParams const& p) {
    return ceil_div(p.heads * (p.dim + 1), 4) * 4;
  }

  __device__ Scorer(IndexerParams const& p, T const* query, float const* w, float* shared, bool aligned)
      : q(shared), weights(shared + p.heads * p.dim), aligned(aligned) {
    int const dim = static_cast<int>(p.dim), heads = static_cast<int>(p.heads);
    for (int i = threadIdx.x; i < heads * dim; i += kPooledThreads) {
      shared[i] = to_float(query[i / dim * p.q.head + i % dim]);
    }
    for (int j = threadIdx.x; j < heads; j += kPooledThreads) {
      shared[heads * dim + j] = w == nullptr ? 1.f : w[j * p.weights.head];
    }
    __syncthreads();
  }

  // out[c] = score of key row_of(c), c < count.
  template <class RowOf>
  __device__ void score(IndexerParams const& p, T const* keys, int64_t stride, uint32_t count,
                        RowOf const& row_of, float* out) const {
    int const dim = static_cast<int>(p.dim), heads = static_cast<int>(p.heads);
    for (uint32_t c = threadIdx.x; c < count; c += kPooledThreads) {
      T const* const key = keys + row_of(c) * stride;
      float total = 0.f;
      for (int j = 0; j < heads; j += 4) {
        float acc[4] = {};
        for (int d = 0; d < dim; d += 4) {
          float4 const x = load4(key + d, aligned);
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            if (j + h >= heads) continue;
            float4 const y = *reinterpret_cast<float4 const*>(q + (j + h) * dim + d);
            acc[h] = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, acc[h]))));
          }
        }
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          if (j + h < heads) total += head_score(p, acc[h], weights[j + h]);
        }
      }
      out[c] = total;
    }
  }
};

// With mma.sync: 16 keys are the rows of a product, 8 heads the columns of each of kHeadTiles. Of every 32
// elements of a row lane l has the 8 from 8 (l % 4) on, of keys and query alike, so that it reads 16 bytes.
template <class T, int kDim, int kHeadTiles>
struct Scorer {
  static constexpr int kChunks = kDim / 32;
  uint4 q[kHeadTiles][kChunks];
  float weights[kHeadTiles][2];

  static __host__ __device__ int64_t floats(IndexerParams const&) { return 0; }

  __device__ Scorer(IndexerParams const& p, T const* query, float const* w, float*, bool) {
    int const lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kHeadTiles; ++n) {
      int const row = 8 * n + lane / 4;
#pragma unroll
      for (int e = 0; e < kChunks; ++e) {
        T const* const at = query + row * p.q.head + 32 * e + 8 * (lane % 4);
        q[n][e] = row < p.heads ? *reinterpret_cast<uint4 const*>(at) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int const head = 8 * n + 2 * (lane % 4) + i;
        weights[n][i] = head >= p.heads ? 0.f : w == nullptr ? 1.f : w[head * p.weights.head];
      }
    }
  }

  // out[c] = score of key row_of(c), c < count; of 16 positions from a multiple of 16 on the rows are
  // successive.
  template <class RowOf>
  __device__ void score(IndexerParams const& p, T const* keys, int64_t stride, uint32_t count,
                        RowOf const& row_of, float* out) const {
    constexpr uint32_t kStep = kPooledThreads / 32 * 16;
    int const lane = threadIdx.x % 32;
    uint4 next[2][kChunks];
    auto const fetch = [&](uint32_t tile) {
      if (tile >= count) return;
      int64_t const row = row_of(tile);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t const i = min(static_cast<uint32_t>(lane / 4 + 8 * r), count - 1 - tile);
        T const* const key = keys + (row + i) * stride + 8 * (lane % 4);
#pragma unroll
        for (int e = 0; e < kChunks; ++e) next[r][e] = *reinterpret_cast<uint4 const*>(key + 32 * e);
      }
    };
    uint32_t tile = threadIdx.x / 32 * 16;
    fetch(tile);
    for (; tile < count; tile += kStep) {
      uint4 k[2][kChunks];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int e = 0; e < kChunks; ++e) k[r][e] = next[r][e];
      }
      fetch(tile + kStep);
      float total[2] = {};
#pragma unroll
      for (int n = 0; n < kHeadTiles; ++n) {
        float acc[4] = {};
#pragma unroll
        for (int e = 0; e < kChunks; ++e) {
          mma<T>(acc, {k[0][e].x, k[1][e].x, k[0][e].y, k[1][e].y}, q[n][e].x, q[n][e].y);
          mma<T>(acc, {k[0][e].z, k[1][e].z, k[0][e].w, k[1][e].w}, q[n][e].z, q[n][e].w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // 0 times infinity of a head that is not there would be NaN
          bool const present = 8 * n + 2 * (lane % 4) + i % 2 < p.heads;
          if (present) total[i / 2] += head_score(p, acc[i], weights[n][i % 2]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        uint32_t const c = tile + lane / 4 + 8 * r;
        if (lane % 4 == r && c < count) out[c] = total[r];
      }
    }
  }
};

struct alignas(16) BestShared {
  uint32_t bins[kPooledBins];
  uint32_t warps[kPooledThreads / 32];
  uint32_t bin, above;
};

// f(position, place) for the best of row[0, count), at most `wanted`, place after place: of equals the first,
// NaN never. Returns how many. The row is in shared memory, or was written by this block.
template <class F>
__device__ uint32_t best(float const* row, uint32_t count, uint32_t wanted, BestShared& shared, F const& f) {
  constexpr uint32_t kEach = 4;
  // As in select_row.
  uint32_t prefix = 0;
  bool all = count <= wanted;
  for (int digit = 0; digit < 3 && !all; ++digit) {
    int const shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, size = digit == 2 ? 10 : 11;
    for (int i = threadIdx.x; i < kPooledBins; i += kPooledThreads) shared.bins[i] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += kPooledThreads) {
      uint32_t const key = order(row[i]);
      bool const candidate = key != 0 && (digit == 0 || key >> (shift + size) == prefix);
      if (candidate) atomicAdd(&shared.bins[key >> shift & ((1u << size) - 1)], 1u);
    }
    __syncthreads();
    uint32_t local[kThreadBins], sum = 0, total;  // bins from the best on
    int const first = kPooledBins - 1 - static_cast<int>(threadIdx.x) * kThreadBins;
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) sum += local[i] = shared.bins[first - i];
    uint32_t above = block_scan<kPooledThreads>(sum, shared.warps, &total);
    if (total < wanted) {  // some were NaN
      all = true;
      break;
    }
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) {
      if (above < wanted && above + local[i] >= wanted) {
        shared.bin = first - i;
        shared.above = above;
      }
      above += local[i];
    }
    __syncthreads();
    wanted -= shared.above;
    prefix = prefix << size | shared.bin;
  }
  if (all) prefix = wanted = 0;
  uint32_t written = 0, equals = 0;  // equals: met so far
  for (uint32_t base = 0; base < count; base += kPooledThreads * kEach) {
    uint32_t const at = base + threadIdx.x * kEach;
    uint32_t keys[kEach], mine = 0, total;  // equal << 16 | better
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) {
      keys[i] = at + i < count ? order(row[at + i]) : 0;
      mine += (keys[i] > prefix) + (keys[i] == prefix ? 1u << 16 : 0);
    }
    uint32_t const before = block_scan<kPooledThreads>(mine, shared.warps, &total);
    uint32_t const left = wanted - min(equals, wanted);
    uint32_t rank = equals + (before >> 16), place = written + (before & 0xffff) + min(before >> 16, left);
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) {
      bool const chosen = keys[i] > prefix || (keys[i] == prefix && rank < wanted);
      rank += keys[i] == prefix;
      if (chosen) f(at + i, place++);
    }
    written += (total & 0xffff) + min(total >> 16, left);
    equals += total >> 16;
  }
  return written;
}

template <class T, int kDim, int kHeadTiles>
__global__ void __launch_bounds__(kPooledThreads, 2)
    search_query(IndexerParams p, PooledRows rows, T const* means, bool aligned) {
  extern __shared__ __align__(16) unsigned char bytes[];
  auto& shared = *reinterpret_cast<BestShared*>(bytes);
  auto* const floats = reinterpret_cast<float*>(bytes + sizeof(BestShared));
  int64_t const query = rows.first + blockIdx.x, batch = query / p.tokens, token = query % p.tokens;
  int32_t* const out = p.indices + query * p.topk;
  Sight const s = sight(p, batch, token);
  auto const* const w = static_cast<float const*>(p.weights.data);
  Scorer<T, kDim, kHeadTiles> const scorer(
      p, static_cast<T const*>(p.q.data) + batch * p.q.batch + token * p.q.token,
      w == nullptr ? w : w + batch * p.weights.batch + token * p.weights.token, floats, aligned);
  float* const scores =
      rows.scores == nullptr ? floats + scorer.floats(p) : rows.scores + blockIdx.x * rows.stride;
  auto* const blocks = reinterpret_cast<int32_t*>(scores + rows.count);

  uint32_t const pool = static_cast<uint32_t>(p.pool), count = static_cast<uint32_t>(s.count);
  uint32_t const newest = count == 0 ? 0 : (count - 1) / pool;
  uint32_t const older = static_cast<uint32_t>(min(p.blocks, int64_t{newest}));
  if (older < newest) {
    int64_t const slot = batch * rows.slots + first_slot(s.first, p.pool);
    scorer.score(p, means + slot * p.dim, p.dim, newest, [](uint32_t c) { return int64_t{c}; }, scores);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < newest; i += kPooledThreads) {
      if (scores[i] != scores[i]) scores[i] = -INFINITY;
    }
    __syncthreads();
    best(scores, newest, older, shared, [&](uint32_t block, uint32_t place) { blocks[place] = block; });
  } else {
    for (uint32_t i = threadIdx.x; i < newest; i += kPooledThreads) blocks[i] = i;
  }
  if (threadIdx.x == 0) blocks[older] = newest;
  __syncthreads();

  auto const key_of = [&](uint32_t c) { return int64_t{blocks[c / pool]} * pool + c % pool; };
  auto const* const keys = static_cast<T const*>(p.k.data) + batch * p.k.batch + s.first * p.k.token;
  uint32_t const eligible = count - (newest - older) * pool;
  scorer.score(p, keys, p.k.token, eligible, key_of, scores);
  __syncthreads();
  uint32_t const wanted = static_cast<uint32_t>(min(p.topk, int64_t{eligible}));
  uint32_t const chosen = best(scores, eligible, wanted, shared, [&](uint32_t c, uint32_t place) {
    out[place] = static_cast<int32_t>(key_of(c));
  });
  for (int64_t i = chosen + threadIdx.x; i < p.topk; i += kPooledThreads) out[i] = -1;
}

}  // namespace lt2::dsa::portable
