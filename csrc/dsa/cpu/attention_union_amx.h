// Products of a block with all keys that any of its queries selects on the tile unit (AMX), where those are
// few for their number: no row is copied for each query, and keys that a query does not select have the
// weight 0. Rows (query, head) of the block are columns here, kColumns at a time, which stay in the cache
// while keys pass.
#pragma once

#include "dsa/cpu/attention_amx.h"

namespace lt2::dsa::LT2_ISA {
namespace {

constexpr int kSpan = 256;        // keys at a time
constexpr int kColumns = 64;      // (query, head) at a time: four tiles side by side
constexpr int kSummedRows = 256;  // (query, head) that are summed at a time for dk and dv

// Tiles 0 to 3 are sums [n, 64], 4 their left operand, 5 to 7 columns of the right one.
inline void configure_columns(int64_t n) {
  TileShapes shapes;
  for (int i = 0; i < 5; ++i) shapes.set(i, n, 64);
  for (int i = 5; i < 8; ++i) shapes.set(i, 16, 64);
  configure(shapes);
}

// c [n, 64] = a [n, 32 steps] b [16 steps, 64, 2], or c + that; strides in bytes. The rows of `ahead`, as
// long as those of a, are fetched meanwhile.
template <bool kAdd>
inline void multiply_columns(Bf16 const* a, int64_t a_row, uint32_t const* b, int64_t b_row, int64_t steps,
                             float* c, int64_t c_row, Bf16 const* ahead) {
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_row);
    _tile_loadd(1, c + 16, c_row);
    _tile_loadd(2, c + 32, c_row);
    _tile_loadd(3, c + 48, c_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += kTileRow, b += 4 * b_row) {
    _tile_loadd(4, a, a_row);
    _tile_loadd(5, b, b_row);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + 16, b_row);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, b + 32, b_row);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, b + 48, b_row);
    _tile_dpbf16ps(3, 4, 5);
    for (int i = 0; i < 16; ++i)
      __builtin_prefetch(reinterpret_cast<char const*>(ahead) + i * a_row + 64 * s);
  }
  _tile_stored(0, c, c_row);
  _tile_stored(1, c + 16, c_row);
  _tile_stored(2, c + 32, c_row);
  _tile_stored(3, c + 48, c_row);
}

// Elements [0, 16) of two rows as pairs.
inline VecU pair_rows(Bf16 const* even, Bf16 const* odd) {
  return (even == nullptr ? VecU{} : widen_lanes(even)) | (odd == nullptr ? VecU{} : widen_lanes(odd) << 16);
}

// Of bf16 in pairs: collects lanes with an infinity or NaN. 0 times one is not 0.
struct Finite {
  VecI bad{};
  void see(VecU pairs) {
    VecU const low = VecU{} + 0x7f80u, high = VecU{} + 0x7f800000u;
    bad |= reinterpret_cast<VecI>(((pairs & low) == low) | ((pairs & high) == high));
  }
  bool all() const {
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(bad), reinterpret_cast<__m512i>(bad)) == 0;
  }
};
inline bool is_finite(Bf16 const* row, int64_t dim) {
  Finite finite;
  for (int64_t d = 0; d < dim; d += kLanes) finite.see(widen_lanes(row + d));
  return finite.all();
}

// The keys that some query of a block selects, in order: [begin, begin + count) where that is hardly more,
// else a list. None if there are so many, or a query's not in order, that each query's are better copied.
struct Union {
  int64_t begin = 0, count = 0;
  int32_t const* list = nullptr;
  // Where a query selects nearly half of them or more: for each query the bits of those, 16 keys a word,
  // padded.
  uint16_t const* bits = nullptr;
  int32_t const* places =
      nullptr;  // else, of a list: what each query selects, in the list, padded(topk) apart

