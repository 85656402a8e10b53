// The selection as bits, for kernels that go through tiles of 128 queries and 128 keys: who sees whom is in
// them, whatever documents and positions there are.
#pragma once

#include "dsa/cuda/portable/rows.cuh"

namespace lt2::dsa::sm90 {

using namespace cuda;

inline constexpr int kTile = 128;
inline constexpr int kMaskBytes = kTile * sizeof(uint4);
// Tiles of keys or queries that a block can list.
inline constexpr int kMaxTiles = 1024;

struct Masks {
  int64_t query_tiles, key_tiles;
  // [B, query tiles, key tiles, 128 queries]. Key 8 n + 2 t + e of the tile is bit 2 n + e of word t: a
  // thread has fragments of the keys of one word.
  uint4* bits;
  uint8_t* used;  // [B, query tiles, key tiles]: whether any bit is set
  // Not zero: the result has to be computed by gathering. A key that a query names twice is not in the bits,
  // and products with zero let infinities and NaN of a key through to queries that do not select it.
  int* redo;
  int const* condition;  // not null: nothing is computed where it is zero

  __host__ __device__ int64_t tile(int64_t row, int64_t query_tile, int64_t key_tile) const {
    return (row * query_tiles + query_tile) * key_tiles + key_tile;
  }
};

// What is not zero among flags[i * stride], i < count, in ascending order; by one warp. Returns how many.
__device__ inline int list_used(uint8_t const* flags, int64_t stride, int count, uint16_t* list) {
  int const lane = threadIdx.x % kWarp;
  int found = 0;
  for (int first = 0; first < count; first += kWarp) {
    bool const is_used = first + lane < count && flags[(first + lane) * stride] != 0;
    uint32_t const ballot = __ballot_sync(0xffffffffu, is_used);
    if (is_used) list[found + __popc(ballot & ((1u << lane) - 1))] = static_cast<uint16_t>(first + lane);
    found += __popc(ballot);
  }
  return found;
}

}  // namespace lt2::dsa::sm90
