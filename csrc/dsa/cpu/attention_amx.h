// Products with the selected rows on the tile unit (AMX), for bf16: the rows of a run are copied together, as
// they are or as pairs of rows. Weights are rounded to bf16; sums are fp32.
#pragma once

#include "dsa/cpu/attention.h"

namespace lt2::dsa::LT2_ISA {
namespace {

constexpr int kBatch = 64, kMostDim = 128;  // keys that are copied at a time; D and DV
constexpr int kTileRow = 32;                // bf16 of a row of a tile
constexpr int kCopiesAhead = 8;             // rows that are fetched before they are copied

inline bool fits_tiles(AttentionParams const& p) {
  int64_t const G = p.query_heads / p.key_heads;
  return G <= kLanes && (G & (G - 1)) == 0 && p.dim <= kMostDim && p.dim % kTileRow == 0 &&
         p.value_dim <= kMostDim && p.value_dim % kTileRow == 0;
}

// Bytes of a row and rows of each tile.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
inline void configure(TileShapes const& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

// x [16, 1 << kLog] in the order of its elements; afterwards vector h is column h.
template <int kLog>
inline void split_columns(Vec* x) {
  if constexpr (kLog > 0) {
    constexpr int kCount = 1 << kLog;
    VecI even{}, odd{};
    for (int j = 0; j < kLanes; ++j) {
      even[j] = 2 * j;
      odd[j] = 2 * j + 1;
    }
    Vec y[kCount];
    for (int i = 0; i < kCount / 2; ++i) {
      y[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even);
      y[kCount / 2 + i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], odd);
    }
    split_columns<kLog - 1>(y);
    split_columns<kLog - 1>(y + kCount / 2);
    for (int i = 0; i < kCount / 2; ++i) {
      x[2 * i] = y[i];
      x[2 * i + 1] = y[kCount / 2 + i];
    }
  }
}

// The other way.
template <int kLog>
inline void join_columns(Vec* x) {
  if constexpr (kLog > 0) {
    constexpr int kCount = 1 << kLog;
    VecI low{}, high{};
    for (int j = 0; j < kLanes; ++j) {
      low[j] = j / 2 + j % 2 * kLanes;
      high[j] = low[j] + kLanes / 2;
    }
    Vec y[kCount];
    for (int i = 0; i < kCount / 2; ++i) {
      y[i] = x[2 * i];
      y[kCount / 2 + i] = x[2 * i + 1];
    }
    join_columns<kLog - 1>(y);
    join_columns<kLog - 1>(y + kCount / 2);
    for (int i = 0; i < kCount / 2; ++i) {
      x[2 * i] = __builtin_shuffle(y[i], y[kCount / 2 + i], low);
      x[2 * i + 1] = __builtin_shuffle(y[i], y[kCount / 2 + i], high);
    }
  }
}

// scores[h * width + j] = scale q[h] . k[keys[j]], j < n, and anything up to a multiple of kLanes.
// q: [D / 2, G, 2].
template <int kLog>
void score_run(Bf16 const* q, Rows<Bf16> const& k, int32_t const* keys, int64_t n, float scale, float* scores,
               int64_t width) {
  constexpr int64_t G = 1 << kLog;
  alignas(64) Bf16 rows[kBatch * kMostDim];
  alignas(64) float products[kBatch * G];
  int64_t const D = k.dim, steps = D / kTileRow;
  int64_t const pairs = 16 * 2 * G;  // of one tile of q
  _tile_loadd(0, q, 4 * G);
  if (steps > 1) _tile_loadd(1, q + pairs, 4 * G);
  if (steps > 2) _tile_loadd(2, q + 2 * pairs, 4 * G);
  if (steps > 3) _tile_loadd(3, q + 3 * pairs, 4 * G);
  for (int64_t first = 0; first < n; first += kBatch) {
    int64_t const count = n - first < kBatch ? n - first : kBatch;
    for (int64_t j = 0; j < count; ++j) {
      if (first + j + kCopiesAhead < n) k.prefetch(keys[first + j + kCopiesAhead], 0, D);
      Bf16 const* const row = k.data + keys[first + j] * k.stride;
      for (int64_t d = 0; d < D; d += kTileRow)
        _mm512_store_si512(rows + j * D + d, _mm512_loadu_si512(row + d));
    }
    for (int64_t j = 0; j < count; j += 16) {
      _tile_zero(6);
      _tile_loadd(4, rows + j * D, 2 * D);
      _tile_dpbf16ps(6, 4, 0);
      if (steps > 1) {
        _tile_loadd(5, rows + j * D + kTileRow, 2 * D);
        _tile_dpbf16ps(6, 5, 1);
      }
      if (steps > 2) {
        _tile_loadd(4, rows + j * D + 2 * kTileRow, 2 * D);
        _tile_dpbf16ps(6, 4, 2);
      }
      if (steps > 3) {
        _tile_loadd(5, rows + j * D + 3 * kTileRow, 2 * D);
        _tile_dpbf16ps(6, 5, 3);
      }
      _tile_stored(6, products + j * G, 4 * G);
    }
    for (int64_t j = 0; j < count; j += 16) {
      Vec columns[G];
      for (int h = 0; h < G; ++h) columns[h] = load(products + j * G + h * kLanes);
      split_columns<kLog>(columns);
      for (int h = 0; h < G; ++h) store(scores + h * width + first + j, columns[h] * scale);
    }
  }
}

// Rows of values in pairs: of every 32 elements first those of the lower halves of 8, then those of the
// upper.
inline void interleave_rows(Bf16 const* even, Bf16 const* odd, int64_t size, Bf16* out) {
  for (int64_t d = 0; d < size; d += kTileRow) {
    __m512i const a = _mm512_loadu_si512(even + d);
    __m512i const b = odd == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(odd + d);
    _mm512_store_si512(out + 2 * d, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(out + 2 * d + kTileRow, _mm512_unpackhi_epi16(a, b));
  }
}

// Undoes that order of 32 sums.
inline void order_sums(float* x) {
  VecI first{}, second{};
  for (int j = 0; j < kLanes; ++j) {
    first[j] = j / 8 * 4 + j % 4 + j / 4 % 2 * kLanes;
    second[j] = first[j] + kLanes / 2;
  }
  Vec const low = load(x), high = load(x + kLanes);
  store(x, __builtin_shuffle(low, high, first));
  store(x + kLanes, __builtin_shuffle(low, high, second));
}

// o[h] += sum_j weights[h * width + j] v[keys[j]], j < n; o [G, DV] in the order of interleave_rows().
inline void add_run(float const* weights, int64_t width, int64_t G, Rows<Bf16> const& v, int32_t const* keys,
                    int64_t n, float* o) {
  alignas(64) Bf16 pairs[kBatch * kMostDim];
  alignas(64) Bf16 rounded[kLanes * kBatch];
  int64_t const DV = v.dim;
  for (int64_t first = 0; first < n; first += kBatch) {
    int64_t const count = n - first < kBatch ? n - first : kBatch;
    int64_t const depth = (count + kTileRow - 1) / kTileRow * kTileRow;
    for (int64_t j = 0; j < depth; j += 2) {
      Bf16* const out = pairs + j * DV;
      auto const row = [&](int64_t i) { return v.data + keys[first + i] * v.stride; };
      for (int64_t i = first + j + kCopiesAhead; i < first + j + kCopiesAhead + 2 && i < n; ++i)
        v.prefetch(keys[i], 0, DV);
      if (j < count) {
        interleave_rows(row(j), j + 1 < count ? row(j + 1) : nullptr, DV, out);
      } else {
        __builtin_memset(out, 0, static_cast<size_t>(2 * DV) * sizeof(Bf16));
      }
    }
    for (int64_t h = 0; h < G; ++h) {
      for (int64_t j = 0; j < depth; j += kLanes) {
        Vec const x = load(weights + h * width + first + j);
        store(rounded + h * kBatch + j, first_lanes(x, count - j, 0.f));
      }
    }
    for (int64_t d = 0; d < DV; d += 2 * kTileRow) {
      bool const wide = d + 2 * kTileRow <= DV;
      float* const out = o + d;
      int64_t const row = 4 * DV;  // bytes, of sums and of pairs
      _tile_loadd(0, out, row);
      _tile_loadd(1, out + 16, row);
      if (wide) {
        _tile_loadd(2, out + 32, row);
        _tile_loadd(3, out + 48, row);
      }
      for (int64_t j = 0; j < depth; j += kTileRow) {
        Bf16 const* const b = pairs + j * DV + 2 * d;
        _tile_loadd(4, rounded + j, 2 * kBatch);
        _tile_loadd(5, b, row);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, b + 32, row);
        _tile_dpbf16ps(1, 4, 6);
        if (wide) {
          _tile_loadd(5, b + 64, row);
          _tile_dpbf16ps(2, 4, 5);
          _tile_loadd(6, b + 96, row);
          _tile_dpbf16ps(3, 4, 6);
        }
      }
      _tile_stored(0, out, row);
      _tile_stored(1, out + 16, row);
      if (wide) {
        _tile_stored(2, out + 32, row);
        _tile_stored(3, out + 48, row);
      }
    }
  }
}

struct TileProducts : RowProducts<Bf16> {
  using RowProducts::RowProducts;