  Union() = default;
  Union(AttentionParams const& p, Block const& block, bool with_bits, Arena& arena) {
    int64_t selected = 0, first = INT64_MAX, last = 0;
    int32_t disorder = 0;
    for (int t = 0; t < block.count; ++t) {
      auto const& s = block.selected[t];
      if (s.count == 0) continue;
      selected += s.count;
      first = s.keys[0] < first ? s.keys[0] : first;
      last = s.keys[s.count - 1] > last ? s.keys[s.count - 1] : last;
      for (int64_t i = 1; i < s.count; ++i) disorder |= s.keys[i - 1] >= s.keys[i];
    }
    if (disorder != 0 || selected == 0) return;
    int64_t const range = last + 1 - first, most = selected * kSparsest / block.count;
    Arena a = arena;
    int32_t* const own = ints(a, kUnitedQueries * block.width);
    int32_t* const keys = ints(a, padded(most < range ? most : range));
    int32_t* const place = ints(a, padded(range));
    int64_t const united = p.dense ? range : mark(block, first, range, most, place);
    if (united > most) return;
    begin = first;
    count = 4 * united < 3 * range ? united : range;
    if (count < range) {
      enlist(range, keys, place);
      list = keys;
    }
    if (with_bits && rounded() <= 2 * block.width && count * block.count <= 2 * selected + 64 * block.count) {
      find_bits(block, place, reinterpret_cast<uint16_t*>(own), reinterpret_cast<uint8_t*>(a.next));
    } else if (list != nullptr) {
      for (int t = 0; t < block.count; ++t) {
        auto const& s = block.selected[t];
        for (int64_t i = 0; i < s.count; ++i) own[t * block.width + i] = place[s.keys[i] - begin];
      }
      places = own;
    }
    arena.next = reinterpret_cast<float*>(keys) + (list == nullptr ? 0 : padded(count));
  }

  int64_t rounded() const { return (count + kTileRow - 1) / kTileRow * kTileRow; }

 private:
  static int32_t* ints(Arena& a, int64_t n) { return reinterpret_cast<int32_t*>(a.take(n)); }

  // Marks them; returns how many, or, when there are more than `most`, some such number.
  static int64_t mark(Block const& block, int64_t first, int64_t range, int64_t most, int32_t* place) {
    __builtin_memset(place, 0, static_cast<size_t>(padded(range)) * sizeof(int32_t));
    int64_t n = 0;
    for (int t = 0; t < block.count && n <= most; ++t) {
      auto const& s = block.selected[t];
      for (int64_t i = 0; i < s.count; ++i) place[s.keys[i] - first] = 1;
      if (t + 1 != block.count && ((t + 1) & t) != 0) continue;  // counts after 1, 2, 4, .. queries
      n = 0;
      for (int64_t i = 0; i < range; ++i) n += place[i];
    }
    return n;
  }

  // The list out of the marks, which become places in it.
  void enlist(int64_t range, int32_t* keys, int32_t* place) const {
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t n = 0;
    for (int64_t i = 0; i < range; i += kLanes) {
      __mmask16 const marked = _mm512_test_epi32_mask(_mm512_loadu_si512(place + i), _mm512_set1_epi32(1));
      auto const from = [&](int64_t x) {
        return _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(x)));
      };
      _mm512_mask_compressstoreu_epi32(keys + n, marked, from(begin + i));
      _mm512_storeu_si512(place + i, _mm512_maskz_expand_epi32(marked, from(n)));
      n += __builtin_popcount(marked);
    }
  }

  void find_bits(Block const& block, int32_t const* place, uint16_t* out, uint8_t* marks) {
    int64_t const words = rounded() / kLanes;
    __builtin_memset(marks, 0, static_cast<size_t>(rounded()));
    for (int t = 0; t < block.count; ++t) {
      auto const& s = block.selected[t];
      auto const at = [&](int64_t i) {
        return list == nullptr ? s.keys[i] - begin : place[s.keys[i] - begin];
      };
      bool const adjacent = s.count > 0 && s.keys[s.count - 1] - s.keys[0] == s.count - 1;
      if (adjacent) {
        __builtin_memset(marks + at(0), 1, static_cast<size_t>(s.count));
      } else {
        for (int64_t i = 0; i < s.count; ++i) marks[at(i)] = 1;
      }
      for (int64_t w = 0; w < words; ++w) {
        auto* const sixteen = reinterpret_cast<__m128i*>(marks + w * kLanes);
        __m128i const x = _mm_loadu_si128(sixteen);
        out[t * words + w] = _mm_test_epi8_mask(x, x);
        _mm_storeu_si128(sixteen, _mm_setzero_si128());
      }
    }
    bits = out;
  }
};

