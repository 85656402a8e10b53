// Attention of a few new tokens to the cached keys of their slot: online softmax over blocks of keys, for all
// queries that share a key head, so that every key and value is read from memory once.
#pragma once

#include "loop_state/cpu/residual.h"

namespace lt2::loop_state::LT2_ISA {
namespace {

constexpr int kBlockKeys = 32;
constexpr float kInfinity = __builtin_inff();

// Sizes of an item: queries [tokens of a unit * group, D], with head and value dimensions padded to whole
// vectors.
struct Geometry {
  int group;
  int64_t queries, key_width, value_width;

  explicit Geometry(DecodeParams const& p)
      : group(p.query_heads / p.heads),
        queries(unit_tokens(p) * group),
        key_width((p.key_dim + kLanes - 1) / kLanes * kLanes),
        value_width((p.value_dim + kLanes - 1) / kLanes * kLanes) {}

  // Element offset of query i of a unit and key head in q [B, t, HQ, dim].
  int64_t offset(DecodeParams const& p, int64_t unit, int head, int64_t i, int dim) const {
    return ((unit * unit_tokens(p) + i / group) * p.query_heads + head * group + i % group) * dim;
  }
};

// What an item leaves per query: sum of exp(s - max) v [value_width], then max, then sum of exp(s - max).
inline int64_t partial_width(Geometry const& g) { return g.value_width + 2; }

// Lane i of the result is the sum over the lanes of rows[i].
template <int kStep = 1>
inline Vec sum_rows(Vec (&rows)[kLanes]) {
  VecI low{}, high{};
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j & kStep ? kLanes + j - kStep : j;
    high[j] = j & kStep ? kLanes + j : j + kStep;
  }
  for (int i = 0; i < kLanes; i += 2 * kStep) {
    Vec const a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * kStep < kLanes) return sum_rows<2 * kStep>(rows);
  return rows[0];
}

template <class T>
inline void widen(T const* from, int dim, float* to) {
  for_each_vec(dim, [&](int64_t c, int n) { store(to + c, load_some(from + c, n)); });
}

// rows[r]: key or value r of a block, found at at(r), as floats padded to `width`, converted into tile unless
// memory has that form. Rows from `count` on repeat the last one. Also prefetches the next block, of which
// `ahead` rows exist.
template <class T, class At>
inline void load_rows(At const& at, int64_t count, int64_t ahead, int dim, int64_t width, float* tile,
                      float const* (&rows)[kBlockKeys]) {
  constexpr int kLine = 64 / sizeof(T);
  for (int r = 0; r < kBlockKeys; ++r) {
    if (r >= count) {
      rows[r] = rows[count - 1];
      continue;
    }
    T const* const row = at(r);
    if (r < ahead) {
      T const* const next = at(kBlockKeys + r);
      for (int c = 0; c < dim; c += kLine) __builtin_prefetch(next + c);
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      if (dim == width) {
        rows[r] = row;
        continue;
      }
    }
    widen(row, dim, tile + r * width);
    rows[r] = tile + r * width;
  }
}

// scores[r] = q . rows[r] for the first `count` rows, -infinity for the others.
inline void score_rows(float const* q, float const* const* rows, int64_t width, int64_t count,
                       float* scores) {
  for (int r = 0; r < kBlockKeys; r += kLanes) {
    if (r >= count) {
      store(scores + r, splat(-kInfinity));
      continue;
    }
    Vec acc[kLanes] = {};
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec const x = load(q + c);
      for (int i = 0; i < kLanes; ++i) acc[i] += x * load(rows[r + i] + c);
    }
    store(scores + r, sum_rows(acc));
  }
  for (int64_t r = count; r < kBlockKeys; ++r) scores[r] = -kInfinity;
}

// NaN among the scores gives NaN, unless a larger score follows; then the exponentials are NaN.
inline float max_score(float const* scores, float start) {
  Vec most = splat(start);
  for (int r = 0; r < kBlockKeys; r += kLanes) {
    Vec const s = load(scores + r);
    most = s <= most ? most : s;
  }
  float m = start;
  for (int i = 0; i < kLanes; ++i) m = most[i] <= m ? m : most[i];
  return m;
}

// out = decay out + sum_r weights[r] rows[r], in columns [column, width).
template <int kVecs>
inline void add_rows(float const* weights, float const* const* rows, int64_t count, float decay,
                     int64_t column, int64_t width, float* out) {
  for (; column + kVecs * kLanes <= width; column += kVecs * kLanes) {
    Vec acc[kVecs];
    for (int i = 0; i < kVecs; ++i) acc[i] = load(out + column + i * kLanes) * decay;
    for (int64_t r = 0; r < count; ++r) {
      for (int i = 0; i < kVecs; ++i) acc[i] += weights[r] * load(rows[r] + column + i * kLanes);
    }
    for (int i = 0; i < kVecs; ++i) store(out + column + i * kLanes, acc[i]);
  }
  if constexpr (kVecs > 1) add_rows<kVecs / 2>(weights, rows, count, decay, column, width, out);
}

int64_t decode_workspace(DecodeParams const& p) {
  Geometry const g(p);
  int64_t const list = p.indices == nullptr ? 0 : kSplitKeys;
  return g.queries * g.key_width + kBlockKeys * (g.key_width + g.value_width) + list;
}

