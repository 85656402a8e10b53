// Decode attention bound by reading the caches once. An item is the queries of a unit and key head, at most
// kRows, and a part of its keys; blocks take items in turn. Inside an item every warp walks over
// tiles of kTile keys of its own, with copies for the next kStages - 1 tiles under way and a softmax of its
// own, so that no warp waits for another before the end of the item. Where a part ends does not depend on the
// length, the batch or the grid, so neither do the bits of a row.
#pragma once

#include "common/cuda/element.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/overlap.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/softmax.cuh"
#include "loop_state/cuda/portable/sight.cuh"

namespace lt2::loop_state::portable {

using namespace ::lt2::cuda;

inline constexpr int kSplitWarps = 4, kSplitThreads = kSplitWarps * kWarp;
inline constexpr int kRows = 16, kTile = 16, kStages = 3;
// Keys of a part. There are few by indices, and each is a place of its own in memory.
constexpr int part_keys(bool sparse) { return sparse ? 128 : 512; }
inline constexpr int kElements = 8;  // of 16 bytes
template <int kDim>
inline constexpr int kResident = kDim == 64 ? 3 : 2;  // blocks on a multiprocessor

// A row of kDim elements in shared memory as pieces of 16 bytes, of which 8 consecutive rows of one column
// lie in different banks.
template <int kDim>
__device__ __forceinline__ int piece_offset(int row, int piece) {
  int const swizzled = kDim % 64 == 0 ? piece ^ (row % 8) : piece ^ (row / 2 % 4);
  return (row * (kDim / kElements) + swizzled) * kElements;
}

template <class T, int kDim>
struct SplitShared {
  union {
    struct {
      T k[kTile * kDim], v[kTile * kDim];
    } stages[kSplitWarps][kStages];
    struct {
      float o[kSplitWarps][kRows][kDim + 8], top[kSplitWarps][kRows], sum[kSplitWarps][kRows];
    } join;
  };
  uint32_t valid[kSplitWarps][kStages];  // with indices: which keys of a tile are there
};

// Copies since the last group are one more group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// For all groups of this thread but the newest kGroups.
template <int kGroups>
__device__ __forceinline__ void wait_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

struct SplitCut {
  int64_t row_blocks, parts;  // of the queries of a unit and key head; of its keys, at most
  float* partial;             // [B, t, HQ, parts, D + 2]: highest score, sum, values; where parts > 1
};

// The parts that a unit has: at least one, for its zeros.
__device__ inline int64_t part_count(DecodeParams const& p, Sight const& sight) {
  int64_t const keys = p.indices == nullptr ? sight.keys : p.topk, part = part_keys(p.indices != nullptr);
  return max(int64_t{1}, (keys + part - 1) / part);
}

constexpr float kLog2E = 1.44269504f;

// acc [kRows x kDim] += a v, of rows only where `take` says so.
template <class T, int kDim, bool kAll>
__device__ __forceinline__ void add_values(float (&acc)[kDim / 8][4], uint32_t const (&a)[4], T const* v,
                                           bool take_low, bool take_high) {
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kDim / 8; n += 2) {
    uint32_t b[4];
    load_matrices_transposed(b, shared_address(v + piece_offset<kDim>(lane % 16, n + lane / 16)));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kAll) {
        mma<T>(acc[n + i], a, b[2 * i], b[2 * i + 1]);
      } else {
        float sum[4] = {acc[n + i][0], acc[n + i][1], acc[n + i][2], acc[n + i][3]};
        mma<T>(sum, a, b[2 * i], b[2 * i + 1]);
        if (take_low) acc[n + i][0] = sum[0], acc[n + i][1] = sum[1];
        if (take_high) acc[n + i][2] = sum[2], acc[n + i][3] = sum[3];
      }
    }
  }
}

// One warp's share of an item. Lane l has rows l / 4 and l / 4 + 8, as in mma.cuh.
template <class T, int kDim>
struct SplitWarp {
  float acc[kDim / 8][4];
  float top[2], sum[2];