// Rows of the keys of a union.
struct UnionRows : Rows<Bf16> {
  Union const& keys;

  UnionRows(Heads const& x, int64_t dim, BlockHeads const& heads, Union const& keys)
      : Rows<Bf16>(x, dim, heads.document, heads.head), keys(keys) {}
  int64_t key(int64_t i) const { return keys.list == nullptr ? keys.begin + i : keys.list[i]; }
  Bf16 const* at(int64_t i) const { return data + key(i) * stride; }
};

// out [dim, kSpan] = the transpose of rows [first, first + n), zeros up to a multiple of 32 of them. Rows
// that are not finite become zeros; returns whether all are.
inline bool turn_rows(UnionRows const& rows, int64_t first, int64_t n, Bf16* out) {
  Finite finite;
  for (int64_t j = 0; j < n; j += kTileRow) {
    for (int64_t d = 0; d < rows.dim; d += kLanes) {
      Vec pairs[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        auto const row = [&](int64_t at) { return at < n ? rows.at(first + at) + d : nullptr; };
        VecU const x = pair_rows(row(j + 2 * i), row(j + 2 * i + 1));
        finite.see(x);
        pairs[i] = reinterpret_cast<Vec>(x);
      }
      exchange<1>(pairs);
      for (int64_t i = 0; i < kLanes; ++i) {
        __builtin_memcpy(out + (d + i) * kSpan + j, &pairs[i], sizeof(Vec));
      }
    }
  }
  if (finite.all()) return true;
  for (int64_t j = 0; j < n; ++j) {
    if (is_finite(rows.at(first + j), rows.dim)) continue;
    for (int64_t d = 0; d < rows.dim; ++d) out[d * kSpan + j] = 0;
  }
  return false;
}

// f(i) for tiles of 16 keys [i, ..) out of n, the last of them as short as it has to be.
template <class F>
inline void each_tile(int64_t n, F const& f) {
  configure_columns(16);
  for (int64_t i = 0; i + 16 <= n; i += 16) f(i);
  if (n % 16 == 0) return;
  configure_columns(n % 16);
  f(n / 16 * 16);
}

// f(first, n) for kSpan keys of a union at a time.
template <class F>
inline void each_span(Union const& keys, F const& f) {
  for (int64_t first = 0; first < keys.count; first += kSpan) {
    f(first, keys.count - first < kSpan ? keys.count - first : kSpan);
  }
}

// to[s] += sum_r w[s][r] left[r] for the keys s of a union. fill(first, n, r, m, w) sets w [n, kSummedRows]
// for n keys and m rows, rounded, from r on; alone(r, x) adds row r, which is not finite.
template <class Fill, class Alone>
inline void add_outer_union(BlockHeads const& heads, Union const& keys, Heads const& left, int64_t dim,
                            float* rows, float* to, int64_t size, Fill const& fill, Alone const& alone) {
  auto* const packed = reinterpret_cast<uint32_t*>(rows);  // pairs of rows [.., dim]
  int64_t const count = heads.rows(), all = (count + kTileRow - 1) / kTileRow * kTileRow;
  for (int64_t r = 0; r < all; r += 2) {
    Bf16 const* pair[2] = {};
    for (int64_t i = r; i < r + 2 && i < count; ++i) {
      Bf16 const* const x = heads.row<Bf16>(left, i);
      if (is_finite(x, dim)) {
        pair[i - r] = x;
        continue;
      }
      alignas(64) float wide[kMostDim];
      widen(x, dim, wide);
      alone(i, wide);
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      VecU const x =
          pair_rows(pair[0] == nullptr ? nullptr : pair[0] + d, pair[1] == nullptr ? nullptr : pair[1] + d);
      __builtin_memcpy(packed + r / 2 * dim + d, &x, sizeof(x));
    }
  }
  alignas(64) Bf16 weights[kSpan * kSummedRows];
  each_span(keys, [&](int64_t first, int64_t n) {
    for (int64_t r = 0; r < all; r += kSummedRows) {
      int64_t const summed = all - r < kSummedRows ? all - r : kSummedRows;
      fill(first, n, r, summed, weights);
      for (int64_t d = 0; d < dim; d += kColumns) {
        each_tile(n, [&](int64_t i) {
          auto const multiply = [&]<bool kAdd>(float* out, int64_t row) {
            multiply_columns<kAdd>(weights + i * kSummedRows, 2 * kSummedRows, packed + r / 2 * dim + d,
                                   4 * dim, summed / kTileRow, out, 4 * row,
                                   weights + (i + 16) % kSpan * kSummedRows);
          };
          if (keys.list == nullptr)
            return multiply.template operator()<true>(to + (keys.begin + first + i) * size + d, size);
          alignas(64) float sums[16 * kColumns];
          multiply.template operator()<false>(sums, kColumns);
          for (int64_t j = 0; j < 16 && i + j < n; ++j) {
            float* const row = to + keys.list[first + i + j] * size + d;
            for (int64_t c = 0; c < kColumns; c += kLanes) {
              store(row + c, load(row + c) + load(sums + j * kColumns + c));
            }
          }
        });
      }
    }
  });
  asm volatile("tilerelease");
}

