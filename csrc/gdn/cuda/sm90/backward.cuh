// The backward pass of the chunked form in three launches: prepare (backward_prepare.cuh, all chunks at
// once), scan (backward_scan.cuh, the state forward and its gradient in reverse, chunk after chunk),
// gradients (backward_gradients.cuh, all chunks at once). This file: what they hand to each other.
//
// Of a chunk, with L_ij = E_ij kn_i kn_j k_i.k_j below the diagonal and N = L (I + diag(b) L)^-1, strictly
// lower as well,
//   r = Y - N (b o Y), Y = V - e^G K S         what token i finds to be missing;  U = b o r is what it writes
//   rho = dU - N^T (b o dU)                    the loss's gradient by that write, dU without later tokens of
//   the chunk dV = b o rho      dbeta = r . rho
// N instead of T~ = diag(b) - diag(b) N diag(b): r and rho come without a division by b, and the part of them
// that is not a product stays in fp32.
#pragma once

#include "gdn/cuda/sm90/forward.cuh"

namespace lt2::gdn::sm90::backward_pass {

inline constexpr int kChunk = kTileSide;

// d [64 x 2 kCount] = A B^T over kKeyDim, both k_major tiles; B's rows from a multiple of 8 on.
template <class T, int kKeyDim, int kCount>
__device__ __forceinline__ void multiply_rows(float (&d)[kCount], char const* a, char const* b) {
  uint64_t const da = k_major(a), db = k_major(b);
  pin(d);
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kKeyDim / 16; ++k) wgmma<T, 2 * kCount>(d, da + k_step(k), db + k_step(k), k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
}
// One value per token of the chunk.
struct alignas(16) ChunkScalars {
  float log2_decay[kChunk];              // G / ln 2
  float strength[kChunk];                // b
  float k_norm[kChunk], q_norm[kChunk];  // kn, qn
  float k_in[kChunk];                    // e^G kn: what k sees of the state before the chunk
  float q_in[kChunk];                    // scale e^G qn
  float k_out[kChunk];                   // e^(G_last - G) kn: what is left of a write at the end of the chunk
  float decay;                           // e^(G_last)
};

// Prepared of a chunk and value head. Tiles are as wgmma reads them: copies are contiguous.
struct ChunkRecord {
  alignas(
      1024) char negative_n[2 * kTileBytes];  // -N as a pair of bf16 that add up to it: high, then low parts
  char scores[kTileBytes];                    // P, in T
  ChunkScalars scalars;
};
inline constexpr uint32_t kScalarBytes = sizeof(ChunkScalars), kRecordBytes = 3 * kTileBytes + kScalarBytes;

__host__ __device__ constexpr int key_tiles(int key_dim) { return (key_dim + kTileSide - 1) / kTileSide; }

// What the scans leave of a chunk, value head and 64 value columns: fp16 times a unit (a power of two),
// whatever T is. The gradients of decays and writing strengths are sums in which much cancels, and bf16 is
// not enough for what they are of. rho lies where dV will be.
template <int kKeyTiles>
struct ForwardRecord {
  char state[kKeyTiles * kTileBytes];  // S^T before the chunk: tiles of 64 value rows
  char r[kTileBytes];                  // [token, value]
};
template <int kKeyTiles>
struct ReverseRecord {
  char dstate[kKeyTiles * kTileBytes];  // dS^T after the chunk
};
struct alignas(16) ForwardUnits {  // copied by 16 bytes
  float state, r, zeros[2];
};
struct alignas(16) ReverseUnits {
  float dstate, rho, dout, zero;
};

// All of it in units of chunk numbers x value heads: chunk number c and head h have index c HV + h.
struct BackwardWorkspace {
  char* records;                // [index] ChunkRecord
  char* forward;                // [index, V / 64] ForwardRecord
  char* reverse;                // [index, V / 64] ReverseRecord
  ForwardUnits* forward_units;  // [index, V / 64]
  ReverseUnits* reverse_units;  // [index, V / 64]
  float* partial;               // [block of gradients, 2, 64, K padded]: sums of dq and dk over value heads

  // Of gradients that follow the scan: how many pieces of work are taken; then [2, N, HV, V / 64], how many
  // chunks the scan forward, and in reverse, has left. Zeroed by prepare_kernel.
  int* progress;