  template <bool kSparse>
  __device__ __forceinline__ void run(DecodeParams const& p, SplitShared<T, kDim>& shared, Sight const& sight,
                                      int64_t unit, int head, int64_t first_query, int64_t begin,
                                      int64_t end) {
    constexpr int kPieces = kDim / kElements, kLoads = kTile * kPieces / kWarp;
    int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp,
              tokens = static_cast<int>(unit_tokens(p)), group = p.query_heads / p.heads;
    auto& stages = shared.stages[warp];

    uint32_t q[kDim / 16][4];
    int token[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int64_t const i = first_query + lane / 4 + 8 * r;
      bool const there = i < tokens * group;
      token[r] = there ? static_cast<int>(i / group) : 0;
      T const* const row = static_cast<T const*>(p.q) +
                           ((unit * tokens + token[r]) * p.query_heads + head * group + i % group) * kDim;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          q[k][r + 2 * half] =
              there ? *reinterpret_cast<uint32_t const*>(row + 16 * k + 8 * half + 2 * (lane % 4)) : 0;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = 0.f;
    }
    top[0] = top[1] = -INFINITY;
    sum[0] = sum[1] = 0.f;
    float const scale = p.scale * kLog2E;

    T const *const k_cache = cached<T>(p.k, sight, head), *const v_cache = cached<T>(p.v, sight, head);
    int32_t const* const list = p.indices + unit * p.topk;
    auto const tile_begin = [&](int i) { return begin + (int64_t{i} * kSplitWarps + warp) * kTile; };
    int const tiles = static_cast<int>(
        end <= tile_begin(0) ? 0 : (end - tile_begin(0) + kSplitWarps * kTile - 1) / (kSplitWarps * kTile));
    // With indices: the key of row lane % 16 of a tile, -1 for none.
    auto const entry = [&](int i) {
      int64_t const j = tile_begin(i) + lane % kTile;
      int const key = i < tiles && j < end ? list[j] : -1;
      return key < sight.keys ? key : -1;
    };
    int next_key = kSparse ? entry(0) : 0;
    auto const fetch = [&](int i) {
      if (i < tiles) {
        auto& stage = stages[i % kStages];
        int const key_of_lane = next_key;
        if (kSparse) {
          next_key = entry(i + 1);
          uint32_t const valid = __ballot_sync(0xffffffffu, key_of_lane >= 0);
          if (lane == 0) shared.valid[warp][i % kStages] = valid;
        }
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          int const row = (j * kWarp + lane) / kPieces, piece = (j * kWarp + lane) % kPieces;
          int64_t key = tile_begin(i) + row;
          bool present = key < end;
          if (kSparse) {
            key = __shfl_sync(0xffffffffu, key_of_lane, row);
            present = key >= 0;
          }
          if (!present) key = 0;
          int const to = piece_offset<kDim>(row, piece);
          copy_16(stage.k + to, k_cache + key * p.k.token + piece * kElements, present);
          copy_16(stage.v + to, v_cache + key * p.v.token + piece * kElements, present);
        }
      }
      commit_copies();
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(i);
    for (int i = 0; i < tiles; ++i) {
      wait_copies_but<kStages - 2>();
      __syncwarp();  // what all lanes copied is here, and the stage that fetch() fills is read
      fetch(i + kStages - 1);
      auto& stage = stages[i % kStages];
      float s[2][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        uint32_t b[4];
        load_matrices(
            b, shared_address(stage.k + piece_offset<kDim>(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2)));
        mma<T>(s[0], q[k], b[0], b[1]);
        mma<T>(s[1], q[k], b[2], b[3]);
      }
      int64_t const first = tile_begin(i);
      uint32_t const valid = kSparse ? shared.valid[warp][i % kStages] : 0;
      uint32_t a[4];
      float decay[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Keys of the tile that the row sees, those of its token at the end.
        int64_t const visible = sight.keys - tokens + token[r] + 1 - first;
        float highest = top[r];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int const key = 8 * n + 2 * (lane % 4) + e;
            float& score = s[n][2 * r + e];
            bool const seen = kSparse ? valid >> key & 1 : key < visible;
            score = seen ? score * scale : -INFINITY;
            highest = fmaxf(highest, score);
          }
        }
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        float const base = finite_or_zero(highest);
        decay[r] = exp2f(top[r] - base);
        top[r] = highest;
        float weight[2][2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) weight[n][e] = exp2f(s[n][2 * r + e] - base);
          a[r + 2 * n] = pack<T>(weight[n][0], weight[n][1]);
        }
        sum[r] = sum[r] * decay[r] + ((weight[0][0] + weight[0][1]) + (weight[1][0] + weight[1][1]));
      }
      if (__any_sync(0xffffffffu, decay[0] != 1.f || decay[1] != 1.f)) {
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          acc[n][0] *= decay[0], acc[n][1] *= decay[0];
          acc[n][2] *= decay[1], acc[n][3] *= decay[1];
        }
      }
      int64_t const common = sight.keys - tokens + 1;  // keys that every token sees
      if (kSparse || first + kTile <= common || tokens == 1) {
        add_values<T, kDim, true>(acc, a, stage.v, true, true);
      } else {
        // Values that a token does not see must not meet its zero weights: they may be NaN.
        for (int t = tokens - 1; t >= 0; --t) {
          int64_t const hidden = common + t - first;
          if (hidden >= 0 && hidden < kTile && lane < kPieces) {
            *reinterpret_cast<uint4*>(stage.v + piece_offset<kDim>(static_cast<int>(hidden), lane)) = {};
          }
          __syncwarp();
          add_values<T, kDim, false>(acc, a, stage.v, token[0] == t, token[1] == t);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    }
  }
};

