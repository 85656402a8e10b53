// Lightning indexer of one block of queries: scores of a panel of keys at a time, never more, from which each
// query keeps its candidates. A score is the same sum in the same order wherever its query and key lie, and
// whether a pool is on the way to it.
#pragma once

#include "common/cpu/gemm.h"
#include "dsa/cpu/kernels.h"

namespace lt2::dsa::LT2_ISA {
namespace {

using namespace lt2::LT2_ISA;

static_assert(kBlockQueries == kPanel && kBlockKeys == kPanel);

using lt2::LT2_ISA::splat;
inline VecI splat(int32_t x) { return x - VecI{}; }

// A number in the order of scores: -0 equals 0, NaN is below everything.
constexpr int32_t kLowest = INT32_MIN;
inline VecI order(Vec score) {
  VecI const bits = reinterpret_cast<VecI>(score + 0.f);
  VecI const ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return score == score ? ordered : splat(kLowest);
}

// Appends the lanes of a and b whose `accepted` is -1, in order; returns how many. May write kLanes numbers.
// (Stores that compress are slow on AMD's Zen 4.)
inline int compress(VecI accepted, VecI a, VecI b, int32_t* to_a, int32_t* to_b) {
#if defined(__AVX512F__)
  __mmask16 const mask = _mm512_movepi32_mask(reinterpret_cast<__m512i>(accepted));
  if (mask == 0) return 0;
  _mm512_storeu_si512(to_a, _mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(a)));
  _mm512_storeu_si512(to_b, _mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(b)));
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
    bool apart = false;  // exactly k are not below it
    for (uint32_t bit = 1u << 31; bit != 0 && !apart; bit >>= 1) {
      int const n = at_least(static_cast<int32_t>((bound | bit) ^ 0x80000000u));
      if (n >= k) bound |= bit;
      apart = n == k;
    }
    threshold = static_cast<int32_t>(bound ^ 0x80000000u);
    int equals = apart ? 0 : k - (threshold == INT32_MAX ? 0 : at_least(threshold + 1));
    int kept = 0;
    for (int i = 0; i < count; i += kLanes) {
      VecI key, index;
      __builtin_memcpy(&key, orders + i, sizeof(key));
      __builtin_memcpy(&index, indices + i, sizeof(index));
      VecI accepted = apart ? key >= splat(threshold) : key > splat(threshold);
      for (int lane = 0; lane < kLanes && equals > 0; ++lane) {
        if (key[lane] != threshold) continue;
        accepted[lane] = -1;
        --equals;
      }
      kept += compress(accepted, key, index, orders + kept, indices + kept);
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

// rows[i][j][d] = q[first + i, j, d]
template <class T>
inline void copy_queries(IndexerParams const& p, int64_t row, int64_t first, int64_t count, float* rows) {
  auto const* const q = static_cast<T const*>(p.q.data) + row * p.q.batch + first * p.q.token;
  for (int64_t i = 0; i < count * p.heads; ++i) {
    T const* const from = q + i / p.heads * p.q.token + i % p.heads * p.q.head;
    for (int64_t d = 0; d < p.dim; ++d) rows[i * p.dim + d] = to_float(from[d]);
  }
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

// out[0, 2 kLanes) of a query += what head j has of its score, out of the products with the keys; = for j =
// 0.
inline void add_head(IndexerParams const& p, float weight, int64_t j, Vec const (&products)[2], float* out) {
  for (int v = 0; v < 2; ++v) {
    Vec x = products[v] * p.scale;
    if (p.relu) x = x < 0.f ? Vec{} : x;
    store(out + v * kLanes, j == 0 ? x * weight : load(out + v * kLanes) + x * weight);
  }
}

// scores[i][:] of one panel of keys, for all queries of the block.
inline void score(IndexerParams const& p, Queries const& queries, float const* keys,
                  float (*scores)[kPanel]) {
  for (int i = 0; i < queries.count; i += kTileRows) {
    for (int c = 0; c < kPanel; c += kTileCols) {
      for (int64_t j = 0; j < p.heads; ++j) {
        Tile products{};
        accumulate_tile<true>(queries.packed + j * p.dim * kPanel + i, 0, keys + c, products, 0,
                              static_cast<int>(p.dim));
        float const* const weights = queries.weights + j * kPanel + i;
        for (int r = 0; r < kTileRows; ++r) add_head(p, weights[r], j, products[r], scores[i + r] + c);
      }
    }
  }
}

// Means [panel * kPanel, ..) of the document; every one is of p.pool keys.
template <class T>
void pack_mean_rows(IndexerParams const& p, Document const& document, int64_t panel, float* packed) {
  int64_t const first = panel * kPanel, left = document.keys / p.pool - first;
  auto const* const k = static_cast<T const*>(p.k.data) + document.row * p.k.batch +
                        (document.key + first * p.pool) * p.k.token;
  float const factor = 1.f / static_cast<float>(p.pool);
  for (int64_t i = 0; i < kPanel; ++i) {
    for (int64_t d = 0; d < p.dim; ++d) packed[d * kPanel + i] = 0.f;
    for (int64_t s = i * p.pool; s < (i + 1) * p.pool && i < left; ++s) {
      for (int64_t d = 0; d < p.dim; ++d) packed[d * kPanel + i] += to_float(k[s * p.k.token + d]) * factor;
    }
  }
}

void pack(IndexerParams const& p, Document const& document, int64_t panel, float* packed) {
  (p.dtype == Dtype::kBFloat16 ? pack_keys<Bf16> : pack_keys<float>)(p, document, panel, packed);
}

void pack_means(IndexerParams const& p, Document const& document, int64_t panel, float* packed) {
  (p.dtype == Dtype::kBFloat16 ? pack_mean_rows<Bf16> : pack_mean_rows<float>)(p, document, panel, packed);
}

// Lists of candidates of a block of queries, each up to its own limit.
struct Lists {
  Candidates list[kBlockQueries];
  int64_t limits[kBlockQueries] = {};  // never falling
  int count;
  int kept;
  int64_t size;

  // Takes 2 * kBlockQueries * candidates(kept) floats.
  Lists(int64_t kept, int count, float* storage)
      : count(count), kept(static_cast<int>(kept)), size(candidates(kept)) {
    for (int i = 0; i < count; ++i) {
      auto* const at = reinterpret_cast<int32_t*>(storage) + 2 * i * size;
      list[i] = {at, at + size, 0, kLowest};
    }
  }

  void append(int i, float const* scores, int64_t first) {
    if (first >= limits[i]) return;
    if (list[i].count + kPanel > size) list[i].cut(kept);
    list[i].append(scores, first, limits[i]);
  }

  void finish() {
    for (int i = 0; i < count; ++i) {
      if (list[i].count > kept) list[i].cut(kept);
    }
  }
};

// Of all keys.
void search(IndexerParams const& p, Queries const& queries, float const* keys, Lists& lists) {
  alignas(64) float scores[kBlockQueries][kPanel];
  for (int64_t key = 0; key < lists.limits[lists.count - 1]; key += kPanel) {
    score(p, queries, keys + key * p.dim, scores);
    for (int i = 0; i < lists.count; ++i) lists.append(i, scores[i], key);
  }
}

// The blocks of keys for each query: all that it sees if they are few enough, else those whose means are
// best, and its newest.
void search_blocks(IndexerParams const& p, Queries const& queries, float const* means, Lists& blocks) {
  alignas(64) float scores[kBlockQueries][kPanel];
  bool const all = blocks.limits[blocks.count - 1] <= blocks.kept;
  for (int64_t block = 0; !all && block < blocks.limits[blocks.count - 1]; block += kPanel) {
    score(p, queries, means + block * p.dim, scores);
    for (int i = 0; i < blocks.count; ++i) {
      for (int c = 0; c < kPanel; c += kLanes) {
        Vec const x = load(scores[i] + c);
        store(scores[i] + c, x == x ? x : splat(-__builtin_inff()));
      }
      blocks.append(i, scores[i], block);
    }
  }
  blocks.finish();
  for (int i = 0; i < blocks.count; ++i) {
    auto& list = blocks.list[i];
    for (; all && list.count < blocks.limits[i]; ++list.count) list.indices[list.count] = list.count;
    list.indices[list.count++] = static_cast<int32_t>(blocks.limits[i]);
  }
}

// scores[n][:] of one panel of keys for the n-th of the `chosen` queries; rows: all queries, [query][HI][DI].
void score_chosen(IndexerParams const& p, Queries const& queries, float const* rows, int const* chosen,
                  int count, float const* keys, float (*scores)[kPanel]) {
  int const heads = static_cast<int>(p.heads), all = count * heads;
  for (int first = 0; first < all; first += kTileRows) {
    float const* row[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      int const at = first + r < all ? first + r : all - 1;
      row[r] = rows + (chosen[at / heads] * heads + at % heads) * p.dim;
    }
    for (int c = 0; c < kPanel; c += kTileCols) {
      Vec acc[kTileRows][2] = {};
      for (int64_t d = 0; d < p.dim; ++d) {
        Vec const b0 = load(keys + d * kPanel + c), b1 = load(keys + d * kPanel + c + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          Vec const x = splat(row[r][d]);
          acc[r][0] += x * b0;
          acc[r][1] += x * b1;
        }
      }
      for (int r = 0; r < kTileRows && first + r < all; ++r) {
        int const n = (first + r) / heads, head = (first + r) % heads;
        add_head(p, queries.weights[head * kPanel + chosen[n]], head, acc[r], scores[n] + c);
      }
    }
  }
}

// Of the keys of the blocks that each query has; block after block, for all queries that have it.
void search_chosen(IndexerParams const& p, Queries const& queries, float const* rows, float const* keys,
                   Lists const& blocks, Lists& lists) {
  alignas(64) float scores[kBlockQueries][kPanel];
  int next[kBlockQueries] = {}, chosen[kBlockQueries];
  for (int64_t block = 0; block * p.pool < lists.limits[lists.count - 1]; ++block) {
    int count = 0;
    for (int i = 0; i < lists.count; ++i) {
      auto const& list = blocks.list[i];
      if (next[i] == list.count || list.indices[next[i]] != block) continue;
      ++next[i];
      chosen[count++] = i;
    }
    if (count == 0) continue;
    int64_t const seen = lists.limits[chosen[count - 1]], end = (block + 1) * p.pool;
    for (int64_t key = block * p.pool; key < end && key < seen; key += kPanel) {
      score_chosen(p, queries, rows, chosen, count, keys + key * p.dim, scores);
      for (int n = 0; n < count; ++n) lists.append(chosen[n], scores[n], key);
    }
  }
}

void select(IndexerParams const& p, Document const& document, int64_t first, float const* packed,
            float const* means, float* workspace) {
  int64_t const left = document.queries - first, row = document.row, query = document.query + first;
  int const count = static_cast<int>(left < kBlockQueries ? left : kBlockQueries);
  bool const narrow = p.dtype == Dtype::kBFloat16;
  Lists lists(kept(p), count, workspace);
  for (int i = 0; i < count; ++i) lists.limits[i] = visible(document, first + i);
  float* const q = workspace + kBlockQueries * 2 * lists.size;
  Queries const queries{q, q + p.heads * p.dim * kPanel, count};
  (narrow ? pack_queries<Bf16> : pack_queries<float>)(p, row, query, queries);
  if (p.pool == 0) {
    search(p, queries, packed, lists);
  } else {
    float* const rows = queries.weights + p.heads * kPanel;
    (narrow ? copy_queries<Bf16> : copy_queries<float>)(p, row, query, count, rows);
    Lists blocks(kept_blocks(p), count, rows + kBlockQueries * p.heads * p.dim);
    for (int i = 0; i < count; ++i) {
      blocks.limits[i] = lists.limits[i] == 0 ? 0 : (lists.limits[i] - 1) / p.pool;
    }
    search_blocks(p, queries, means, blocks);
    search_chosen(p, queries, rows, packed, blocks, lists);
  }
  lists.finish();
  for (int i = 0; i < count; ++i) {
    auto const& list = lists.list[i];
    int32_t* const out = p.indices + (row * p.tokens + query + i) * p.topk;
    __builtin_memcpy(out, list.indices, list.count * sizeof(int32_t));
    for (int64_t c = list.count; c < p.topk; ++c) out[c] = -1;
  }
}

}  // namespace
}  // namespace lt2::dsa::LT2_ISA
