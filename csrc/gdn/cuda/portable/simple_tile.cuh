// What the kernels without the delta rule are made of: tiles of 64 tokens, decays of a chunk, states in
// registers, and how sequences are cut into segments.
#pragma once

#include "common/cuda/mma.cuh"
#include "gdn/cuda/portable/inverse.cuh"
#include "gdn/cuda/portable/problem.cuh"

namespace lt2::gdn::portable {

inline constexpr int kSimpleWarps = 4, kSimpleThreads = kSimpleWarps * kWarp;

// In shared memory. Pieces of 16 bytes of a row change places, so that those of 8 adjacent rows in one column
// lie in different banks.
template <class T, int kRows, int kColumns>
struct alignas(16) SimpleTile {
  T data[kRows * kColumns];

  __device__ __forceinline__ static int index(int row, int column) {
    return row * kColumns + (column ^ ((row & 7) << 3));
  }
  __device__ __forceinline__ T* at(int row, int column) { return data + index(row, column); }
  __device__ __forceinline__ T const* at(int row, int column) const { return data + index(row, column); }

  // Starts to copy `count` rows of `width` elements; zeros fill up the rest. `whole`: rows are made of
  // aligned pieces of 16 bytes.
  __device__ __forceinline__ void copy(T const* from, int64_t stride, int count, int width, bool whole) {
    if (!whole) {
#pragma unroll 1
      for (unsigned e = threadIdx.x; e < kRows * kColumns; e += kSimpleThreads) {
        int const row = e / kColumns, column = e % kColumns;
        *at(row, column) = row < count && column < width ? from[row * stride + column] : from_float<T>(0.f);
      }
      return;
    }
    constexpr unsigned kPieces = kColumns / 8, kStep = kSimpleThreads / kPieces;
    static_assert(kStep % 8 == 0);
    int const first = threadIdx.x / kPieces, column = threadIdx.x % kPieces * 8;
    int const present = column < width ? count - first : 0;
    char const* source = reinterpret_cast<char const*>(from + first * stride + column);
    int64_t const step = kStep * sizeof(T) * stride;
    uint32_t const to = shared_address(at(first, column));
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
      // Of no bytes none is read.
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                       to + i * kColumns * static_cast<uint32_t>(sizeof(T))),
                   "l"(__cvta_generic_to_global(source)), "r"(i < present ? 16 : 0)
                   : "memory");
      source += step;
    }
  }

  // Fragments for this lane, of a first operand: rows 16 m .., columns 16 k ..
  __device__ __forceinline__ void first(uint32_t (&a)[4], int m, int k, int lane) const {
    load_matrices(a, shared_address(at(16 * m + lane % 16, 16 * k + lane / 16 * 8)));
  }
  // Of the transposed tile: its rows 16 m .. are columns here, its columns rows 16 k ..
  __device__ __forceinline__ void first_transposed(uint32_t (&a)[4], int m, int k, int lane) const {
    load_matrices_transposed(
        a, shared_address(at(16 * k + lane / 16 * 8 + lane % 8, 16 * m + lane / 8 % 2 * 8)));
  }
  // Of two second operands: columns 8 n .. and 8 (n + 1) .. of the transposed tile, its rows 16 k ..
  __device__ __forceinline__ void second_transposed(uint32_t (&b)[4], int n, int k, int lane) const {
    load_matrices(b, shared_address(at(8 * n + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8)));
  }
  // The same of the tile itself.
  __device__ __forceinline__ void second(uint32_t (&b)[4], int n, int k, int lane) const {
    load_matrices_transposed(b, shared_address(at(16 * k + lane % 16, 8 * n + lane / 16 * 8)));
  }
};

__device__ inline float strength_derivative(Inputs const& p, float beta) {
  if (!p.beta_sigmoid) return 1.f;
  float const s = sigmoid(beta);
  return s * (1.f - s) * (p.neg_eigval ? 2.f : 1.f);
}

// Starts to copy a number.
__device__ __forceinline__ void copy_4(float* to, float const* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}

// Copies in groups: ends this thread's group; waits for all but its last kGroups.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// What the scalars of a chunk are made of, in shared memory. A warp copies them; a lane, once its copies are
// there, reads its own: those of tokens lane and lane + 32.
struct RawGates {
  float g[kChunk], beta[kChunk];

  __device__ __forceinline__ void copy(Inputs const& p, int64_t row, int64_t begin, int count, int head) {
    for (int i = threadIdx.x % kWarp; i < count; i += kWarp) {
      if (p.g.data != nullptr) copy_4(&g[i], token_row<float const>(p.g, row, begin + i, head));
      if (p.beta.data != nullptr) copy_4(&beta[i], token_row<float const>(p.beta, row, begin + i, head));
    }
  }
};

