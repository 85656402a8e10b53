// Attention of a block of queries and the query heads of one key head over the selected keys, which are read
// where they lie, once for several heads. A query's sums run in the order of its indices.
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

// The first n lanes of x, `rest` in the others.
inline Vec first_lanes(Vec x, int64_t n, float rest) {
  VecI lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n < kLanes ? n : kLanes) - VecI{} ? x : splat(rest);
}

// Lanes [count, ..) of a row up to a whole vector.
inline void end_row(float* row, int64_t count, float value) {
  for (int64_t i = count; i % kLanes != 0; ++i) row[i] = value;
}

// Turns a row x, of which the lanes after the last hold -inf, into e^(x - base), which sums to total.
struct Exponentials {
  float base, total;

  __attribute__((flatten)) Exponentials(float* row, int64_t count) {
    Vec tops = splat(-__builtin_inff());
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec const x = load(row + i);
      tops = x > tops ? x : tops;
    }
    float top = tops[0];
    for (int i = 1; i < kLanes; ++i) top = tops[i] > top ? tops[i] : top;
    base = top == -__builtin_inff() ? 0.f : top;
    Vec parts{};
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec const e = exp(load(row + i) - base);
      store(row + i, e);
      parts += e;
    }
    total = sum(parts);
  }
};

// What one query selects: its valid indices in the order in which they come, or the newest keys that it sees.
struct Selection {
  int32_t* keys;
  int64_t count;

  Selection() = default;
  Selection(AttentionParams const& p, Document const& document, int64_t t, int32_t* keys)
      : keys(keys), count(0) {
    int64_t const limit = visible(document, t);
    if (p.dense) {
      int64_t const first = limit > p.topk ? limit - p.topk : 0;
      for (; first + count < limit; ++count) keys[count] = static_cast<int32_t>(first + count);
      return;
    }
    int32_t const* const row = p.indices + (document.row * p.tokens + document.query + t) * p.topk;
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + kLanes <= p.topk; i += kLanes) {
      __m512i const x = _mm512_loadu_si512(row + i);
      auto const seen = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(static_cast<int>(limit)));
      _mm512_storeu_si512(keys + count, _mm512_maskz_compress_epi32(seen, x));
      count += __builtin_popcount(seen);
    }
#endif
    for (; i < p.topk; ++i) {
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

  // Elements [d, d + n) of a row are on their way to the first-level cache.
  void prefetch(int64_t key, int64_t d, int64_t n) const {
    auto const* const row = reinterpret_cast<char const*>(data + key * stride + d);
    for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(row + i);
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

// The queries of a block and what they select. Behind it products may use union_workspace(), one at a time.
struct Block {
  int count = 0;
  int64_t width = 0;  // of the rows of keys
  Selection selected[kAttendQueries];
  Arena behind{nullptr};

  Block() = default;
  Block(AttentionParams const& p, Document const& document, int64_t first, Arena& arena) {
    width = padded(p.topk);
    auto* const keys = reinterpret_cast<int32_t*>(arena.take(kAttendQueries * width));
    int64_t const left = document.queries - first;
    count = static_cast<int>(left < kAttendQueries ? left : kAttendQueries);
    for (int i = 0; i < count; ++i) {
      selected[i] = Selection(p, document, first + i, keys + i * width);
    }
    behind = arena;
  }

  // Queries [first, first + n).
  Block part(int first, int n) const {
    Block part;
    part.width = width;
    part.count = count - first < n ? count - first : n;
    if (part.count < 0) part.count = 0;
    for (int i = 0; i < part.count; ++i) part.selected[i] = selected[first + i];
    return part;
  }

  // f(query, first, n) for runs [first, first + n) of what each query selects, in order; first is a multiple
  // of kLanes. Of ascending indices all those of a span of keys come together, so that its rows are in the
  // cache when the next query wants them.
  template <class F>
  void runs(int64_t keys, F const& f) const {
    constexpr int64_t kSpan = 512;
    int64_t next[kAttendQueries] = {};
    for (int64_t end = kSpan; end < keys + kSpan; end += kSpan) {
      for (int i = 0; i < count; ++i) {
        auto const& s = selected[i];
        int64_t const first = next[i];
        while (next[i] < s.count && (end >= keys || s.keys[next[i]] < end)) next[i] += kLanes;
        if (next[i] > first) f(i, first, (next[i] < s.count ? next[i] : s.count) - first);
      }
    }
  }
};

// Vectors of sums in registers. A row is read once for four heads, also where that leaves two keys at a time.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 8;
#endif

constexpr int kAhead = 4;  // rows that are fetched before they are needed

// f<n>(first) for all heads, n at a time.
template <class F>
inline void each_heads(int64_t heads, F const& f) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) f.template operator()<4>(h);
  for (; h + 2 <= heads; h += 2) f.template operator()<2>(h);
  for (; h < heads; ++h) f.template operator()<1>(h);
}

