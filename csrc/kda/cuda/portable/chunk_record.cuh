// What the two launches of the chunked forward pass share: a chunk's operands, as they lie in memory.
#pragma once

#include "gdn/cuda/portable/inverse.cuh"
#include "kda/cuda/portable/problem.cuh"

namespace lt2::kda::portable {

inline constexpr int kChunkSteps = kChunk / 16;  // of the summed axis of a product over a chunk
// Blocks [8 x 16] of a lower triangle [64 x 64]: (rows 8 n .., columns 16 k ..) for k <= n / 2.
inline constexpr int kTriangleBlocks = kChunkSteps * (kChunkSteps + 1);
__host__ __device__ constexpr int triangle_block(int n, int k) { return (n / 2 + n % 2) * (n / 2 + 1) + k; }

// Rows of kKeys elements without padding; the pieces of 16 bytes of row r are permuted by r % 8, against bank
// conflicts.
template <int kKeys>
__device__ __forceinline__ int element_at(int row, int channel) {
  return row * kKeys + ((channel / 8) ^ (row % 8)) * 8 + channel % 8;
}

// Two elements as a pair of T that add up to them.
template <class T>
__device__ __forceinline__ Split split_as(float x, float y) {
  uint32_t const high = pack<T>(x, y);
  float2 const h = unpack<T>(high);
  return {high, pack<T>(x - h.x, y - h.y)};
}

// Of one chunk and value head. With the decays `head` from the start of the chunk to a token (included) and
// `tail` behind it to the end; T~ and P as second operands of products: a lane's two registers of high parts,
// then those of low parts.
template <class T, int kKeys>
struct alignas(128) ChunkRecord {
  T k_in[kChunk * kKeys];                  // head o k
  T q_in[kChunk * kKeys];                  // scale head o q
  __nv_bfloat16 k_out[2][kChunk * kKeys];  // tail o k, high and low parts
  uint4 inverse[kTriangleBlocks][kWarp], scores[kTriangleBlocks][kWarp];
  float decay[kKeys];  // of the whole chunk
};

}  // namespace lt2::kda::portable
