// Attention of one query and the query heads of one key head over the selected keys, gathered as fp32 into
// tiles of kLanes rows. A query's sums run in the order of its indices.
#pragma once

#include "common/cpu/gemm.h"
#include "dsa/cpu/kernels.h"

namespace lt2::dsa::LT2_ISA {
namespace {

using namespace lt2::LT2_ISA;

static_assert(kRowMultiple % kLanes == 0);

// out[0, n) = row, then zeros up to a multiple of kRowMultiple.
template <class T>
inline void widen(T const* row, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(row + i));
  for (; i < padded(n); ++i) out[i] = i < n ? to_float(row[i]) : 0.f;
}

template <class T>
inline void narrow(float const* row, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(row + i));
  for (; i < n; ++i) store_one(out + i, row[i]);
}

// Lane i of the result is the sum over the lanes of rows[i].
template <int kStep = 1>
inline Vec sums(Vec (&rows)[kLanes]) {
  VecI low{}, high{};
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j & kStep ? kLanes + j - kStep : j;
    high[j] = j & kStep ? kLanes + j : j + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * kStep) {
    Vec const a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
  if constexpr (kStep * 2 < kLanes) return sums<kStep * 2>(rows);
  return rows[0];
}

// x . tile[i] in lane i; x and the rows of the tile are `dim` floats, padded.
inline Vec dots(float const* x, float const* tile, int64_t dim) {
  Vec acc[kLanes] = {};
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vec const a = load(x + d);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] += a * load(tile + i * dim + d);
  }
  return sums(acc);
}

// out += sum_i factors[i * stride] rows[i], for rows `dim` apart.
inline void add_rows(float const* factors, int64_t stride, float const* rows, int n, int64_t dim,
                     float* out) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    Vec acc = load(out + d);
    for (int i = 0; i < n; ++i) acc += factors[i * stride] * load(rows + i * dim + d);
    store(out + d, acc);
  }
}

inline Vec first_lanes(Vec x, int64_t n) {
  VecI lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n < kLanes ? n : kLanes) - VecI{} ? x : Vec{};
}

// What one query selects: its valid indices in the order in which they come.
struct Selection {
  int32_t* keys;
  int64_t count;

  Selection(AttentionParams const& p, Document const& document, int64_t t, int32_t* keys)
      : keys(keys), count(0) {
    int32_t const* const row = p.indices + (document.row * p.tokens + document.query + t) * p.topk;
    int64_t const limit = visible(document, t);
    for (int64_t i = 0; i < p.topk; ++i) {
      keys[count] = row[i];
      count += row[i] >= 0 && row[i] < limit;
    }
  }
};

// The rows of one key head that a document has.
template <class T>
struct Rows {
  T const* data;
  int64_t stride, dim;

  Rows(Heads const& x, int64_t dim, Document const& document, int64_t head)
      : data(static_cast<T const*>(x.data) + document.row * x.batch + document.key * x.token + head * x.head),
        stride(x.token),
        dim(dim) {}

  // Rows of the selected keys [first, first + kLanes), zeros after the last.
  void gather(Selection const& selected, int64_t first, float* tile) const {
    for (int i = 0; i < kLanes; ++i) {
      bool const some = first + i < selected.count;
      widen(some ? data + selected.keys[first + i] * stride : data, some ? dim : 0, tile + i * padded(dim));
      if (!some) __builtin_memset(tile + i * padded(dim), 0, padded(dim) * sizeof(float));
    }
  }
};

template <class T>
inline T* row_of(Heads const& x, Document const& document, int64_t t, int64_t head) {
  return static_cast<T*>(x.data) + document.row * x.batch + (document.query + t) * x.token + head * x.head;
}

// One slice of workspace after the other.
struct Arena {
  float* next;
  float* take(int64_t n) { return (next += n) - n; }
};

