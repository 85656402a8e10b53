// What the gathering kernels share. A group of kLanes lanes holds a row of up to 8 kLanes elements, 8 a lane.
#pragma once

#include <cmath>

#include "common/cuda/element.cuh"
#include "common/cuda/reduce.cuh"
#include "dsa/cuda/portable/sequences.cuh"

namespace lt2::dsa::portable {

using namespace lt2::cuda;

inline constexpr int kElements = 8, kThreads = 128;
inline constexpr float kLog2E = 1.4426950408889634f;

// As it is in memory; rows are aligned to 16 bytes.
template <class T>
struct alignas(16) Piece {
  T x[kElements];
};

template <class T>
__device__ T* row_of(Heads const& x, int64_t row, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + row * x.batch + token * x.token + head * x.head;
}

// The lane's piece of a row of `dim` elements; zeros where there is none.
template <class T>
__device__ Piece<T> load_piece(T const* row, int lane, int64_t dim, bool present = true) {
  Piece<T> piece = {};
  if (present && lane * kElements < dim) piece = *reinterpret_cast<Piece<T> const*>(row + lane * kElements);
  return piece;
}

template <class T>
__device__ void load_floats(float (&x)[kElements], T const* row, int lane, int64_t dim, bool present = true) {
  Piece<T> const piece = load_piece(row, lane, dim, present);
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] = to_float(piece.x[i]);
}

template <class T>
__device__ void store_floats(float const (&x)[kElements], T* row, int lane, int64_t dim) {
  if (lane * kElements >= dim) return;
  Piece<T> piece;
#pragma unroll
  for (int i = 0; i < kElements; ++i) piece.x[i] = from_float<T>(x[i]);
  *reinterpret_cast<Piece<T>*>(row + lane * kElements) = piece;
}

template <class T>
__device__ float dot(float const (&x)[kElements], Piece<T> const& y) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kElements; ++i) sum += x[i] * to_float(y.x[i]);
  return sum;
}

template <class T>
__device__ void add_scaled(float (&x)[kElements], float factor, Piece<T> const& y) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] += factor * to_float(y.x[i]);
}

// The i-th key of a query, in its batch row, or -1 if the query does not see it.
__device__ inline int selected_key(AttentionParams const& p, int32_t const* indices, Sight const& sight,
                                   int64_t i) {
  int const newest = sight.count - 1 - static_cast<int>(i);
  int const index = i >= p.topk ? -1 : p.dense ? newest : indices[i];
  return index >= 0 && index < sight.count ? sight.first + index : -1;
}

__device__ inline int32_t const* indices_of(AttentionParams const& p, int64_t query) {
  return p.indices + query * p.topk;
}

// Sums over the groups of a block of x[kRows], each group's piece of a row; f(row, element, sum) for every
// element.
template <int kLanes, int kRows, class F>
__device__ void sum_groups(float const (&x)[kRows][kElements], float* scratch, int group, int lane,
                           F const& f) {
  constexpr int kGroups = kThreads / kLanes, kRow = kLanes * kElements;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      scratch[(group * kRows + r) * kRow + lane * kElements + i] = x[r][i];
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kRows * kRow; e += kThreads) {
    float sum = 0.f;
    for (int g = 0; g < kGroups; ++g) sum += scratch[g * kRows * kRow + e];
    f(e / kRow, e % kRow, sum);
  }
}

inline constexpr int64_t kBlocks = 132 * 8;  // enough to fill a GPU

// The grid of a kernel that takes `units` in turn: one block each, or few where most likely it is skipped.
inline int64_t grid(int64_t units, int const* condition) {
  return condition == nullptr || units < kBlocks ? units : kBlocks;
}

// A launch with a condition does nothing where the condition is zero.
__device__ inline bool skipped(int const* condition) { return condition != nullptr && *condition == 0; }

}  // namespace lt2::dsa::portable
