// First launch of the backward pass: the record of every chunk and value head. One warpgroup each.
#pragma once

#include "gdn/cuda/sm90/backward.cuh"

namespace lt2::gdn::sm90::backward_pass {

inline constexpr int kInverseRow = 68;  // floats; 4 more than 64, against bank conflicts
inline constexpr int kPrepareBarrier = 1;

template <class T_, int kKeyDim_>
struct PrepareTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_, kKeyTiles = key_tiles(kKeyDim);
  static constexpr int kThreads = kWarpgroup;

  // k and q; then, over k, the matrix of N and, over q's end, P.
  static constexpr int kOperandBytes = 2 * kKeyTiles * kTileBytes;
  static constexpr int kMatrixBytes = kChunk * kInverseRow * sizeof(float);
  static constexpr int kSpace =
      kOperandBytes > kMatrixBytes + kTileBytes ? kOperandBytes : kMatrixBytes + kTileBytes;
  static_assert(kSpace == kOperandBytes || kSpace - kTileBytes >= kOperandBytes);

  struct Shared {
    alignas(1024) char space[kSpace];
    char negative_n[2 * kTileBytes];
    ChunkScalars scalars;
    Barrier loaded;
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
};

// log2_decay and strength, by one warp; tokens that are not there neither decay nor write.
__device__ inline void scan_gates(Inputs const& p, TileTokens const& c, int head, int lane, ChunkScalars& s) {
  float g[2], b[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int const i = 2 * lane + j;
    bool const there = i < c.count;
    float const x = there ? portable::log_decay(p, c.row, c.begin + i, head) : 0.f;
    g[j] = x < kLeastLog2Decay / kLog2E ? kLeastLog2Decay : x * kLog2E;
    b[j] = there ? portable::write_strength(p, c.row, c.begin + i, head) : 0.f;
  }
  float sum = g[0] + g[1];
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float const before = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += before;
  }
  float const start = __shfl_up_sync(0xffffffffu, sum, 1);
  s.log2_decay[2 * lane] = (lane > 0 ? start : 0.f) + g[0];
  s.log2_decay[2 * lane + 1] = sum;
  s.strength[2 * lane] = b[0];
  s.strength[2 * lane + 1] = b[1];
}

// L from the accumulators of K K^T, without the gate.
__device__ inline void store_gram(float const (&kk)[kChunk / 2], float const* k_norm, float* m, int warp,
                                  int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = warp * 16 + lane / 4 + 8 * half;
    float const factor = k_norm[row];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      int const col = 8 * n + 2 * (lane % 4);
      float2 const norm = *reinterpret_cast<float2 const*>(k_norm + col);
      *reinterpret_cast<float2*>(m + row * kInverseRow + col) =
          float2{col < row ? factor * norm.x * kk[4 * n + 2 * half] : 0.f,
                 col + 1 < row ? factor * norm.y * kk[4 * n + 2 * half + 1] : 0.f};
    }
  }
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// d [16 x 8] += a [16 x 8] b [8 x 8].
__device__ __forceinline__ void mma_tf32(float (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Elements (row, column), (row, column + 1) of a warp's 16 x 16 accumulators.
template <class F>
__device__ __forceinline__ void for_block(int row, int col, int lane, F const& f) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      f(n, 2 * half, row + lane / 4 + 8 * half, col + 8 * n + 2 * (lane % 4));
  }
}

// d = rows `row`.. and columns `col`.. of a b, kSize x kSize with rows of kInverseRow floats, to nearly fp32:
// each factor as a sum of two tf32. With equal keys the sums telescope, and one tf32 is not enough.
template <int kSize>
__device__ inline void multiply_precisely(float (&d)[2][4], float const* a, float const* b, int row, int col,
                                          int lane) {
  int const g = lane / 4, t = lane % 4;
  auto const split = [](float x, uint32_t& high, uint32_t& low) {
    high = to_tf32(x);
    low = to_tf32(x - __uint_as_float(high));
  };
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < kSize; k += 8) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      split(a[(row + g + i % 2 * 8) * kInverseRow + k + t + i / 2 * 4], high[i], low[i]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        split(b[(k + t + 4 * i) * kInverseRow + col + g + 8 * n], b_high[i], b_low[i]);
      mma_tf32(d[n], low, b_high);
      mma_tf32(d[n], high, b_low);
      mma_tf32(d[n], high, b_high);
    }
  }
}