template <int kLog>
struct UnionProducts : BlockHeads {
  static constexpr int kHeads = 1 << kLog;
  typedef uint32_t Group __attribute__((vector_size(4 * kHeads)));  // of the heads of a query
  Union const& keys;

  UnionProducts(BlockHeads const& block, Union const& keys) : BlockHeads(block), keys(keys) {}

  // f(i, n, at) for n selected keys [i, ..) at a time of those in [first, stop) of the union: key j is first
  // + at[j] there, and those after the last are `first`. `next` goes on behind them.
  template <class F>
  void selected_keys(int64_t query, int64_t first, int64_t stop, int64_t& next, F const& f) const {
    Selection const& s = block.selected[query];
    int32_t const* const places = keys.list == nullptr ? s.keys : keys.places + query * width;
    int64_t const zero = keys.list == nullptr ? keys.begin : 0;
    auto const splat = [&](int64_t place) { return _mm512_set1_epi32(static_cast<int>(zero + place)); };
    for (int n = kLanes; n == kLanes && next < s.count; next += n) {
      auto const valid =
          static_cast<__mmask16>(s.count - next < kLanes ? (1 << (s.count - next)) - 1 : 0xffff);
      __m512i const x = _mm512_maskz_loadu_epi32(valid, places + next);
      auto const below = _mm512_mask_cmplt_epi32_mask(valid, x, splat(stop));
      n = __builtin_popcount(below);
      alignas(64) int32_t at[kLanes];
      _mm512_store_si512(at, _mm512_maskz_sub_epi32(below, x, splat(first)));
      if (n > 0) f(next, n, at);
    }
  }