template <class T>
void attend_block(AttentionForwardParams const& p, Document const& document, int64_t first, int64_t head,
                  float* workspace) {
  int64_t const G = p.query_heads / p.key_heads, D = padded(p.dim), DV = padded(p.value_dim);
  int64_t const width = padded(p.topk);
  Arena arena{workspace};
  float* const q = arena.take(G * D);
  float* const o = arena.take(G * DV);
  float* const scores = arena.take(G * width);
  float* const tile = arena.take(kLanes * (D > DV ? D : DV));
  auto* const keys = reinterpret_cast<int32_t*>(arena.take(width));
  Rows<T> const k(p.k, p.dim, document, head), v(p.v, p.value_dim, document, head);
  for (int64_t t = first; t < document.queries && t < first + kBlockQueries; ++t) {
    Selection const selected(p, document, t, keys);
    for (int64_t g = 0; g < G; ++g) widen(row_of<T>(p.q, document, t, head * G + g), p.dim, q + g * D);
    for (int64_t i = 0; i < selected.count; i += kLanes) {
      k.gather(selected, i, tile);
      for (int64_t g = 0; g < G; ++g) store(scores + g * width + i, dots(q + g * D, tile, D) * p.scale);
    }
    float* const lse = p.lse + (document.row * p.tokens + document.query + t) * p.query_heads + head * G;
    for (int64_t g = 0; g < G; ++g) {
      float* const row = scores + g * width;
      float top = -__builtin_inff();
      for (int64_t i = 0; i < selected.count; ++i) top = row[i] > top ? row[i] : top;
      Vec total{};
      float const base = top == -__builtin_inff() ? 0.f : top;
      for (int64_t i = 0; i < selected.count; i += kLanes) {
        Vec const e = first_lanes(exp(load(row + i) - base), selected.count - i);
        store(row + i, e);
        total += e;
      }
      float const sum_of_all = sum(total);
      lse[g] = sum_of_all == 0.f ? -__builtin_inff() : base + __builtin_logf(sum_of_all);
      float const factor = sum_of_all == 0.f ? 0.f : 1.f / sum_of_all;
      for (int64_t i = 0; i < selected.count; i += kLanes) store(row + i, load(row + i) * factor);
    }
    __builtin_memset(o, 0, G * DV * sizeof(float));
    for (int64_t i = 0; i < selected.count; i += kLanes) {
      v.gather(selected, i, tile);
      int const n = static_cast<int>(selected.count - i < kLanes ? selected.count - i : kLanes);
      for (int64_t g = 0; g < G; ++g) add_rows(scores + g * width + i, 1, tile, n, DV, o + g * DV);
    }
    for (int64_t g = 0; g < G; ++g) {
      narrow(o + g * DV, p.value_dim, row_of<T>(p.o, document, t, head * G + g));
    }
  }
}