// The block of L below two diagonal blocks of kSize that are N already -> N's: M - N22 (b o M) with
// M = L21 - L21 (b o N11). The block right of N11 is scratch, zero afterwards. A warp does 16 x 16 of it.
template <int kSize, class F>
__device__ inline void join_blocks(float* m, float const* strength, int row, int col, int lane,
                                   F const& synchronize) {
  float* const below = m + kSize * kInverseRow;
  float* const right = m + kSize;
  auto const at = [](float* x, int r, int c) -> float2& {
    return *reinterpret_cast<float2*>(x + r * kInverseRow + c);
  };
  for_block(row, col, lane, [&](int, int, int r, int c) {
    float2 const n = at(m, r, c);
    at(right, r, c) = float2{strength[r] * n.x, strength[r] * n.y};
  });
  synchronize();
  float middle[2][4], product[2][4];
  multiply_precisely<kSize>(product, below, right, row, col, lane);
  for_block(row, col, lane, [&](int n, int i, int r, int c) {
    float2 const l = at(below, r, c);
    middle[n][i] = l.x - product[n][i];
    middle[n][i + 1] = l.y - product[n][i + 1];
  });
  synchronize();
  for_block(row, col, lane, [&](int n, int i, int r, int c) {
    float const b = strength[kSize + r];
    at(right, r, c) = float2{b * middle[n][i], b * middle[n][i + 1]};
  });
  synchronize();
  multiply_precisely<kSize>(product, below + kSize, right, row, col, lane);
  for_block(row, col, lane, [&](int n, int i, int r, int c) {
    at(below, r, c) = float2{middle[n][i] - product[n][i], middle[n][i + 1] - product[n][i + 1]};
  });
  synchronize();
  for_block(row, col, lane, [&](int, int, int r, int c) { at(right, r, c) = float2{}; });
  synchronize();
}

// In place: L (strictly lower, rows of kInverseRow floats) -> N = L - L diag(b) N. The diagonal blocks of 16
// by substitution in fp32, one column a lane; then blocks of 16 are joined to 32, and these to 64.
__device__ inline void substitute(float* m, float const* strength, int thread) {
  int const warp = thread / 32, lane = thread % 32;
  if (warp < 2) {
    int const block = 2 * warp + lane / 16, column = lane % 16;
    float* const diagonal = m + block * 16 * (kInverseRow + 1);
    float const b = strength[16 * block + column];
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      x[i] = diagonal[i * kInverseRow + column];
      diagonal[i * kInverseRow + column] = x[i] * b;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum[2] = {x[i], 0.f};
#pragma unroll
      for (int k = 0; k < i; k += 4) {
        float4 const a = *reinterpret_cast<float4 const*>(diagonal + i * kInverseRow + k);
        sum[0] -= a.x * x[k];
        if (k + 1 < i) sum[1] -= a.y * x[k + 1];
        if (k + 2 < i) sum[0] -= a.z * x[k + 2];
        if (k + 3 < i) sum[1] -= a.w * x[k + 3];
      }
      x[i] = sum[0] + sum[1];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) diagonal[i * kInverseRow + column] = x[i];
    __syncwarp();
    join_blocks<16>(m + warp * 32 * (kInverseRow + 1), strength + 32 * warp, 0, 0, lane,
                    [] { __syncwarp(); });
  }
  auto const synchronize = [] { named_barrier(kPrepareBarrier, kWarpgroup); };
  synchronize();
  join_blocks<32>(m, strength, warp / 2 * 16, warp % 2 * 16, lane, synchronize);
}

// -N with the gate, to k_major tiles: high parts, then low parts. In bf16 whatever T is: where much decays in
// a chunk, N and what it multiplies in reverse have the range of floats.
__device__ inline void store_negative(float const* m, ChunkScalars const& s, char* tiles, int thread) {
  int const row = thread % kChunk, first = thread / kChunk * 32;
  float const decay = s.log2_decay[row];
#pragma unroll
  for (int c = 0; c < 32; c += 8) {
    Split x[4];
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      int const col = first + c + 2 * j;
      float4 const n = *reinterpret_cast<float4 const*>(m + row * kInverseRow + col);
      float4 const g = *reinterpret_cast<float4 const*>(s.log2_decay + col);
      x[j] = split(col < row ? -exp2_fast(decay - g.x) * n.x : 0.f,
                   col + 1 < row ? -exp2_fast(decay - g.y) * n.y : 0.f);
      x[j + 1] = split(col + 2 < row ? -exp2_fast(decay - g.z) * n.z : 0.f,
                       col + 3 < row ? -exp2_fast(decay - g.w) * n.w : 0.f);
    }
    int const offset = tile_offset(row, (first + c) / 8);
    *reinterpret_cast<uint4*>(tiles + offset) = {x[0].high, x[1].high, x[2].high, x[3].high};
    *reinterpret_cast<uint4*>(tiles + kTileBytes + offset) = {x[0].low, x[1].low, x[2].low, x[3].low};
  }
}

