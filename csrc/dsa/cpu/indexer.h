// Lightning indexer of one block of queries: scores of a panel of keys at a time, never more, from which each
// query keeps its candidates. A score is the same sum in the same order wherever its query and key lie.
#pragma once

#include "common/cpu/gemm.h"
#include "dsa/cpu/kernels.h"

namespace lt2::dsa::LT2_ISA {
namespace {

using namespace lt2::LT2_ISA;

static_assert(kBlockQueries == kPanel && kBlockKeys == kPanel);

inline VecI splat(int32_t x) { return x - VecI{}; }

// A number in the order of scores: -0 equals 0, NaN is below everything.
constexpr int32_t kLowest = INT32_MIN;
inline VecI order(Vec score) {
  VecI const bits = reinterpret_cast<VecI>(score + 0.f);
  VecI const ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return score == score ? ordered : splat(kLowest);
}

// Appends the lanes of a and b whose `accepted` is -1, in order; returns how many.
inline int compress(VecI accepted, VecI a, VecI b, int32_t* to_a, int32_t* to_b) {
#if defined(__AVX512F__)
  __mmask16 const mask = _mm512_movepi32_mask(reinterpret_cast<__m512i>(accepted));
  if (mask == 0) return 0;
  _mm512_mask_compressstoreu_epi32(to_a, mask, reinterpret_cast<__m512i>(a));
  _mm512_mask_compressstoreu_epi32(to_b, mask, reinterpret_cast<__m512i>(b));
  return __builtin_popcount(mask);
#else
#if defined(__AVX2__)
  if (_mm256_testz_si256(reinterpret_cast<__m256i>(accepted), reinterpret_cast<__m256i>(accepted))) return 0;
#endif
  int n = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (!accepted[i]) continue;
    to_a[n] = a[i];
    to_b[n++] = b[i];
  }
  return n;
#endif
}

// Candidates of one query, ascending by index: order() of the score, and the index.
struct Candidates {
  int32_t *orders, *indices;
  int count;
  int32_t threshold;  // only scores above it are wanted

  // Scores of keys [first, first + kPanel); only keys before `limit` count.
  void append(float const* scores, int64_t first, int64_t limit) {
    VecI lane{};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    for (int c = 0; c < kPanel; c += kLanes) {
      VecI const index = lane + static_cast<int32_t>(first + c), key = order(load(scores + c));
      VecI const accepted = (key > splat(threshold)) & (index < splat(static_cast<int32_t>(limit)));
      count += compress(accepted, key, index, orders + count, indices + count);
    }
  }

  int at_least(int32_t bound) const {
    VecI n{};
    for (int i = 0; i < count; i += kLanes) {
      VecI keys;
      __builtin_memcpy(&keys, orders + i, sizeof(keys));
      n -= keys >= splat(bound);
    }
    int total = 0;
    for (int i = 0; i < kLanes; ++i) total += n[i];
    return total;
  }

  // Keeps the best k, k < count, of equals the first ones.
  void cut(int k) {
    for (int i = count; i % kLanes != 0; ++i) orders[i] = kLowest;
    uint32_t bound = 0;  // the k-th largest, offset by 2^31, from its highest bit on
    for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
      int const n = at_least(static_cast<int32_t>((bound | bit) ^ 0x80000000u));
      if (n >= k) bound |= bit;
      if (n == k) break;
    }
    threshold = static_cast<int32_t>(bound ^ 0x80000000u);
    int equals = k - (threshold == INT32_MAX ? 0 : at_least(threshold + 1));
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      int32_t const key = orders[i], index = indices[i];
      bool const equal = key == threshold && equals > 0;
      equals -= equal;
      orders[kept] = key;
      indices[kept] = index;
      kept += key > threshold || equal;
    }
    count = kept;
  }
};

// packed[d][i] = rows[i][d] for i < n, zeros up to kPanel.
template <class T>
inline void pack_rows(T const* rows, int64_t stride, int n, int64_t dim, float* packed) {
  for (int i = 0; i < kPanel; ++i) {
    for (int64_t d = 0; d < dim; ++d) packed[d * kPanel + i] = i < n ? to_float(rows[i * stride + d]) : 0.f;
  }
}

