// Rotary embedding of new queries and keys, and their keys and values into the caches.
#pragma once

#include "block_ops/cpu/rows.h"

namespace lt2::block_ops::LT2_ISA {
namespace {

template <class T>
inline T* head_of(Heads const& x, int64_t row, int64_t token, int head) {
  return static_cast<T*>(x.data) + row * x.row + token * x.token + head * x.head;
}

template <class T>
inline void rotate(T const* x, float const* cos, float const* sin, int half, T* to) {
  for_each_vec(half, [&](int64_t c, int n) {
    Vec const a = load_some(x + c, n), b = load_some(x + half + c, n);
    Vec const u = load_some(cos + c, n), v = load_some(sin + c, n);
    store_some(to + c, a * u - b * v, n);
    store_some(to + half + c, b * u + a * v, n);
  });
}

template <class T>
void rope_cache_heads(RopeCacheParams const& p, int64_t position, int begin_head, int end_head) {
  int64_t const row = position / p.tokens, token = position % p.tokens;
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row], place = p.places[position];
  bool const kept = slot >= 0 && slot < p.slots && place >= 0 && place < p.capacity;
  int const half = p.dim / 2;
  float const *const cos = p.cos + row * p.angle_row + token * half, *const sin = p.sin + row * p.angle_row +
                                                                                  token * half;
  for (int i = begin_head; i < end_head; ++i) {
    if (i < p.query_heads) {
      rotate(head_of<T>(p.q, row, token, i), cos, sin, half,
             static_cast<T*>(p.q_out) + (position * p.query_heads + i) * p.dim);
      continue;
    }
    if (!kept) return;
    int const head = (i - p.query_heads) % p.heads;
    if (i < p.query_heads + p.heads) {
      rotate(head_of<T>(p.k, row, token, head), cos, sin, half, head_of<T>(p.k_cache, slot, place, head));
    } else {
      __builtin_memcpy(head_of<T>(p.v_cache, slot, place, head), head_of<T>(p.v, row, token, head),
                       p.value_dim * sizeof(T));
    }
  }
}

}  // namespace
}  // namespace lt2::block_ops::LT2_ISA