// Inclusive sums of 64 numbers, lane's and lane + 32's.
__device__ __forceinline__ void prefix_sums(float (&x)[2], int lane) {
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float const before = __shfl_up_sync(0xffffffffu, x[h], d);
      if (lane >= d) x[h] += before;
    }
  }
  x[1] += __shfl_sync(0xffffffffu, x[0], kWarp - 1);
}

// Of a warp's lane: tokens lane and lane + 32. Tokens from `count` on neither decay nor write.
struct ChunkDecays {
  float log2_sum[2], beta[2], log2_last;

  __device__ __forceinline__ ChunkDecays(Inputs const& p, RawGates const& raw, int count, int head,
                                         int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int const i = lane + h * kWarp;
      bool const present = i < count;
      float const g = present && p.g.data != nullptr ? log_decay(p, raw.g[i], head) : 0.f;
      log2_sum[h] = g < kLeastLog2Decay / kLog2E ? kLeastLog2Decay : g * kLog2E;
      beta[h] = !present ? 0.f : p.beta.data == nullptr ? 1.f : write_strength(p, raw.beta[i]);
    }
    prefix_sums(log2_sum, lane);
    log2_last = __shfl_sync(0xffffffffu, log2_sum[1], kWarp - 1);
  }
};

// Sequences are cut into segments of `size` tokens, a multiple of 64, numbered like chunks. With states null
// a sequence is one segment, and has its own number.
struct SegmentPlan {
  int64_t size;
  float* states;  // [numbers, HV, V, K]: what a segment leaves of nothing, then what it starts from
  float* decays;  // [numbers, HV]
};

__device__ inline int64_t first_segment(Inputs const& p, int64_t size, int64_t n) {
  Sequence const s = sequence(p, n);
  return (s.row * p.tokens + s.begin) / size + n;
}
inline int64_t segment_numbers(Inputs const& p, int64_t size) {
  return p.batch * p.tokens / size + p.sequences;
}

struct Segment {
  int64_t n, row, begin, length;  // length 0: no segment has this number, or its sequence is empty
  int64_t offset;                 // in its sequence
  bool last;
};

__device__ inline Segment find_segment(Inputs const& p, int64_t size, int64_t number) {
  int64_t low = 0, high = p.sequences;
  while (high - low > 1) {
    int64_t const middle = (low + high) / 2;
    (first_segment(p, size, middle) <= number ? low : high) = middle;
  }
  Sequence const s = sequence(p, low);
  int64_t const offset = (number - first_segment(p, size, low)) * size;
  int64_t const length = offset < 0 ? 0 : max(min(s.length - offset, size), int64_t{0});
  return {low, s.row, s.begin + offset, length, offset, offset + length >= s.length};
}

// A warp's 16 kTiles value columns of a state, transposed: rows are values.
template <class T, int kKeys, int kTiles>
struct SimpleState {
  float s[kTiles][kKeys / 8][4] = {};

  // f(element, where it is) for each of this lane's elements that a state of p has; `column` is the warp's
  // first.
  template <class F>
  __device__ __forceinline__ void each(Inputs const& p, State const& state, int column, int lane,
                                       F const& f) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      int const value = column + 16 * m + lane / 4;
      float* at = state.data + value * state.value_stride + 2 * (lane % 4) * state.key_stride;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * n + 2 * (lane % 4) + i % 2 < p.key_dim && value + i / 2 * 8 < p.value_dim) {
            f(s[m][n][i], at + i % 2 * state.key_stride + i / 2 * 8 * state.value_stride);
          }
        }
        at += 8 * state.key_stride;
        asm volatile("" : "+l"(at));
      }
    }
  }
  __device__ __forceinline__ void load(Inputs const& p, State const& state, int column, int lane) {
    each(p, state, column, lane, [](float& x, float const* at) { x = *at; });
  }
  __device__ __forceinline__ void store(Inputs const& p, State const& state, int column, int lane) {
    each(p, state, column, lane, [](float x, float* at) { *at = x; });
  }

  // Fragments of keys 16 k .. as a first operand.
  __device__ __forceinline__ void pack_first(uint32_t (&a)[kTiles][4], int k) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[m][i] = pack<T>(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
    }
  }

  __device__ __forceinline__ void decay(float factor) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] *= factor;
      }
    }
  }

  // s += (weights o y)^T x over tokens 16 k .., with y^T given as fragments.
  __device__ __forceinline__ void gain(SimpleTile<T, kChunk, kKeys> const& x, uint32_t const (&y)[kTiles][4],
                                       float const* weights, int k, int lane) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 const w = *reinterpret_cast<float2 const*>(weights + 16 * k + 8 * half + 2 * (lane % 4));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          float2 const e = unpack<T>(y[m][i]);
          a[m][i] = pack<T>(w.x * e.x, w.y * e.y);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t b[4];
      x.second(b, n, k, lane);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma<T>(s[m][n], a[m], b[0], b[1]);
        mma<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
};

}  // namespace lt2::gdn::portable