// P from the accumulators of Q K^T, to a k_major tile.
template <class T>
__device__ void store_scores(float (&qk)[kChunk / 2], ChunkScalars const& s, float scale, char* tile,
                             int warp, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = warp * 16 + lane / 4 + 8 * half;
    float const factor = scale * s.q_norm[row], decay = s.log2_decay[row];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      int const col = 8 * n + 2 * (lane % 4);
      float2 const norm = pair_at(s.k_norm, col), g = pair_at(s.log2_decay, col);
      float& x = qk[4 * n + 2 * half];
      float& y = qk[4 * n + 2 * half + 1];
      x = col <= row ? factor * norm.x * exp2_fast(decay - g.x) * x : 0.f;
      y = col + 1 <= row ? factor * norm.y * exp2_fast(decay - g.y) * y : 0.f;
    }
  }
  put_rows<T, kChunk>(qk, tile, 0, warp, lane);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 4)
    prepare_kernel(__grid_constant__ Inputs const p, __grid_constant__ BackwardMaps const maps,
                   BackwardWorkspace const w) {
  using T = typename Traits::T;
  extern __shared__ char dynamic_shared[];
  auto& shared = aligned_shared<typename Traits::Shared>(dynamic_shared);
  int const thread = threadIdx.x, warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32;
  int const head = static_cast<int>(blockIdx.x % p.value_heads), qk_head = head / (p.value_heads / p.heads);
  portable::Chunk const chunk = portable::find_chunk(p, blockIdx.x / p.value_heads);
  // There are at least N HV blocks.
  int const slices = p.value_dim / kTileSide;
  int64_t const flags = 1 + 2 * p.sequences * p.value_heads * slices;
  for (int i = thread; i < 2 * slices + 1; i += Traits::kThreads) {
    int64_t const flag = int64_t{blockIdx.x} * (2 * slices + 1) + i;
    if (flag < flags) w.progress[flag] = 0;
  }
  if (chunk.tokens == 0) return;
  TileTokens const c = chunk_tokens(chunk);
  char* const k = shared.space;
  char* const q = shared.space + Traits::kOperandBytes / 2;
  char* const scores = shared.space + Traits::kSpace - kTileBytes;
  auto* const matrix = reinterpret_cast<float*>(shared.space);
  ChunkScalars& s = shared.scalars;

  if (thread == 0) {
    shared.loaded.init(1);
    fence_barrier_init();
    shared.loaded.arrive_expecting(Traits::kOperandBytes);
    request_tiles<Traits::kKeyTiles>(k, maps.k, 0, qk_head, c, shared.loaded);
    request_tiles<Traits::kKeyTiles>(q, maps.q, 0, qk_head, c, shared.loaded);
  }
  if (warp == 0) scan_gates(p, c, head, lane, s);
  __syncthreads();
  shared.loaded.wait(0);
  if (c.count < kChunk) {
    clear_tail<Traits::kKeyTiles>(k, c.count, thread);
    clear_tail<Traits::kKeyTiles>(q, c.count, thread);
    __syncthreads();
  }
  float const norm =
      p.qk_l2norm ? row_norm<T, Traits::kKeyTiles>(thread < kChunk ? k : q, thread % kChunk) : 1.f;
  float const decay = s.log2_decay[thread % kChunk], last = s.log2_decay[kChunk - 1];
  if (thread < kChunk) {
    s.k_norm[thread] = norm;
    s.k_in[thread] = exp2_fast(decay) * norm;
    s.k_out[thread] = exp2_fast(last - decay) * norm;
    if (thread == 0) s.decay = exp2_fast(last);
  } else {
    s.q_norm[thread - kChunk] = norm;
    s.q_in[thread - kChunk] = p.scale * exp2_fast(decay) * norm;
  }
  __syncthreads();

  float d[kChunk / 2];
  multiply_rows<T, Traits::kKeyDim>(d, q, k);
  __syncthreads();
  store_scores<T>(d, s, p.scale, scores, warp, lane);
  multiply_rows<T, Traits::kKeyDim>(d, k, k);
  __syncthreads();
  store_gram(d, s.k_norm, matrix, warp, lane);
  __syncthreads();
  substitute(matrix, s.strength, thread);
  store_negative(matrix, s, shared.negative_n, thread);
  fence_async_shared();
  __syncthreads();
  if (thread == 0) {
    ChunkRecord& record = *w.record(blockIdx.x);
    store_bytes(record.negative_n, shared.negative_n, sizeof(record.negative_n));
    store_bytes(record.scores, scores, kTileBytes);
    store_bytes(&record.scalars, &s, kScalarBytes);
    wait_stores_read();
  }
}

}  // namespace lt2::gdn::sm90::backward_pass