  template <int kLog>
  void score_heads(Heads const& left, Heads const& right, int64_t dim, float scale, float* rows,
                   float* scores) const {
    constexpr int64_t kHeads = 1 << kLog;
    auto* const pairs = reinterpret_cast<Bf16*>(rows);  // [dim / 2, kHeads, 2] of each query
    for (int64_t t = 0; t < block.count; ++t) {
      for (int64_t d = 0; d < dim; d += kTileRow) {
        Vec x[kHeads];
        for (int64_t h = 0; h < kHeads; ++h) {
          __builtin_memcpy(&x[h], row<Bf16>(left, t * kHeads + h) + d, sizeof(Vec));
        }
        join_columns<kLog>(x);
        __builtin_memcpy(pairs + (t * dim + d) * kHeads, x, sizeof(x));
      }
    }
    TileShapes shapes;
    for (int i = 0; i < 4; ++i) shapes.set(i, 16, 4 * kHeads);
    shapes.set(4, 16, 64);
    shapes.set(5, 16, 64);
    shapes.set(6, 16, 4 * kHeads);
    configure(shapes);
    Rows<Bf16> const keys(right, dim, document, head);
    block.runs(document.keys, [&](int query, int64_t i, int64_t n) {
      score_run<kLog>(pairs + query * kHeads * dim, keys, block.selected[query].keys + i, n, scale,
                      scores + query * kHeads * width + i, width);
    });
    asm volatile("tilerelease");
  }

