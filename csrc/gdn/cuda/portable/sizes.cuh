// What the kernels take, which element type they are called with, and their workspace.
#pragma once

#include "gdn/cuda/portable/problem.cuh"

// Calls f<dtype>(..).
#define LT2_BY_DTYPE(dtype, f, ...)            \
  switch (dtype) {                             \
    case Dtype::kBFloat16:                     \
      return f<Dtype::kBFloat16>(__VA_ARGS__); \
    case Dtype::kFloat16:                      \
      return f<Dtype::kFloat16>(__VA_ARGS__);  \
    default:                                   \
      return f<Dtype::kFloat32>(__VA_ARGS__);  \
  }

namespace lt2::gdn::portable {

inline Status check_sizes(int heads, int value_heads, int key_dim, int value_dim) {
  if (key_dim < 1 || key_dim > kMaxKeyDim) return "the CUDA kernels take K in 1..256";
  if (value_dim < 1 || value_dim > kMaxValueDim) return "the CUDA kernels take V in 1..512";
  if (heads < 1 || value_heads % heads != 0) return "the CUDA kernels take a multiple of H value heads";
  return kOk;
}

// Whether rows of 2-byte elements are made of aligned pieces of 16 bytes.
inline bool whole_pieces(Inputs const& p, Strided const& x, int64_t heads, int dim) {
  auto const pieces = [](int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && dim % 8 == 0 && pieces(p.batch, x.batch) &&
         pieces(p.tokens, x.token) && pieces(heads, x.head);
}

// The same of q, k, v and of another operand like v.
inline bool whole_pieces(Inputs const& p, Strided const& other) {
  return whole_pieces(p, p.q, p.heads, p.key_dim) && whole_pieces(p, p.k, p.heads, p.key_dim) &&
         whole_pieces(p, p.v, p.value_heads, p.value_dim) &&
         whole_pieces(p, other, p.value_heads, p.value_dim);
}

// Of the backward pass.
inline int64_t workspace_floats(BackwardParams const& p) {
  int64_t const rows = p.batch * p.tokens * p.value_heads;
  int64_t const states = chunk_numbers(p) * p.value_heads * p.key_dim * p.value_dim;
  return 2 * (rows * (p.key_dim + p.value_dim) + states);
}

inline Workspace take_workspace(BackwardParams const& p, float* floats) {
  int64_t const rows = p.batch * p.tokens * p.value_heads;
  int64_t const states = chunk_numbers(p) * p.value_heads * p.key_dim * p.value_dim;
  auto const take = [&](int64_t count) {
    float* const piece = floats;
    floats += count;
    return piece;
  };
  Workspace w;
  w.residuals = take(rows * p.value_dim);
  w.dwrites = take(rows * p.value_dim);
  w.states = take(states);
  w.dstates = take(states);
  w.dq = take(rows * p.key_dim);
  w.dk = take(rows * p.key_dim);
  return w;
}

}  // namespace lt2::gdn::portable