template <class T>
void pack_keys(IndexerParams const& p, Document const& document, int64_t panel, float* packed) {
  int64_t const first = panel * kPanel, left = document.keys - first;
  auto const* const k = static_cast<T const*>(p.k.data) + document.row * p.k.batch;
  pack_rows(k + (document.key + first) * p.k.token, p.k.token,
            static_cast<int>(left < kPanel ? left : kPanel), p.dim, packed);
}

// Packed queries [HI][DI][kPanel] and weights [HI][kPanel] of a block.
struct Queries {
  float *packed, *weights;
  int count;
};

template <class T>
inline void pack_queries(IndexerParams const& p, int64_t row, int64_t first, Queries const& queries) {
  auto const* const q = static_cast<T const*>(p.q.data) + row * p.q.batch + first * p.q.token;
  auto const* const w = static_cast<float const*>(p.weights.data);
  for (int64_t j = 0; j < p.heads; ++j) {
    pack_rows(q + j * p.q.head, p.q.token, queries.count, p.dim, queries.packed + j * p.dim * kPanel);
    for (int i = 0; i < kPanel; ++i) {
      queries.weights[j * kPanel + i] =
          i >= queries.count ? 0.f
          : w == nullptr     ? 1.f
                             : w[row * p.weights.batch + (first + i) * p.weights.token + j * p.weights.head];
    }
  }
}

// scores[i][:] of one panel of keys, for all queries of the block.
inline void score(IndexerParams const& p, Queries const& queries, float const* keys,
                  float (*scores)[kPanel]) {
  alignas(64) float dots[kTileRows][kPanel];
  for (int i = 0; i < queries.count; i += kTileRows) {
    for (int c = 0; c < kPanel; c += kTileCols) {
      for (int64_t j = 0; j < p.heads; ++j) {
        multiply_tile<true>(queries.packed + j * p.dim * kPanel + i, 0, keys + c, dots[0], 0,
                            static_cast<int>(p.dim), 0.f);
        float const* const weights = queries.weights + j * kPanel + i;
        for (int r = 0; r < kTileRows; ++r) {
          for (int v = 0; v < kTileCols; v += kLanes) {
            Vec x = load(dots[r] + v) * p.scale;
            if (p.relu) x = x < 0.f ? Vec{} : x;
            float* const out = scores[i + r] + c + v;
            store(out, j == 0 ? x * weights[r] : load(out) + x * weights[r]);
          }
        }
      }
    }
  }
}

void pack(IndexerParams const& p, Document const& document, int64_t panel, float* packed) {
  (p.dtype == Dtype::kBFloat16 ? pack_keys<Bf16> : pack_keys<float>)(p, document, panel, packed);
}

void select(IndexerParams const& p, Document const& document, int64_t first, float const* packed,
            float* workspace) {
  int64_t const left = document.queries - first;
  int const count = static_cast<int>(left < kBlockQueries ? left : kBlockQueries);
  int const k = static_cast<int>(kept(p));
  int64_t const size = candidates(p);
  Candidates lists[kBlockQueries];
  for (int i = 0; i < count; ++i) {
    auto* const list = reinterpret_cast<int32_t*>(workspace) + 2 * i * size;
    lists[i] = {list, list + size, 0, kLowest};
  }
  float* const q = workspace + kBlockQueries * 2 * size;
  Queries const queries{q, q + p.heads * p.dim * kPanel, count};
  (p.dtype == Dtype::kBFloat16 ? pack_queries<Bf16> : pack_queries<float>)(p, document.row,
                                                                           document.query + first, queries);
  alignas(64) float scores[kBlockQueries][kPanel];
  int64_t const seen = visible(document, first + count - 1);
  for (int64_t key = 0; key < seen; key += kPanel) {
    score(p, queries, packed + key * p.dim, scores);
    for (int i = 0; i < count; ++i) {
      int64_t const limit = visible(document, first + i);
      if (key >= limit) continue;
      if (lists[i].count + kPanel > size) lists[i].cut(k);
      lists[i].append(scores[i], key, limit);
    }
  }
  for (int i = 0; i < count; ++i) {
    if (lists[i].count > k) lists[i].cut(k);
    int32_t* const out = p.indices + (document.row * p.tokens + document.query + first + i) * p.topk;
    __builtin_memcpy(out, lists[i].indices, lists[i].count * sizeof(int32_t));
    for (int64_t c = lists[i].count; c < p.topk; ++c) out[c] = -1;
  }
}

}  // namespace
}  // namespace lt2::dsa::LT2_ISA