int64_t decode_partial(DecodeParams const& p) {
  Geometry const g(p);
  return g.queries * partial_width(g);
}

template <class T>
inline T const* cached(Cache const& cache, Sight const& sight, int head) {
  return static_cast<T const*>(cache.data) + sight.loop * cache.loop + sight.slot * cache.slot +
         head * cache.head;
}

// The entries [begin, end) of a unit's list that name keys it sees; returns how many.
inline int64_t visible_entries(DecodeParams const& p, int64_t unit, int64_t keys, int64_t begin, int64_t end,
                               int32_t* list) {
  int32_t const* const indices = p.indices + unit * p.topk;
  int64_t count = 0;
  for (int64_t j = begin; j < end; ++j) {
    if (indices[j] >= 0 && indices[j] < keys) list[count++] = indices[j];
  }
  return count;
}

template <class T>
void decode_item(DecodeParams const& p, int64_t unit, int head, int64_t split, float* workspace,
                 float* partial) {
  Geometry const g(p);
  Sight const sight(p, unit);
  bool const sparse = p.indices != nullptr;
  int64_t const width = partial_width(g), tokens = unit_tokens(p);
  int64_t begin = split * kSplitKeys, end = min(begin + kSplitKeys, sparse ? p.topk : sight.keys);
  for (int64_t i = 0; i < g.queries; ++i) {
    float* const out = partial + i * width;
    for (int64_t c = 0; c < g.value_width; ++c) out[c] = 0.f;
    out[g.value_width] = -kInfinity;
    out[g.value_width + 1] = 0.f;
  }
  if (begin >= end || sight.keys == 0) return;

  float *const q = workspace, *const key_tile = q + g.queries * g.key_width;
  float* const value_tile = key_tile + kBlockKeys * g.key_width;
  int32_t* const list = reinterpret_cast<int32_t*>(value_tile + kBlockKeys * g.value_width);
  for (int64_t i = 0; i < g.queries; ++i) {
    float* const to = q + i * g.key_width;
    widen(static_cast<T const*>(p.q) + g.offset(p, unit, head, i, p.key_dim), p.key_dim, to);
    for (int64_t c = 0; c < g.key_width; c += kLanes) store(to + c, load(to + c) * p.scale);
  }
  int64_t keys = sight.keys;
  if (sparse) {
    end = keys = visible_entries(p, unit, keys, begin, end, list);
    begin = 0;
  }
  T const *const all_k = cached<T>(p.k, sight, head), *const all_v = cached<T>(p.v, sight, head);
  float const *k[kBlockKeys], *v[kBlockKeys];
  alignas(64) float scores[kBlockKeys];
  for (int64_t block = begin; block < end; block += kBlockKeys) {
    int64_t const count = min(kBlockKeys, end - block), ahead = end - block - kBlockKeys;
    auto const place = [&](int64_t r) { return sparse ? list[block + r] : block + r; };
    load_rows<T>([&](int64_t r) { return all_k + place(r) * p.k.token; }, count, ahead, p.key_dim,
                 g.key_width, key_tile, k);
    load_rows<T>([&](int64_t r) { return all_v + place(r) * p.v.token; }, count, ahead, p.value_dim,
                 g.value_width, value_tile, v);
    for (int64_t i = 0; i < g.queries; ++i) {
      int64_t const visible = min(count, keys - tokens + i / g.group + 1 - block);
      if (visible <= 0) continue;
      float* const out = partial + i * width;
      float &max = out[g.value_width], &total = out[g.value_width + 1];
      score_rows(q + i * g.key_width, k, g.key_width, visible, scores);
      float const new_max = max_score(scores, max);
      if (new_max == -kInfinity) continue;
      float const decay = exp(max - new_max);
      Vec totals{};
      for (int r = 0; r < kBlockKeys; r += kLanes) {
        Vec const weights = exp(load(scores + r) - new_max);
        store(scores + r, weights);
        totals += weights;
      }
      max = new_max;
      total = total * decay + sum(totals);
      add_rows<8>(scores, v, visible, decay, 0, g.value_width, out);
    }
  }
}

template <class T>
void merge_item(DecodeParams const& p, int64_t unit, int head, float const* partials, int64_t partial_stride,
                int64_t splits) {
  Geometry const g(p);
  for (int64_t i = 0; i < g.queries; ++i) {
    float const* const first = partials + i * partial_width(g);
    auto const max_of = [&](int64_t s) { return first[s * partial_stride + g.value_width]; };
    float max = -kInfinity, total = 0.f;
    for (int64_t s = 0; s < splits; ++s) max = max_of(s) <= max ? max : max_of(s);
    for (int64_t s = 0; s < splits; ++s) {
      if (max_of(s) != -kInfinity)
        total += exp(max_of(s) - max) * first[s * partial_stride + g.value_width + 1];
    }
    T* const out = static_cast<T*>(p.o) + g.offset(p, unit, head, i, p.value_dim);
    for_each_vec(p.value_dim, [&](int64_t c, int n) {
      Vec o{};
      for (int64_t s = 0; s < splits; ++s) {
        if (max_of(s) != -kInfinity)
          o += load(first + s * partial_stride + c) * (exp(max_of(s) - max) / total);
      }
      store_some(out + c, o, n);
    });
  }
}

}  // namespace
}  // namespace lt2::loop_state::LT2_ISA