template <class T>
void attend_backward_block(AttentionBackwardParams const& p, Document const& document, int64_t first,
                           int64_t head, float* partial, float* workspace) {
  int64_t const G = p.query_heads / p.key_heads, D = padded(p.dim), DV = padded(p.value_dim);
  int64_t const width = padded(p.topk);
  Arena arena{workspace};
  float* const q = arena.take(G * D);
  float* const dq = arena.take(G * D);
  float* const dout = arena.take(G * DV);
  float* const probability = arena.take(G * width);
  float* const gradient = arena.take(G * width);  // of the probability, then of the score
  float* const k_tile = arena.take(kLanes * D);
  float* const v_tile = arena.take(kLanes * DV);
  auto* const keys = reinterpret_cast<int32_t*>(arena.take(width));
  Rows<T> const k(p.k, p.dim, document, head), v(p.v, p.value_dim, document, head);
  for (int64_t t = first; t < document.queries && t < first + kBlockQueries; ++t) {
    Selection const selected(p, document, t, keys);
    int64_t const at = (document.row * p.tokens + document.query + t) * p.query_heads + head * G;
    for (int64_t g = 0; g < G; ++g) {
      widen(row_of<T>(p.q, document, t, head * G + g), p.dim, q + g * D);
      widen(row_of<T>(p.dout, document, t, head * G + g), p.value_dim, dout + g * DV);
    }
    for (int64_t i = 0; i < selected.count; i += kLanes) {
      k.gather(selected, i, k_tile);
      v.gather(selected, i, v_tile);
      for (int64_t g = 0; g < G; ++g) {
        float const lse = p.lse[at + g];
        Vec const e = exp(dots(q + g * D, k_tile, D) * p.scale - lse);
        store(probability + g * width + i,
              lse == -__builtin_inff() ? Vec{} : first_lanes(e, selected.count - i));
        store(gradient + g * width + i, dots(dout + g * DV, v_tile, DV));
      }
    }
    for (int64_t g = 0; g < G; ++g) {
      float const* const e = probability + g * width;
      float* const de = gradient + g * width;
      Vec total{};
      for (int64_t i = 0; i < selected.count; i += kLanes) total += load(e + i) * load(de + i);
      float const delta = sum(total) - (p.dlse == nullptr ? 0.f : p.dlse[at + g]);
      for (int64_t i = 0; i < selected.count; i += kLanes) {
        Vec const x = load(e + i);
        // A key without weight has no gradient, also where its value is infinite.
        store(de + i, x == 0.f ? Vec{} : x * (load(de + i) - delta) * p.scale);
      }
    }
    __builtin_memset(dq, 0, G * D * sizeof(float));
    for (int64_t i = 0; i < selected.count; i += kLanes) {
      k.gather(selected, i, k_tile);
      int const n = static_cast<int>(selected.count - i < kLanes ? selected.count - i : kLanes);
      for (int64_t g = 0; g < G; ++g) add_rows(gradient + g * width + i, 1, k_tile, n, D, dq + g * D);
      for (int j = 0; j < n; ++j) {
        float* const row = partial + (document.key + selected.keys[i + j]) * (D + DV);
        add_rows(gradient + i + j, width, q, static_cast<int>(G), D, row);
        add_rows(probability + i + j, width, dout, static_cast<int>(G), DV, row + D);
      }
    }
    for (int64_t g = 0; g < G; ++g) {
      narrow(dq + g * D, p.dim, row_of<T>(p.dq, document, t, head * G + g));
    }
  }
}

// dk and dv of key s out of `splits` partials [S, D + DV], added in order.
template <class T>
void reduce_row(AttentionBackwardParams const& p, int64_t row, int64_t head, int64_t s, float* partials) {
  int64_t const D = padded(p.dim), size = D + padded(p.value_dim);
  float* const total = partials + s * size;
  for (int64_t split = 1; split < p.splits; ++split) {
    float const* const other = total + split * p.keys * size;
    for (int64_t d = 0; d < size; d += kLanes) store(total + d, load(total + d) + load(other + d));
  }
  auto const at = [&](Heads const& x) {
    return static_cast<T*>(x.data) + row * x.batch + s * x.token + head * x.head;
  };
  narrow(total, p.dim, at(p.dk));
  narrow(total + D, p.value_dim, at(p.dv));
}

void attend(AttentionForwardParams const& p, Document const& document, int64_t first, int64_t head,
            float* workspace) {
  (p.dtype == Dtype::kBFloat16 ? attend_block<Bf16> : attend_block<float>)(p, document, first, head,
                                                                           workspace);
}

void attend_backward(AttentionBackwardParams const& p, Document const& document, int64_t first, int64_t head,
                     float* partial, float* workspace) {
  (p.dtype == Dtype::kBFloat16 ? attend_backward_block<Bf16>
                               : attend_backward_block<float>)(p, document, first, head, partial, workspace);
}

void reduce(AttentionBackwardParams const& p, int64_t row, int64_t head, int64_t first, float* partials) {
  auto const body = p.dtype == Dtype::kBFloat16 ? reduce_row<Bf16> : reduce_row<float>;
  for (int64_t s = first; s < p.keys && s < first + kReducedKeys; ++s) body(p, row, head, s, partials);
}

}  // namespace
}  // namespace lt2::dsa::LT2_ISA
