// A token's heads rotated, and put into the caches: a thread has some channels of a half of one head, and
// those of its other half.
#pragma once

#include "block_ops/cuda/portable/rows.cuh"

namespace lt2::block_ops::portable {

template <class T>
__device__ T* head_of(Heads const& x, int64_t row, int64_t token, int head) {
  return static_cast<T*>(x.data) + row * x.row + token * x.token + head * x.head;
}

// Channels of both halves. Products are rounded in one order, so that every kernel gives the same bits.
template <class T, int kVec>
__device__ __forceinline__ void rotate(RowOf<T, kVec>& first, RowOf<T, kVec>& second,
                                       float const (&cos)[kVec], float const (&sin)[kVec]) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    float const a = first.at(e), b = second.at(e);
    first[e] = from_float<T>(fmaf(a, cos[e], -(b * sin[e])));
    second[e] = from_float<T>(fmaf(b, cos[e], a * sin[e]));
  }
}

// Pieces that a token has: of the halves of its queries, keys and values.
__host__ __device__ inline int64_t rope_pieces(RopeCacheParams const& p, int vec) {
  return (int64_t{p.query_heads + p.heads} * p.dim + int64_t{p.heads} * p.value_dim) / 2 / vec;
}

template <class T, int kVec>
__device__ __forceinline__ void rope_cache_piece(RopeCacheParams const& p, int64_t position, int i) {
  using Row = RowOf<T, kVec>;
  int64_t const row = position / p.tokens, token = position % p.tokens;
  int const pieces = p.dim / 2 / kVec, value_pieces = p.value_dim / 2 / kVec;
  int const rotated = (p.query_heads + p.heads) * pieces;
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row], place = p.places[position];
  bool const kept = slot >= 0 && slot < p.slots && place >= 0 && place < p.capacity;
  if (i >= rotated) {
    int const head = (i - rotated) / value_pieces, c = (i - rotated) % value_pieces * kVec;
    if (!kept) return;
    T const* const from = head_of<T const>(p.v, row, token, head) + c;
    T* const to = head_of<T>(p.v_cache, slot, place, head) + c;
    Row const first = Row::load(from), second = Row::load(from + p.value_dim / 2);
    first.store(to);
    second.store(to + p.value_dim / 2);
    return;
  }
  int const head = i / pieces, c = i % pieces * kVec, half = p.dim / 2;
  bool const query = head < p.query_heads;
  if (!query && !kept) return;
  T const* const from = (query ? head_of<T const>(p.q, row, token, head)
                               : head_of<T const>(p.k, row, token, head - p.query_heads)) +
                        c;
  T* const to = (query ? static_cast<T*>(p.q_out) + (position * p.query_heads + head) * p.dim
                       : head_of<T>(p.k_cache, slot, place, head - p.query_heads)) +
                c;
  float cos[kVec], sin[kVec];
  int64_t const angle = row * p.angle_row + token * half + c;
  load_floats(cos, p.cos + angle);
  load_floats(sin, p.sin + angle);
  Row first = Row::load(from), second = Row::load(from + half);
  rotate(first, second, cos, sin);
  first.store(to);
  second.store(to + half);
}

inline bool aligned_heads(Dtype dtype, Heads const& x) {
  int64_t const elements = dtype == Dtype::kFloat32 ? 4 : 8;
  return aligned(x.data) && x.row % elements == 0 && x.token % elements == 0 && x.head % elements == 0;
}

// Whether all pieces may be of 16 bytes.
inline bool rope_in_whole_pieces(RopeCacheParams const& p) {
  int const vec = p.dtype == Dtype::kFloat32 ? 4 : 8;
  bool whole = p.dim / 2 % vec == 0 && p.value_dim / 2 % vec == 0 && aligned(p.cos) && aligned(p.sin) &&
               aligned(p.q_out);
  for (Heads const& x : {p.q, p.k, p.v, p.k_cache, p.v_cache}) whole &= aligned_heads(p.dtype, x);
  return whole;
}

}  // namespace lt2::block_ops::portable