// f<n>(vector) for all vectors of a row, n at a time.
template <int kMost, class F>
inline void each_vectors(int64_t size, F const& f) {
  int64_t d = 0;
  for (; d + kMost * kLanes <= size; d += kMost * kLanes) f.template operator()<kMost>(d);
  for (; d < size; d += kLanes) f.template operator()<1>(d);
}

template <class T>
inline Vec load_first(T const* row, int64_t n) {
  if (n >= kLanes) return load(row);
  T part[kLanes] = {};
  __builtin_memcpy(part, row, static_cast<size_t>(n) * sizeof(T));
  return load(part);
}

// out[h * stride + j] = scale x[h] . rows[keys[j]] for j < n, and anything up to a multiple of kLanes. x:
// kHeads padded rows.
template <int kHeads, class T>
inline void dot_heads(float const* x, Rows<T> const& rows, int32_t const* keys, int64_t n, float scale,
                      float* out, int64_t stride) {
  constexpr int kKeys = kLanes / kHeads, kStep = kKeys < 8 ? kKeys : 8;
  int64_t const size = padded(rows.dim);
  for (int64_t first = 0; first < n; first += kKeys) {
    for (int64_t j = first + kKeys; j < first + 2 * kKeys && j < n; ++j) rows.prefetch(keys[j], 0, rows.dim);
    Vec acc[kLanes] = {};
#pragma GCC unroll 2
    for (int group = 0; group < kKeys; group += kStep) {
      T const* row[kStep];
      for (int j = 0; j < kStep; ++j) {
        int64_t const at = first + group + j;
        row[j] = rows.data + keys[at < n ? at : n - 1] * rows.stride;
      }
      auto const step = [&](int64_t d, auto const& fetch) __attribute__((always_inline)) {
        Vec a[kHeads];
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) a[h] = load(x + h * size + d);
#pragma GCC unroll 8
        for (int j = 0; j < kStep; ++j) {
          Vec const b = fetch(row[j] + d);
#pragma GCC unroll 4
          for (int h = 0; h < kHeads; ++h) acc[h * kKeys + group + j] += a[h] * b;
        }
      };
      int64_t d = 0;
      for (; d + kLanes <= rows.dim; d += kLanes) step(d, [](T const* at) { return load(at); });
      if (d < rows.dim) step(d, [&](T const* at) { return load_first(at, rows.dim - d); });
    }
    float lanes[kLanes];
    store(lanes, sums(acc) * scale);
    for (int h = 0; h < kHeads; ++h) {
      __builtin_memcpy(out + h * stride + first, lanes + h * kKeys, kKeys * sizeof(float));
    }
  }
}

// out[h] += sum_j factors[h * stride + j] rows[keys[j]], j < n; out: kHeads padded rows.
template <int kHeads, class T>
inline void add_heads(float const* factors, int64_t stride, Rows<T> const& rows, int32_t const* keys,
                      int64_t n, float* out) {
  constexpr int kMost = kAccumulators / kHeads < 8 ? kAccumulators / kHeads : 8;
  int64_t const size = padded(rows.dim);
  auto const columns = [&]<int kVecs>(int64_t d, auto const& fetch) __attribute__((always_inline)) {
    Vec acc[kHeads][kVecs];
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVecs; ++v) acc[h][v] = load(out + h * size + d + v * kLanes);
    }
    for (int64_t j = 0; j < n; ++j) {
      if (j + kAhead < n) rows.prefetch(keys[j + kAhead], d, kVecs * kLanes);
      T const* const row = rows.data + keys[j] * rows.stride + d;
      Vec b[kVecs];
      for (int v = 0; v < kVecs; ++v) b[v] = fetch(row + v * kLanes);
      for (int h = 0; h < kHeads; ++h) {
        Vec const a = splat(factors[h * stride + j]);
        for (int v = 0; v < kVecs; ++v) acc[h][v] += a * b[v];
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVecs; ++v) store(out + h * size + d + v * kLanes, acc[h][v]);
    }
  };
  int64_t const whole = rows.dim / kLanes * kLanes;
  each_vectors<kMost>(whole, [&]<int kVecs>(int64_t d) {
    columns.template operator()<kVecs>(d, [](T const* at) { return load(at); });
  });
  if (whole < rows.dim) {
    columns.template operator()<1>(whole, [&](T const* at) { return load_first(at, rows.dim - whole); });
  }
}