template <class T, int kDim, bool kSparse>
__global__ void __launch_bounds__(kSplitThreads, kResident<kDim>)
    split_kernel(DecodeParams const p, SplitCut const cut) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<SplitShared<T, kDim>*>(memory);
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t const tokens = unit_tokens(p), group = p.query_heads / p.heads, queries = tokens * group;
  wait_for_previous_kernel();
  let_next_kernel_start();
  int64_t item = blockIdx.x;  // of the units from `unit` on
  for (int64_t unit = 0; unit < unit_count(p); ++unit) {
    Sight const sight(p, unit);
    int64_t const parts = part_count(p, sight), items = parts * p.heads * cut.row_blocks;
    for (; item < items; item += gridDim.x) {
      int64_t const first_query = item % cut.row_blocks * kRows, part = item / cut.row_blocks / p.heads;
      int const head = static_cast<int>(item / cut.row_blocks % p.heads);
      constexpr int kPart = part_keys(kSparse);
      int64_t const begin = part * kPart,
                    end = min(begin + kPart, kSparse ? (sight.keys > 0 ? p.topk : 0) : sight.keys);
      SplitWarp<T, kDim> mine;
      mine.template run<kSparse>(p, shared, sight, unit, head, first_query, begin, end);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int const row = lane / 4 + 8 * r;
        if (lane % 4 == 0) shared.join.top[warp][row] = mine.top[r], shared.join.sum[warp][row] = mine.sum[r];
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          *reinterpret_cast<float2*>(&shared.join.o[warp][row][8 * n + 2 * (lane % 4)]) = {
              mine.acc[n][2 * r], mine.acc[n][2 * r + 1]};
        }
      }
      __syncthreads();
      int const rows = static_cast<int>(min(int64_t{kRows}, queries - first_query));
      for (int e = threadIdx.x; e < rows * kDim; e += kSplitThreads) {
        int const row = e / kDim, d = e % kDim;
        float highest = -INFINITY, total = 0.f, value = 0.f;
#pragma unroll
        for (int w = 0; w < kSplitWarps; ++w) highest = fmaxf(highest, shared.join.top[w][row]);
#pragma unroll
        for (int w = 0; w < kSplitWarps; ++w) {
          float const weight = exp2f(shared.join.top[w][row] - finite_or_zero(highest));
          total += weight * shared.join.sum[w][row];
          value += weight * shared.join.o[w][row][d];
        }
        int64_t const i = first_query + row;
        int64_t const query = (unit * tokens + i / group) * p.query_heads + head * group + i % group;
        if (parts == 1) {
          static_cast<T*>(p.o)[query * kDim + d] = from_float<T>(total == 0.f ? 0.f : value / total);
        } else {
          float* const partial = cut.partial + (query * cut.parts + part) * (kDim + 2);
          partial[2 + d] = value;
          if (d == 0) partial[0] = highest, partial[1] = total;
        }
      }
      __syncthreads();
    }
    item -= items;
  }
}

// o of the queries of units of several parts; a block of kDim threads a query.
template <class T, int kDim>
__global__ void __launch_bounds__(kDim) join_parts(DecodeParams const p, SplitCut const cut) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int64_t const query = blockIdx.x, unit = query / p.query_heads / unit_tokens(p);
  int const parts = static_cast<int>(part_count(p, Sight(p, unit)));
  if (parts == 1) return;
  float const* const partial = cut.partial + query * cut.parts * (kDim + 2);
  float highest = -INFINITY, total = 0.f, value = 0.f;
  for (int s = threadIdx.x % kWarp; s < parts; s += kWarp) highest = fmaxf(highest, partial[s * (kDim + 2)]);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, distance));
  float const base = finite_or_zero(highest);
#pragma unroll 8
  for (int s = 0; s < parts; ++s) {
    float const weight = exp2f(partial[s * (kDim + 2)] - base);
    total += weight * partial[s * (kDim + 2) + 1];
    value += weight * partial[s * (kDim + 2) + 2 + threadIdx.x];
  }
  static_cast<T*>(p.o)[query * kDim + threadIdx.x] = from_float<T>(total == 0.f ? 0.f : value / total);
}

}  // namespace lt2::loop_state::portable
