// What the queries of a tile select together: the keys in ascending order, and for each tile of 128 of them
// the bits of the queries, as in mask.cuh. A tile's rows are its queries with all heads of a key head.
#pragma once

#include "common/cuda/sm90/tma.cuh"
#include "dsa/cuda/sm90/mask.cuh"

namespace lt2::dsa::sm90 {

using namespace cuda::sm90;

struct Unions {
  int64_t tiles, capacity;  // of a batch row; keys of a tile at most, a multiple of 128
  int queries;              // of a tile
  int* sizes;               // [B, tiles]
  int32_t* keys;            // [B, tiles, capacity]
  uint4* bits;              // [B, tiles, capacity / 128, queries]
  // Null, or where to find a key in the lists: which of 32 keys each word has, and the rank of the first.
  uint2* words;        // [B, tiles, ceil(S / 32)]
  int64_t word_count;  // of a tile

  __host__ __device__ int64_t tile(int64_t row, int64_t tile) const { return row * tiles + tile; }
  // Of the queries for the i-th 128 keys.
  __host__ __device__ int64_t bits_of(int64_t tile, int64_t i) const {
    return (tile * (capacity / kTile) + i) * queries;
  }
};

// A warp copies 32 rows of kDim elements into rows `first`.. of a swizzled tile, kColumnBytes between its
// columns of 64 elements. Lane i has the number of row i of `rows`; negative: zeros.
template <int kDim, int kColumnBytes, int kUnroll = 4, class T>
__device__ __forceinline__ void gather_rows(char* tile, int first, T const* rows, int64_t stride, int own,
                                            int lane) {
  constexpr int kChunks = kDim / 8, kRows = kWarp / kChunks;  // of 16 bytes in a row, rows of a copy
  int const chunk = lane % kChunks;
  uint32_t const column = shared_address(tile) + chunk / 8 * kColumnBytes;
#pragma unroll kUnroll  // by the registers that a loader has
  for (int i = 0; i < kWarp / kRows; ++i) {
    int const row = i * kRows + lane / kChunks, number = __shfl_sync(0xffffffffu, own, row);
    T const* const from = rows + (number < 0 ? 0 : number) * stride + chunk * 8;
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(column + tile_offset(first + row, chunk % 8)),
        "l"(__cvta_generic_to_global(from)), "r"(number < 0 ? 0 : 16)
        : "memory");
  }
}

// One arrival of this thread, once its copies have landed.
__device__ __forceinline__ void arrive_when_copied(Barrier& loaded) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&loaded))
               : "memory");
}

}  // namespace lt2::dsa::sm90
