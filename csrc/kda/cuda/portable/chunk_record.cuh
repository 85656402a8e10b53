// What the two launches of the chunked forward pass share: a chunk's operands, as they lie in memory.
#pragma once

#include "gdn/cuda/portable/inverse.cuh"
#include "kda/cuda/portable/problem.cuh"

namespace lt2::kda::portable {

inline constexpr int kChunkSteps = kChunk / 16;  // of the summed axis of a product over a chunk
// Blocks [8 x 16] of a lower triangle [64 x 64]: (rows 8 n .., columns 16 k ..) for k <= n / 2.
inline constexpr int kTriangleBlocks = kChunkSteps * (kChunkSteps + 1);
__host__ __device__ constexpr int triangle_block(int n, int k) { return (n / 2 + n % 2) * (n / 2 + 1) + k; }
// The same of an upper triangle, k >= n / 2.
__host__ __device__ constexpr int upper_block(int n, int k) {
  return triangle_block(kChunk / 8 - 1 - n, kChunkSteps - 1 - k);
}

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

// What is prepared of one chunk and value head, with the decays `head` from the start of the chunk to a token
// (included) and `tail` behind it to the end. Triangles are second operands of products: a lane's two
// registers of high parts, then those of low parts.
using Triangle = uint4[kTriangleBlocks][kWarp];

// The scans copy a range of it; without the delta rule, what only that has is not written and not copied.
template <class T, int kKeys>
struct alignas(128) ChunkRecord {
  static constexpr bool kBackward = false;
  Triangle inverse;                                                     // T~, for the delta rule
  T k_in[kChunk * kKeys];                                               // head o k, for the delta rule
  T q_in[kChunk * kKeys];                                               // scale head o q
  __nv_bfloat16 k_out_low[kChunk * kKeys], k_out_high[kChunk * kKeys];  // tail o k
  Triangle scores;                                                      // P
  float decay[kKeys];                                                   // of the whole chunk

  static __device__ int begin(bool delta) { return delta ? 0 : offsetof(ChunkRecord, q_in); }
  static __device__ int end() { return sizeof(ChunkRecord); }
};

// For the backward pass: its first scan reads what is before q_in, the second what is behind the inverse.
template <class T, int kKeys>
struct alignas(128) BackwardRecord {
  static constexpr bool kBackward = true;
  Triangle inverse;        // (I + A diag(b))^-1, gives R, for the delta rule
  T k_in[kChunk * kKeys];  // for the delta rule
  __nv_bfloat16 k_out_low[kChunk * kKeys], k_out_high[kChunk * kKeys];
  float decay[kKeys];
  alignas(128) float strength[kChunk];  // b
  alignas(128) T q_in[kChunk * kKeys];
  Triangle scores;              // P^T
  Triangle transposed_inverse;  // (I + diag(b) A)^-T, gives dU, for the delta rule

  static __device__ int begin(bool delta) { return delta ? 0 : offsetof(BackwardRecord, k_out_low); }
  static __device__ int end() { return offsetof(BackwardRecord, q_in); }
  static __device__ int second_begin(bool delta) {
    return delta ? offsetof(BackwardRecord, k_in) : offsetof(BackwardRecord, k_out_low);
  }
  static __device__ int second_end(bool delta) {
    return delta ? sizeof(BackwardRecord) : offsetof(BackwardRecord, transposed_inverse);
  }
};

}  // namespace lt2::kda::portable
