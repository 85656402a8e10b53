// What the kernels share: rows of channels, taps in registers, the cut of sequences into chunks of tokens.
#pragma once

#include "causal_conv1d/causal_conv1d.h"
#include "common/cuda/element.cuh"
#include "common/cuda/overlap.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/row.cuh"

namespace lt2::causal_conv1d::portable {

using namespace cuda;

inline constexpr int kThreads = 128;
inline constexpr int kFewTaps = 4;  // the usual width, or less

// Right-aligned: the tap of token t - j is number kTaps - 1 - j, whatever the width.
template <int kVec, int kTaps>
struct Taps {
  float weight[kTaps][kVec];
  float bias[kVec];
  int first;  // taps before it do not exist

  Taps() = default;
  __device__ Taps(float const* weights, float const* biases, int width, int64_t channel)
      : first(kTaps - width) {
    bool const aligned =
        kTaps == 4 && width == kTaps && reinterpret_cast<uintptr_t>(weights) % sizeof(float4) == 0;
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      float const* const row = weights + (channel + c) * width;
      if (aligned) {
        float4 const four = *reinterpret_cast<float4 const*>(row);
        weight[0][c] = four.x, weight[1][c] = four.y, weight[2][c] = four.z, weight[3][c] = four.w;
      } else {
#pragma unroll
        for (int j = 0; j < kTaps; ++j) weight[j][c] = j >= first ? row[j - first] : 0.f;
      }
      bias[c] = biases == nullptr ? 0.f : biases[channel + c];
    }
  }

  // z of the last of kTaps tokens, in the order of the CPU kernels. Taps that do not exist do not spread NaN.
  template <class T>
  __device__ float convolve(RowOf<T, kVec> const* rows, int c) const {
    float z = bias[c];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      if (j >= first) z = fmaf(weight[j][c], rows[j].at(c), z);
    }
    return z;
  }
};

__device__ inline float fast_sigmoid(float z) { return __fdividef(1.f, 1.f + __expf(-z)); }
__device__ inline float activate(float z, bool silu) { return silu ? z * fast_sigmoid(z) : z; }

// Elements of one tap of kVec channels.
template <class T, int kVec>
__device__ RowOf<T, kVec> load_tap(State const& state, int64_t sequence, int64_t channel, int64_t tap) {
  T const* const from = static_cast<T const*>(state.data) + sequence * state.sequence +
                        channel * state.channel + tap * state.tap;
  RowOf<T, kVec> row;
#pragma unroll
  for (int c = 0; c < kVec; ++c) row[c] = from[c * state.channel];
  return row;
}

template <class T, int kVec>
__device__ void store_tap(State const& state, int64_t sequence, int64_t channel, int64_t tap,
                          RowOf<T, kVec> const& row) {
  T* const to =
      static_cast<T*>(state.data) + sequence * state.sequence + channel * state.channel + tap * state.tap;
#pragma unroll
  for (int c = 0; c < kVec; ++c) to[c * state.channel] = row[c];
}

template <class T>
__device__ T* token_row(Tokens const& x, int64_t row, int64_t token, int64_t channel) {
  return static_cast<T*>(x.data) + row * x.batch + token * x.token + channel;
}

// Tokens [begin, end) of the sequence [first, last) in batch row `row`; of no sequence if `sequence` is
// negative.
struct Chunk {
  int64_t sequence, row, first, last, begin, end;
};

// The tokens of a packed row fall into sequences + 2 pieces: what is before the first sequence, the
// sequences, what is after the last. Offsets are not trusted: all bounds are within the row.
__device__ inline int64_t piece_begin(Inputs const& p, int64_t piece) {
  if (piece == 0) return 0;
  if (piece == p.sequences + 2) return p.tokens;
  int64_t const offset = p.cu_seqlens_int64 ? static_cast<int64_t const*>(p.cu_seqlens)[piece - 1]
                                            : static_cast<int32_t const*>(p.cu_seqlens)[piece - 1];
  return min(max(offset, int64_t{0}), p.tokens);
}

// Chunks are numbered without reading cu_seqlens on the host: those of a piece begin at number
// piece_begin / size + piece and end, with gaps, before those of the next one. Every piece has one, also an
// empty one.
__host__ __device__ inline int64_t row_chunks(Inputs const& p, int size) {
  return p.tokens == 0 ? 1 : (p.tokens + size - 1) / size;
}
inline int64_t chunk_numbers(Inputs const& p, int size) {
  return p.cu_seqlens == nullptr ? p.batch * row_chunks(p, size) : p.tokens / size + p.sequences + 2;
}

// False: no chunk has this number.
__device__ inline bool find_chunk(Inputs const& p, int size, int64_t number, Chunk& chunk) {
  if (p.cu_seqlens == nullptr) {
    int64_t const per_row = row_chunks(p, size), row = number / per_row;
    int64_t const begin = number % per_row * size;
    chunk = {row, row, 0, p.tokens, begin, min(begin + size, p.tokens)};
    return true;
  }
  auto const first_number = [&](int64_t piece) { return piece_begin(p, piece) / size + piece; };
  int64_t low = 0, high = p.sequences + 2;  // first_number(low) <= number < first_number(high)
  while (high - low > 1) {
    int64_t const middle = (low + high) / 2;
    (first_number(middle) <= number ? low : high) = middle;
  }
  int64_t const first = piece_begin(p, low), last = max(first, piece_begin(p, low + 1));
  int64_t const begin = first + (number - first_number(low)) * size;
  bool const inside = low > 0 && low <= p.sequences;
  chunk = {inside ? low - 1 : -1, 0, first, last, begin, min(begin + size, last)};
  return begin == first || begin < last;
}

// The input of a token before the end of the chunk's sequence: before its beginning the state, or zeros.
template <class T, int kVec>
__device__ RowOf<T, kVec> input_row(Inputs const& p, Chunk const& chunk, int64_t token, int64_t channel) {
  if (token >= chunk.first) return RowOf<T, kVec>::load(token_row<T const>(p.x, chunk.row, token, channel));
  if (p.initial_state.data == nullptr) return RowOf<T, kVec>::zero();
  return load_tap<T, kVec>(p.initial_state, chunk.sequence, channel, token - chunk.first + p.width);
}

template <class T, int kVec>
__device__ void zero_rows(Tokens const& y, Chunk const& chunk, int64_t channel) {
  for (int64_t t = chunk.begin; t < chunk.end; ++t) {
    RowOf<T, kVec>::zero().store(token_row<T>(y, chunk.row, t, channel));
  }
}

}  // namespace lt2::causal_conv1d::portable
