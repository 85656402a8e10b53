// Where things are: sequences, chunks, tokens, and the two scalars of a token.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda/element.cuh"
#include "common/cuda/reduce.cuh"
#include "gdn/gdn.h"

namespace lt2::gdn::portable {

using namespace cuda;

// Tokens between two states that the backward pass keeps, and the side of its [chunk, chunk] matrices.
inline constexpr int kChunk = 64;
inline constexpr int kMaxKeyDim = 256, kMaxValueDim = 512, kMaxStepTokens = 8;
inline constexpr float kNormEpsilon = 1e-6f;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens [begin, begin + length) of a batch row.
struct Sequence {
  int64_t row, begin, length;
};

__device__ inline int64_t sequence_offset(Inputs const& p, int64_t n) {
  int64_t const offset = p.cu_seqlens_int64 ? static_cast<int64_t const*>(p.cu_seqlens)[n]
                                            : static_cast<int32_t const*>(p.cu_seqlens)[n];
  return min(max(offset, int64_t{0}), p.tokens);
}

__device__ inline Sequence sequence(Inputs const& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.tokens};
  int64_t const begin = sequence_offset(p, n), end = sequence_offset(p, n + 1);
  return {0, begin, max(end - begin, int64_t{0})};
}

// Chunks of all sequences are numbered without reading cu_seqlens on the host: chunk c of sequence n has
// number first_chunk(n) + c. The numbers of a sequence end before those of the next one begin, with gaps.
template <int kSize = kChunk>
__device__ int64_t first_chunk(Inputs const& p, int64_t n) {
  Sequence const s = sequence(p, n);
  return (s.row * p.tokens + s.begin) / kSize + n;
}
template <int kSize = kChunk>
int64_t chunk_numbers(Inputs const& p) {
  return p.batch * p.tokens / kSize + p.sequences;
}

struct Chunk {
  int64_t row, begin;
  int tokens;  // 0: no chunk has this number
};

template <int kSize = kChunk>
__device__ Chunk find_chunk(Inputs const& p, int64_t number) {
  int64_t low = 0,
          high = p.sequences;  // first_chunk(low) <= number < first_chunk(high), if it is any sequence's
  while (high - low > 1) {
    int64_t const middle = (low + high) / 2;
    (first_chunk<kSize>(p, middle) <= number ? low : high) = middle;
  }
  Sequence const s = sequence(p, low);
  int64_t const offset = (number - first_chunk<kSize>(p, low)) * kSize;
  if (offset < 0 || offset >= s.length) return {0, 0, 0};
  return {s.row, s.begin + offset, static_cast<int>(min(s.length - offset, int64_t{kSize}))};
}

template <class T>
__device__ T* token_row(Strided const& x, int64_t row, int64_t token, int head) {
  return static_cast<T*>(x.data) + row * x.batch + token * x.token + head * x.head;
}

__device__ inline float gate(float a, float A_log, float dt_bias) {
  return -expf(A_log) * softplus(a + dt_bias);
}

// Of the numbers that an operator or a step was given, and of those of a token.
template <class Params>
__device__ inline float log_decay(Params const& p, float g, int head) {
  return p.A_log == nullptr ? g : gate(g, p.A_log[head], p.dt_bias[head]);
}
template <class Params>
__device__ inline float write_strength(Params const& p, float beta) {
  return p.beta_sigmoid ? sigmoid(beta) * (p.neg_eigval ? 2.f : 1.f) : beta;
}
__device__ inline float log_decay(Inputs const& p, int64_t row, int64_t token, int head) {
  return p.g.data == nullptr ? 0.f : log_decay(p, *token_row<float const>(p.g, row, token, head), head);
}
__device__ inline float write_strength(Inputs const& p, int64_t row, int64_t token, int head) {
  return p.beta.data == nullptr ? 1.f : write_strength(p, *token_row<float const>(p.beta, row, token, head));
}

// What the three phases of the backward pass hand to each other, fp32.
struct Workspace {
  float *residuals, *dwrites;  // [B, T, HV, V]: r = v - k^T (e^g S), and dL/du of the write u = beta r
  float *states, *dstates;     // [chunk numbers, HV, K, V]: S before, and dL/dS after, each chunk
  float *dq, *dk;              // [B, T, HV, K]: of the normalised q and k, one per value head
};

// A state, or a pool of them, whichever axis comes first.
template <class S>
struct StateOf {
  S* data;
  int64_t key_stride, value_stride;
};
using State = StateOf<float>;

__device__ inline State dense_state(float* data, int64_t index, int key_dim, int value_dim,
                                    bool value_first) {
  float* const state = data + index * key_dim * value_dim;
  return value_first ? State{state, 1, key_dim} : State{state, value_dim, 1};
}

}  // namespace lt2::gdn::portable
