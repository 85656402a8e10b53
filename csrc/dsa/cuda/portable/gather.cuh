// 16 gathered rows of kDim 2-byte elements in shared memory, as operands of a warp's products.
#pragma once

#include "common/cuda/mma.cuh"
#include "dsa/cuda/portable/rows.cuh"

namespace lt2::dsa::portable {

// 16-byte chunk c of row r is at chunk c ^ (r % 8); where kPadded at chunk c, and rows are 16 bytes longer.
template <int kDim_, bool kPadded = false>
struct RowTile {
  static constexpr int kDim = kDim_, kRows = 16, kRowBytes = 2 * kDim + (kPadded ? 16 : 0),
                       kBytes = kRows * kRowBytes;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + ((kPadded ? chunk : chunk ^ (row % 8)) << 4);
  }

  // Copies by a warp: lane r has the number of row r of `rows`; negative: zeros.
  template <class T>
  static __device__ __forceinline__ void copy(char* tile, T const* rows, int64_t stride, int number,
                                              int lane) {
    constexpr int kChunks = kDim / 8, kEach = kWarp / kChunks;  // rows of one copy
    T const* const from = rows + lane % kChunks * 8;
#pragma unroll 4
    for (int i = 0; i < kRows / kEach; ++i) {
      int const r = i * kEach + lane / kChunks, own = __shfl_sync(0xffffffffu, number, r);
      copy_16(tile + offset(r, lane % kChunks), from + max(own, 0) * stride, own >= 0);
    }
  }

  // d[n] [16 x 8] += a rows^T for the n-th 8 rows; a is [16 x kDim], its fragments 16 elements at a time.
  template <class T>
  static __device__ __forceinline__ void multiply(float (&d)[2][4], uint32_t const (&a)[kDim / 16][4],
                                                  char const* tile, int lane) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < kDim / 32; ++j) {
        uint32_t b[4];
        load_matrices(b, shared_address(tile + offset(8 * n + lane % 8, 4 * j + lane / 8)));
        mma<T>(d[n], a[2 * j], b[0], b[1]);
        mma<T>(d[n], a[2 * j + 1], b[2], b[3]);
      }
    }
  }

  // d [16 x kDim] += a rows; a is [16 x 16], what multiply() gives, packed. `each` is called with 8 columns
  // before they are added to.
  template <class T, class F>
  static __device__ __forceinline__ void accumulate(float (&d)[kDim / 8][4], uint32_t const (&a)[4],
                                                    char const* tile, int lane, F const& each) {
#pragma unroll
    for (int c = 0; c < kDim / 8; c += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, shared_address(tile + offset(lane % 16, c + lane / 16)));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        each(d[c + i]);
        mma<T>(d[c + i], a, b[2 * i], b[2 * i + 1]);
      }
    }
  }

  // Fragments of rows [first, first + count) in shared memory, laid out as in a tile, and of the last again.
  static __device__ __forceinline__ void load_fragments(uint32_t (&a)[kDim / 16][4], char const* rows,
                                                        int first, int count, int lane) {
    int const r = first + min(lane % 16, count - 1);
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j)
      load_matrices(a[j], shared_address(rows + offset(r, 2 * j + lane / 16)));
  }

  // Fragments of `count` rows of a tensor, `stride` apart, and of zeros after them.
  template <class T>
  static __device__ __forceinline__ void load_fragments(uint32_t (&a)[kDim / 16][4], T const* rows,
                                                        int64_t stride, int count, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const r = lane / 4 + 8 * half;
      T const* const from = rows + (r < count ? r : 0) * stride + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          a[j][half + 2 * c] = r < count ? *reinterpret_cast<uint32_t const*>(from + 16 * j + 8 * c) : 0;
        }
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void pack_fragments(uint32_t (&a)[4], float const (&d)[2][4]) {
  a[0] = pack<T>(d[0][0], d[0][1]);
  a[1] = pack<T>(d[0][2], d[0][3]);
  a[2] = pack<T>(d[1][0], d[1][1]);
  a[3] = pack<T>(d[1][2], d[1][3]);
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// At most kPending of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace lt2::dsa::portable