// to[keys[j] * row] += sum_h factors[h * stride + j] x[h], j < n; x: kHeads rows of `size` floats, padded.
template <int kHeads>
inline void outer_heads(float const* factors, int64_t stride, float const* x, int64_t size,
                        int32_t const* keys, int64_t n, float* to, int64_t row) {
  each_vectors<kAccumulators / 4>(size, [&]<int kVecs>(int64_t d) {
    Vec b[kHeads][kVecs];
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVecs; ++v) b[h][v] = load(x + h * size + d + v * kLanes);
    }
    for (int64_t j = 0; j < n; ++j) {
      float* const later = to + keys[j + kAhead < n ? j + kAhead : j] * row + d;
      for (int v = 0; v < kVecs; ++v) __builtin_prefetch(later + v * kLanes, 1);
      float* const out = to + keys[j] * row + d;
      Vec acc[kVecs];
      for (int v = 0; v < kVecs; ++v) acc[v] = load(out + v * kLanes);
      for (int h = 0; h < kHeads; ++h) {
        Vec const a = splat(factors[h * stride + j]);
        for (int v = 0; v < kVecs; ++v) acc[v] += a * b[h][v];
      }
      for (int v = 0; v < kVecs; ++v) store(out + v * kLanes, acc[v]);
    }
  });
}

// The query heads of one key head in a block, and what a block needs: products with the selected rows, read
// where they lie. TileProducts is the same on the tile unit.
struct BlockHeads {
  Document const& document;
  Block const& block;
  int64_t first, head, G, width;

  BlockHeads(BlockHeads const& whole, Block const& part, int64_t skipped)
      : document(whole.document),
        block(part),
        first(whole.first + skipped),
        head(whole.head),
        G(whole.G),
        width(whole.width) {}
  BlockHeads(AttentionParams const& p, Document const& document, Block const& block, int64_t first,
             int64_t head)
      : document(document),
        block(block),
        first(first),
        head(head),
        G(p.query_heads / p.key_heads),
        width(padded(p.topk)) {}

  int64_t rows() const { return block.count * G; }
  int64_t count(int64_t r) const { return block.selected[r / G].count; }  // of the scores of a row
  template <class T>
  T* row(Heads const& x, int64_t r) const {
    return row_of<T>(x, document, first + r / G, head * G + r % G);
  }
  template <class T>
  void widen_rows(Heads const& x, int64_t dim, float* out) const {
    for (int64_t r = 0; r < rows(); ++r) widen(row<T>(x, r), dim, out + r * padded(dim));
  }
  template <class T>
  void narrow_rows(float const* in, int64_t dim, Heads const& x) const {
    for (int64_t r = 0; r < rows(); ++r) narrow(in + r * padded(dim), dim, row<T>(x, r));
  }
};

template <class T>
struct RowProducts : BlockHeads {
  using BlockHeads::BlockHeads;

  // f(products) for the block, in parts where other products suit them.
  template <class F>
  static void each_part(AttentionParams const& p, Document const& document, Block const& block, int64_t first,
                        int64_t head, F const& f) {
    f(RowProducts(p, document, block, first, head));
  }

  // scores[r][i] = scale left[r] . right[i-th selected key], `rest` in between if there is more than what a
  // query selects; `rows` is of the size of the left ones.
  void score(Heads const& left, Heads const& right, int64_t dim, float scale, float /*rest*/, float* rows,
             float* scores) const {
    Rows<T> const keys(right, dim, document, head);
    this->template widen_rows<T>(left, dim, rows);
    block.runs(document.keys, [&](int query, int64_t i, int64_t n) {
      each_heads(G, [&]<int kHeads>(int64_t h) {
        int64_t const r = query * G + h;
        dot_heads<kHeads>(rows + r * padded(dim), keys, block.selected[query].keys + i, n, scale,
                          scores + r * width + i, width);
      });
    });
  }

  // out[r] = sum_i weights[r][i] right[i-th selected key]
  void add(float const* weights, Heads const& right, int64_t dim, float* out) const {
    Rows<T> const keys(right, dim, document, head);
    __builtin_memset(out, 0, static_cast<size_t>(rows() * padded(dim)) * sizeof(float));
    block.runs(document.keys, [&](int query, int64_t i, int64_t n) {
      each_heads(G, [&]<int kHeads>(int64_t h) {
        int64_t const r = query * G + h;
        add_heads<kHeads>(weights + r * width + i, width, keys, block.selected[query].keys + i, n,
                          out + r * padded(dim));
      });
    });
  }

  // to[s] += sum_r weights[r][i] left[r] for the i-th selected key s; rows of `to` are `size` floats, `rows`
  // is of the size of the left ones.
  void add_outer(float const* weights, Heads const& left, int64_t dim, float* rows, float* to,
                 int64_t size) const {
    this->template widen_rows<T>(left, dim, rows);
    block.runs(document.keys, [&](int query, int64_t i, int64_t n) {
      each_heads(G, [&]<int kHeads>(int64_t h) {
        int64_t const r = query * G + h;
        outer_heads<kHeads>(weights + r * width + i, width, rows + r * padded(dim), padded(dim),
                            block.selected[query].keys + i, n, to, size);
      });
    });
  }
};