  void score(Heads const& left, Heads const& right, int64_t dim, float scale, float /*rest*/, float* rows,
             float* scores) const {
    auto const body = G == 1   ? &TileProducts::score_heads<0>
                      : G == 2 ? &TileProducts::score_heads<1>
                      : G == 4 ? &TileProducts::score_heads<2>
                      : G == 8 ? &TileProducts::score_heads<3>
                               : &TileProducts::score_heads<4>;
    (this->*body)(left, right, dim, scale, rows, scores);
  }

  void add(float const* weights, Heads const& right, int64_t dim, float* out) const {
    __builtin_memset(out, 0, static_cast<size_t>(rows() * dim) * sizeof(float));
    TileShapes shapes;
    for (int i = 0; i < 5; ++i) shapes.set(i, G, 64);
    shapes.set(5, 16, 64);
    shapes.set(6, 16, 64);
    configure(shapes);
    Rows<Bf16> const keys(right, dim, document, head);
    block.runs(document.keys, [&](int query, int64_t i, int64_t n) {
      add_run(weights + query * G * width + i, width, G, keys, block.selected[query].keys + i, n,
              out + query * G * dim);
    });
    asm volatile("tilerelease");
    for (int64_t d = 0; d < rows() * dim; d += kTileRow) order_sums(out + d);
  }
};

}  // namespace
}  // namespace lt2::dsa::LT2_ISA