  // scores[r][i] = scale left[r] . right[i-th selected key]
  void score(Heads const& left, Heads const& right, int64_t dim, float scale, float /*rest*/, float* rows,
             float* scores) const {
    auto* const packed = reinterpret_cast<uint32_t*>(rows);  // pairs, [dim / 2, kColumns] of kColumns rows
    alignas(64) uint32_t copied[kLanes * kMostDim / 2];
    for (int64_t r = 0; r < rows_padded(); r += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        uint32_t* const to = copied + i * dim / 2;
        if (r + i < this->rows()) {
          __builtin_memcpy(to, row<Bf16>(left, r + i), static_cast<size_t>(dim) * sizeof(Bf16));
          Bf16 const* const later = row<Bf16>(left, r + i + kLanes);
          for (int64_t d = 0; d < dim; d += kTileRow) __builtin_prefetch(later + d);
        } else {
          __builtin_memset(to, 0, static_cast<size_t>(dim) * sizeof(Bf16));
        }
      }
      auto* const out = reinterpret_cast<float*>(packed) + r / kColumns * kColumns * dim / 2 + r % kColumns;
      for (int64_t d = 0; d < dim / 2; d += kLanes) {
        transpose_block(reinterpret_cast<float*>(copied) + d, dim / 2, out + d * kColumns, kColumns);
      }
    }
    UnionRows const all(right, dim, *this, keys);
    alignas(64) Bf16 copies[kSpan * kMostDim];
    alignas(64) float products[kSpan * kColumns];
    int64_t next[kAttendQueries] = {};
    each_span(keys, [&](int64_t first, int64_t n) {
      Bf16 const* span = all.at(first);
      int64_t stride = all.stride;
      if (keys.list != nullptr) {
        for (int64_t i = 0; i < n; ++i) {
          if (i + kCopiesAhead < n) all.prefetch(all.key(first + i + kCopiesAhead), 0, dim);
          __builtin_memcpy(copies + i * dim, all.at(first + i), static_cast<size_t>(dim) * sizeof(Bf16));
        }
        span = copies;
        stride = dim;
      }
      for (int64_t r = 0; r < this->rows(); r += kColumns) {
        int64_t const round = n < 16 ? 16 : n / 16 * 16;
        each_tile(n, [&](int64_t i) {
          multiply_columns<false>(span + i * stride, 2 * stride, packed + r * dim / 2, 4 * kColumns,
                                  dim / kTileRow, products + i * kColumns, 4 * kColumns,
                                  span + (i + 16) % round * stride);
        });
        each_query(r, [&](int64_t query, int64_t column) {
          selected_keys(query, first, first + n, next[query], [&](int64_t i, int count, int32_t const* at) {
            auto const valid = static_cast<__mmask16>((1 << count) - 1);
            VecI rows_at;
            __builtin_memcpy(&rows_at, at, sizeof(rows_at));
            rows_at *= kColumns;
            for (int64_t h = 0; h < kHeads; ++h) {
              __m512 const x =
                  _mm512_mask_i32gather_ps(_mm512_setzero_ps(), valid, reinterpret_cast<__m512i>(rows_at),
                                           products + column + h, sizeof(float));
              float* const to = scores + (query * kHeads + h) * width + i;
              _mm512_mask_storeu_ps(to, valid, x * _mm512_set1_ps(scale));
            }
          });
        });
      }
    });
    asm volatile("tilerelease");
  }

  // out[r] = sum_i weights[r][i] right[i-th selected key]
  void add(float const* weights, Heads const& right, int64_t dim, float* out) const {
    __builtin_memset(out, 0, static_cast<size_t>(rows_padded() * dim) * sizeof(float));
    UnionRows const all(right, dim, *this, keys);
    alignas(64) Bf16 turned[kMostDim * kSpan];
    alignas(64) uint32_t pairs[kSpan / 2 * kColumns];  // of keys
    int64_t next[kAttendQueries] = {};
    VecI lane{};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    bool finite = true;
    configure_columns(16);
    each_span(keys, [&](int64_t first, int64_t n) {
      finite &= turn_rows(all, first, n, turned);
      int64_t const steps = (n + kTileRow - 1) / kTileRow;
      for (int64_t r = 0; r < rows(); r += kColumns) {
        __builtin_memset(pairs, 0, static_cast<size_t>(steps * 16 * kColumns) * sizeof(uint32_t));
        each_query(r, [&](int64_t query, int64_t column) {
          rounded_weights(
              weights, query, first, first + n, next[query], [&](int, int32_t const* at, Bf16 const* x) {
                VecI shift;
                __builtin_memcpy(&shift, at, sizeof(shift));
                shift = (shift & 1) << 4;
                alignas(64) Group halves[kLanes];
                for (int h = 0; h < kHeads; ++h) {  // vector h is of kLanes / kHeads keys
                  VecU const y = widen_lanes(x + h * kLanes)
                                 << __builtin_shuffle(shift, lane / kHeads + h * kLanes / kHeads);
                  __builtin_memcpy(reinterpret_cast<char*>(halves) + h * sizeof(y), &y, sizeof(y));
                }
#pragma GCC unroll 16
                for (int j = 0; j < kLanes; ++j) {
                  uint32_t* const to = pairs + at[j] / 2 * kColumns + column;
                  Group both;
                  __builtin_memcpy(&both, to, sizeof(both));
                  both |= halves[j];
                  __builtin_memcpy(to, &both, sizeof(both));
                }
              });
        });
        for (int64_t d = 0; d < dim; d += 16) {
          multiply_columns<true>(turned + d * kSpan, 2 * kSpan, pairs, 4 * kColumns, steps,
                                 out + r * dim + d * kColumns, 4 * kColumns, turned + (d + 16) % dim * kSpan);
        }
      }
    });
    asm volatile("tilerelease");
    alignas(64) float sums[kMostDim * kColumns];
    for (int64_t r = 0; r < rows(); r += kColumns) {
      float* const to = out + r * dim;
      __builtin_memcpy(sums, to, static_cast<size_t>(dim * kColumns) * sizeof(float));
      for (int64_t d = 0; d < dim; d += kLanes) {
        for (int64_t c = 0; c < kColumns; c += kLanes) {
          transpose_block(sums + d * kColumns + c, kColumns, to + c * dim + d, dim);
        }
      }
    }
    for (int64_t query = 0; query < block.count && !finite; ++query) {
      Selection const& s = block.selected[query];
      for (int64_t i = 0; i < s.count; ++i) {
        if (is_finite(all.data + s.keys[i] * all.stride, dim)) continue;
        add_heads<kHeads>(weights + query * kHeads * width + i, width, all, s.keys + i, 1,
                          out + query * kHeads * dim);
      }
    }
  }

  // to[s] += sum_r weights[r][i] left[r] for the i-th selected key s, rows of `to` `size` apart.
  void add_outer(float const* weights, Heads const& left, int64_t dim, float* rows, float* to,
                 int64_t size) const {
    int64_t next[kAttendQueries] = {};
    add_outer_union(
        *this, keys, left, dim, rows, to, size,
        [&](int64_t first, int64_t n, int64_t r, int64_t summed, Bf16* dense) {
          __builtin_memset(dense, 0, static_cast<size_t>(n * kSummedRows) * sizeof(Bf16));
          for (int64_t c = 0; c < summed && r + c < this->rows(); c += kHeads) {
            int64_t const query = (r + c) / kHeads;
            rounded_weights(weights, query, first, first + n, next[query],
                            [&](int selected, int32_t const* at, Bf16 const* x) {
                              for (int j = 0; j < selected; ++j) {
                                __builtin_memcpy(dense + at[j] * kSummedRows + c, x + j * kHeads,
                                                 kHeads * sizeof(Bf16));
                              }
                            });
          }
        },
        [&](int64_t r, float const* row) {
          Selection const& s = block.selected[r / kHeads];
          outer_heads<1>(weights + r * width, width, row, dim, s.keys, s.count, to, size);
        });
  }

 private:
  int64_t rows_padded() const { return (rows() + kColumns - 1) / kColumns * kColumns; }

  // f(query, column) for queries of the columns [r, r + kColumns).
  template <class F>
  void each_query(int64_t r, F const& f) const {
    for (int64_t c = 0; c < kColumns && r + c < rows(); c += kHeads) f((r + c) / kHeads, c);
  }

  // f(n, at, x) as selected_keys() gives them, with the weights x [kLanes, kHeads], 0 after the last.
  template <class F>
  void rounded_weights(float const* weights, int64_t query, int64_t first, int64_t stop, int64_t& next,
                       F const& f) const {
    selected_keys(query, first, stop, next, [&](int64_t i, int count, int32_t const* at) {
      Vec x[kHeads];
      for (int64_t h = 0; h < kHeads; ++h) {
        auto const valid = static_cast<__mmask16>((1 << count) - 1);
        x[h] =
            reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(valid, weights + (query * kHeads + h) * width + i));
      }
      join_columns<kLog>(x);
      alignas(64) Bf16 rounded[kLanes * kHeads];
      for (int64_t h = 0; h < kHeads; ++h) {
        auto const low = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x[h]));
        __builtin_memcpy(rounded + h * kLanes, &low, sizeof(low));
      }
      f(count, at, rounded);
    });
  }
};

}  // namespace
}  // namespace lt2::dsa::LT2_ISA