template <class T, class Products = RowProducts<T>>
void attend_block(AttentionForwardParams const& p, Document const& document, int64_t first, int64_t head,
                  float* workspace) {
  int64_t const G = p.query_heads / p.key_heads, D = padded(p.dim), DV = padded(p.value_dim);
  Arena arena{workspace};
  float* const q = arena.take(kAttendQueries * G * D);
  float* const o = arena.take(kAttendQueries * G * DV);
  float* const scores = arena.take(kAttendQueries * G * padded(p.topk));
  Block const block(p, document, first, arena);
  Products::each_part(p, document, block, first, head, [&](auto const& part) {
    part.score(p.q, p.k, p.dim, p.scale, -__builtin_inff(), q, scores);
    float* const lse =
        p.lse + (document.row * p.tokens + document.query + part.first) * p.query_heads + head * G;
    for (int64_t r = 0; r < part.rows(); ++r) {
      int64_t const count = part.count(r);
      float* const row = scores + r * part.width;
      end_row(row, count, -__builtin_inff());
      auto const [base, total] = Exponentials(row, count);
      lse[r / G * p.query_heads + r % G] = total == 0.f ? -__builtin_inff() : base + __builtin_logf(total);
      float const factor = total == 0.f ? 0.f : 1.f / total;
      for (int64_t i = 0; i < count; i += kLanes) store(row + i, load(row + i) * factor);
    }
    part.add(scores, p.v, p.value_dim, o);
    part.template narrow_rows<T>(o, p.value_dim, p.o);
  });
}

// Turns scores into probabilities, and gradients of these into those of the scores.
__attribute__((flatten)) inline void score_gradients(float* e, float* de, int64_t count, float lse,
                                                     float dlse, float scale) {
  end_row(e, count, -__builtin_inff());
  end_row(de, count, 0.f);
  Vec parts{};
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec const x = lse == -__builtin_inff() ? Vec{} : exp(load(e + i) - lse);
    store(e + i, x);
    parts += x * load(de + i);
  }
  float const delta = sum(parts) - dlse;
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec const x = load(e + i);
    // A key without weight has no gradient, also where its value is infinite.
    store(de + i, x == 0.f ? Vec{} : x * (load(de + i) - delta) * scale);
  }
}

template <class T, class Products = RowProducts<T>>
void attend_backward_block(AttentionBackwardParams const& p, Document const& document, int64_t first,
                           int64_t head, float* partial, float* workspace) {
  int64_t const G = p.query_heads / p.key_heads, D = padded(p.dim), DV = padded(p.value_dim);
  int64_t const width = padded(p.topk);
  Arena arena{workspace};
  float* const q = arena.take(kAttendQueries * G * D);
  float* const dq = arena.take(kAttendQueries * G * D);
  float* const dout = arena.take(kAttendQueries * G * DV);
  float* const probability = arena.take(kAttendQueries * G * width);
  float* const gradient = arena.take(kAttendQueries * G * width);  // of the probability, then of the score
  Block const block(p, document, first, arena);
  Products::each_part(p, document, block, first, head, [&](auto const& part) {
    part.score(p.q, p.k, p.dim, p.scale, -__builtin_inff(), q, probability);
    part.score(p.dout, p.v, p.value_dim, 1.f, 0.f, dout, gradient);
    int64_t const at = (document.row * p.tokens + document.query + part.first) * p.query_heads + head * G;
    auto const per_row = [&](float const* x, int64_t r) { return x[at + r / G * p.query_heads + r % G]; };
    for (int64_t r = 0; r < part.rows(); ++r) {
      float const delta = p.dlse == nullptr ? 0.f : per_row(p.dlse, r);
      score_gradients(probability + r * part.width, gradient + r * part.width, part.count(r),
                      per_row(p.lse, r), delta, p.scale);
    }
    part.add(gradient, p.k, p.dim, dq);
    part.template narrow_rows<T>(dq, p.dim, p.dq);
    float* const dk = partial + document.key * (D + DV);
    part.add_outer(gradient, p.q, p.dim, q, dk, D + DV);
    part.add_outer(probability, p.dout, p.value_dim, dout, dk + D, D + DV);
  });
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

void reduce(AttentionBackwardParams const& p, int64_t row, int64_t head, int64_t first, float* partials) {
  auto const body = p.dtype == Dtype::kBFloat16 ? reduce_row<Bf16> : reduce_row<float>;
  for (int64_t s = first; s < p.keys && s < first + kReducedKeys; ++s) body(p, row, head, s, partials);
}

}  // namespace
}  // namespace lt2::dsa::LT2_ISA