  __device__ ChunkRecord* record(int64_t index) const {
    return reinterpret_cast<ChunkRecord*>(records) + index;
  }
};

// Of the chunks done in one direction: `state` is in [N, HV].
__device__ inline int64_t progress_index(Inputs const& p, bool reverse, int64_t state, int slice) {
  return 1 + ((reverse ? p.sequences * p.value_heads : 0) + state) * (p.value_dim / kTileSide) + slice;
}

inline BackwardWorkspace backward_layout(BackwardParams const& p, char* base, int64_t* bytes) {
  char* next = base;
  auto const take = [&](int64_t size) {
    char* const piece = next;
    next += size;
    return piece;
  };
  int64_t const chunks = portable::chunk_numbers(p) * p.value_heads, tiles = key_tiles(p.key_dim);
  int64_t const slices = chunks * (p.value_dim / kTileSide);
  BackwardWorkspace w;
  w.records = take(chunks * sizeof(ChunkRecord));
  w.forward = take(slices * (tiles + 1) * kTileBytes);
  w.reverse = take(slices * tiles * kTileBytes);
  w.forward_units = reinterpret_cast<ForwardUnits*>(take(slices * sizeof(ForwardUnits)));
  w.reverse_units = reinterpret_cast<ReverseUnits*>(take(slices * sizeof(ReverseUnits)));
  w.partial = nullptr;
  if (p.value_heads > p.heads) {
    w.partial =
        reinterpret_cast<float*>(take(kMultiprocessors * tiles * 2 * kTileSide * kTileSide * sizeof(float)));
  }
  w.progress = reinterpret_cast<int*>(take((1 + 2 * p.sequences * p.value_heads * (p.value_dim / kTileSide)) *
                                               int64_t{sizeof(int)} / 16 * 16 +
                                           16));
  *bytes = next - base;
  return w;
}

struct BackwardLaunch {
  BackwardParams p;
  BackwardWorkspace w;
  int slice_groups;      // blocks of the scan that share a sequence and value head
  int chunk_numbers;     // fits: prepare_kernel has a block for each
  unsigned first_block;  // of those that compute gradients
};

struct BackwardMaps {
  CUtensorMap q, k, v, dout, dv;
};

// Zeroes what a tensor map loaded of the rows that follow the sequence. Threads of one warpgroup.
template <int kTiles>
__device__ __forceinline__ void clear_tail(char* tiles, int count, int thread) {
  if (thread >= count && thread < kTileSide) clear_row<kTiles>(tiles, thread);
  fence_async_shared();
}

template <int kTiles>
__device__ __forceinline__ void request_tiles(char* tiles, CUtensorMap const& map, int element, int head,
                                              TileTokens const& c, Barrier& loaded) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    load_tile(tiles + tile * kTileBytes, map, element + tile * kTileSide, head, c.begin, c.row, loaded);
  }
}

template <int kCount>
__device__ __forceinline__ void scale_all(float (&x)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= factor;
}

// Of a power of two, without the call that a division is.
__device__ __forceinline__ float inverse(float power) {
  return __int_as_float((254 << 23) - __float_as_int(power));
}

// A power of two that brings what is as large as `largest` (bits) below 2^15, and its inverse.
struct Scale {
  float factor, unit;

  __device__ explicit Scale(uint32_t largest) {
    int const exponent = largest == 0 ? 127 : min(268 - static_cast<int>(largest >> 23), 253);
    factor = __int_as_float(exponent << 23);
    unit = inverse(factor);
  }
};

template <int kCount>
__device__ __forceinline__ uint32_t largest_of(float const (&x)[kCount]) {
  float largest[2] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest[i % 2] = fmaxf(largest[i % 2], fabsf(x[i]));
  return __float_as_uint(fmaxf(largest[0], largest[1]));
}

__device__ __forceinline__ float2 pair_at(float const* x, int i) {
  return *reinterpret_cast<float2 const*>(x + i);
}

__device__ inline TileTokens chunk_tokens(portable::Chunk const& c) {
  return {static_cast<int>(c.row), static_cast<int>(c.begin), c.tokens};
}

// Where lane `lane` finds its row of the matrices of accumulators whose columns begin at `first` in a tile;
// 8 n columns further it is at address ^ n << 4, n even.
__device__ __forceinline__ uint32_t row_address(char const* tile, int first, int warp, int lane) {
  return shared_address(tile) + tile_offset(warp * 16 + lane % 16, first / 8 + lane / 16);
}

// Rows of accumulators to columns [first, first + kN) of a tile.
template <class T, int kN>
__device__ __forceinline__ void put_rows(float const (&x)[kN / 2], char* tile, int first, int warp,
                                         int lane) {
  uint32_t const address = row_address(tile, first, warp, lane);
#pragma unroll
  for (int n = 0; n < kN / 8; n += 2) {
    store_matrices(address ^ n << 4, pack<T>(x[4 * n], x[4 * n + 1]), pack<T>(x[4 * n + 2], x[4 * n + 3]),
                   pack<T>(x[4 * n + 4], x[4 * n + 5]), pack<T>(x[4 * n + 6], x[4 * n + 7]));
  }
}

// Tile [tokens x 64 values] <- its transpose, packed, each warp the 16 values that it owns.
__device__ __forceinline__ void stage_values(uint32_t const (&x)[kChunk / 4], char* tile, int warp,
                                             int lane) {
  uint32_t const address = shared_address(tile);
#pragma unroll
  for (int n = 0; n < kChunk / 8; n += 2) {
    store_matrices_transposed(address + value_offset(8 * n, warp, lane), x[2 * n], x[2 * n + 1], x[2 * n + 2],
                              x[2 * n + 3]);
  }
}

// By adding to the pointer, so that the compiler still knows that it is shared memory.
template <class Shared>
__device__ __forceinline__ Shared& aligned_shared(char* dynamic) {
  return *reinterpret_cast<Shared*>(dynamic + (1023 & -shared_address(dynamic)));
}

}  // namespace lt2::gdn::sm90::backward_pass
