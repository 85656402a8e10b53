// Products of a block with a union of which each of its queries selects a good part, on the tile unit (AMX):
// rows of scores hold all of its keys, and what a query does not select is left out by its bits.
#pragma once

#include "dsa/cpu/attention_union_amx.h"

namespace lt2::dsa::LT2_ISA {
namespace {

constexpr int kBlockRows = 32;  // rows, and columns, of a product at a time: 2 x 2 tiles

// c [32, 32] = a [32, 32 steps] b [16 steps, 32, 2], or c + that; strides in bytes.
template <bool kAdd>
inline void multiply_block(Bf16 const* a, int64_t a_row, Bf16 const* b, int64_t b_row, int64_t steps,
                           float* c, int64_t c_row) {
  float* const below = c + 4 * c_row;
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_row);
    _tile_loadd(1, c + 16, c_row);
    _tile_loadd(2, below, c_row);
    _tile_loadd(3, below + 16, c_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += kTileRow, b += 8 * b_row) {
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, b, b_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 32, b_row);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 8 * a_row, a_row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_row);
  _tile_stored(1, c + 16, c_row);
  _tile_stored(2, below, c_row);
  _tile_stored(3, below + 16, c_row);
}

struct DenseProducts : BlockHeads {
  Union const& keys;

  DenseProducts(BlockHeads const& block, Union const& keys) : BlockHeads(block), keys(keys) {
    width = keys.rounded();
  }
  int64_t count(int64_t) const { return keys.count; }

  // scores[r][i] = scale left[r] . right[i-th key of the union], `rest` where the query does not select it.
  void score(Heads const& left, Heads const& right, int64_t dim, float scale, float rest, float* rows,
             float* scores) const {
    constexpr int64_t kTurned = 128;
    auto* const packed = reinterpret_cast<Bf16*>(rows);
    for (int64_t r = 0; r < all_rows(); ++r) {
      bool const own = r < this->rows();
      Bf16 const* const from = own ? row<Bf16>(left, r) : nullptr;
      Bf16 const* const later = r + kLanes < this->rows() ? row<Bf16>(left, r + kLanes) : from;
      for (int64_t d = 0; d < dim; d += kTileRow) {
        __builtin_prefetch(later + d);
        Vec x{};
        if (own) __builtin_memcpy(&x, from + d, sizeof(x));
        __builtin_memcpy(packed + r * dim + d, &x, sizeof(x));
      }
    }
    UnionRows const all(right, dim, *this, keys);
    alignas(64) Bf16 turned[kTurned * kMostDim];
    Vec const others = splat(rest);
    configure_columns(16);
    for (int64_t first = 0; first < width; first += kTurned) {
      int64_t const n = width - first < kTurned ? width - first : kTurned;
      turn_pairs(all, first, n, turned);
      for (int64_t r = 0; r < all_rows(); r += kBlockRows) {
        for (int64_t j = 0; j < n; j += kBlockRows) {
          multiply_block<false>(packed + r * dim, 2 * dim, turned + 2 * j, 4 * n, dim / kTileRow,
                                scores + r * width + first + j, 4 * width);
        }
        for (int64_t i = r; i < r + kBlockRows && i < this->rows(); ++i) {
          float* const out = scores + i * width + first;
          for (int64_t j = 0; j < n; j += kLanes) {
            auto const x = reinterpret_cast<__m512>(load(out + j) * scale);
            _mm512_storeu_ps(out + j,
                             _mm512_mask_mov_ps(reinterpret_cast<__m512>(others), bits(i, first + j), x));
          }
        }
      }
    }
    asm volatile("tilerelease");
  }

  // out[r] = sum_i weights[r][i] right[i-th key of the union]
  void add(float const* weights, Heads const& right, int64_t dim, float* out) const {
    UnionRows const all(right, dim, *this, keys);
    alignas(64) Bf16 pairs[kSpan * kMostDim];
    alignas(64) Bf16 rounded[kBlockRows * kSpan];
    bool finite = true;
    configure_columns(16);
    for (int64_t first = 0; first < width; first += kSpan) {
      int64_t const n = width - first < kSpan ? width - first : kSpan;
      finite &= pair_keys(all, first, n, pairs);
      for (int64_t r = 0; r < all_rows(); r += kBlockRows) {
        for (int64_t i = 0; i < kBlockRows; ++i) {
          for (int64_t j = 0; j < n; j += kTileRow) {
            auto const both = _mm512_cvtne2ps_pbh(weight(weights, r + i, first + j + kLanes),
                                                  weight(weights, r + i, first + j));
            __builtin_memcpy(rounded + i * kSpan + j, &both, sizeof(both));
          }
        }
        auto const multiply = first == 0 ? multiply_block<false> : multiply_block<true>;
        for (int64_t d = 0; d < dim; d += kBlockRows) {
          multiply(rounded, 2 * kSpan, pairs + 2 * d, 4 * dim, n / kTileRow, out + r * dim + d, 4 * dim);
        }
      }
    }
    asm volatile("tilerelease");
    for (int64_t i = 0; i < keys.count && !finite; ++i) {
      if (is_finite(all.at(i), dim)) continue;
      auto const key = static_cast<int32_t>(all.key(i));
      for (int64_t r = 0; r < rows(); ++r) {
        if (!selects(r, i)) continue;
        add_heads<1>(weights + r * width + i, width, all, &key, 1, out + r * dim);
      }
    }
  }

  // to[s] += sum_r weights[r][i] left[r] for the i-th key s of the union, rows of `to` `size` apart.
  void add_outer(float const* weights, Heads const& left, int64_t dim, float* rows, float* to,
                 int64_t size) const {
    add_outer_union(
        *this, keys, left, dim, rows, to, size,
        [&](int64_t first, int64_t n, int64_t r, int64_t summed, Bf16* turned) {
          for (int64_t j = 0; j < n; j += kLanes) {
            for (int64_t c = 0; c < summed; c += kTileRow) {
              Vec x[kLanes];
              for (int64_t i = 0; i < kLanes; ++i) x[i] = pair_weights(weights, r + c + 2 * i, first + j);
              exchange<1>(x);
              for (int64_t i = 0; i < kLanes; ++i)
                store(reinterpret_cast<float*>(turned + (j + i) * kSummedRows + c), x[i]);
            }
          }
        },
        [&](int64_t r, float const* row) {
          for (int64_t i = 0; i < keys.count; ++i) {
            auto const key = static_cast<int32_t>(keys.list == nullptr ? keys.begin + i : keys.list[i]);
            if (selects(r, i)) outer_heads<1>(weights + r * width + i, width, row, dim, &key, 1, to, size);
          }
        });
  }

 private:
  int64_t all_rows() const { return (rows() + kBlockRows - 1) / kBlockRows * kBlockRows; }
  __mmask16 bits(int64_t r, int64_t i) const { return keys.bits[r / G * (width / kLanes) + i / kLanes]; }
  bool selects(int64_t r, int64_t i) const { return (bits(r, i) >> (i % kLanes) & 1) != 0; }

  // Of kLanes keys from i on; 0 what is not selected.
  __m512 weight(float const* weights, int64_t r, int64_t i) const {
    return r < rows() ? _mm512_maskz_loadu_ps(bits(r, i), weights + r * width + i) : _mm512_setzero_ps();
  }

  // Those of rows r and r + 1 as pairs of bf16.
  Vec pair_weights(float const* weights, int64_t r, int64_t i) const {
    auto const lanes = [&](int64_t row) {
      auto const rounded = _mm512_cvtneps_pbh(weight(weights, row, i));
      return reinterpret_cast<VecU>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(rounded)));
    };
    return reinterpret_cast<Vec>(lanes(r) | lanes(r + 1) << 16);
  }

  // out [dim / 2, n, 2] of the keys [first, first + n), zeros after the last.
  static void turn_pairs(UnionRows const& all, int64_t first, int64_t n, Bf16* out) {
    for (int64_t j = 0; j < n; j += kLanes) {
      for (int64_t d = 0; d < all.dim; d += kTileRow) {
        Vec x[kLanes] = {};
        for (int64_t i = 0; i < kLanes && first + j + i < all.keys.count; ++i) {
          __builtin_memcpy(&x[i], all.at(first + j + i) + d, sizeof(Vec));
        }
        exchange<1>(x);
        for (int64_t i = 0; i < kLanes; ++i)
          __builtin_memcpy(out + 2 * ((d / 2 + i) * n + j), &x[i], sizeof(Vec));
      }
    }
  }

  // out [n / 2, dim, 2] of the keys [first, first + n), zeros for those that are not finite and after the
  // last; returns whether all are.
  static bool pair_keys(UnionRows const& all, int64_t first, int64_t n, Bf16* out) {
    auto const pair = [&](auto const& row) {
      Finite finite;
      for (int64_t j = 0; j < n; j += 2) {
        Bf16 const *const even = row(first + j), *const odd = row(first + j + 1);
        for (int64_t d = 0; d < all.dim; d += kLanes) {
          VecU const x = pair_rows(even == nullptr ? nullptr : even + d, odd == nullptr ? nullptr : odd + d);
          finite.see(x);
          __builtin_memcpy(out + j * all.dim + 2 * d, &x, sizeof(x));
        }
      }
      return finite.all();
    };
    auto const row = [&](int64_t i) { return i < all.keys.count ? all.at(i) : nullptr; };
    if (pair(row)) return true;
    pair([&](int64_t i) { return row(i) != nullptr && is_finite(row(i), all.dim) ? row(i) : nullptr; });
    return false;
  }
};

// Products with a union where that is worth it, else with copies of what each query selects.
struct AmxProducts : BlockHeads {
  static constexpr int kParts = kAttendQueries / kUnitedQueries;
  Block parts[kParts];
  Union unions[kParts];
  bool united = false;

  AmxProducts(AttentionParams const& p, Document const& document, Block const& block, int64_t first,
              int64_t head, bool with_bits = false)
      : BlockHeads(p, document, block, first, head) {
    if (p.dim % kColumns != 0 || p.value_dim % kColumns != 0) return;
    Arena arena = block.behind;
    for (int i = 0; i < kParts; ++i) {
      parts[i] = block.part(i * kUnitedQueries, kUnitedQueries);
      unions[i] = Union(p, parts[i], with_bits, arena);
      united |= unions[i].count > 0;
    }
  }

  template <class F>
  static void each_part(AttentionParams const& p, Document const& document, Block const& block, int64_t first,
                        int64_t head, F const& f) {
    AmxProducts(p, document, block, first, head, true).parted([&](auto const& products, int64_t) {
      f(products);
    });
  }

  void score(Heads const& left, Heads const& right, int64_t dim, float scale, float rest, float* rows,
             float* scores) const {
    parted([&](auto const& products, int64_t r) {
      products.score(left, right, dim, scale, rest, rows, scores + r * width);
    });
  }
  void add(float const* weights, Heads const& right, int64_t dim, float* out) const {
    parted([&](auto const& products, int64_t r) {
      products.add(weights + r * width, right, dim, out + r * dim);
    });
  }
  void add_outer(float const* weights, Heads const& left, int64_t dim, float* rows, float* to,
                 int64_t size) const {
    parted([&](auto const& products, int64_t r) {
      products.add_outer(weights + r * width, left, dim, rows, to, size);
    });
  }

 private:
  // f(products, r): of the queries from row r on.
  template <class F>
  void parted(F const& f) const {
    if (!united) return f(TileProducts(*this, block, 0), 0);
    for (int i = 0; i < kParts && parts[i].count > 0; ++i) {
      int64_t const skipped = i * kUnitedQueries, r = skipped * G;
      BlockHeads const heads(*this, parts[i], skipped);
      if (unions[i].count == 0) {
        f(TileProducts(heads, parts[i], 0), r);
      } else if (unions[i].bits != nullptr) {
        f(DenseProducts(heads, unions[i]), r);
      } else if (G == 1) {
        f(UnionProducts<0>(heads, unions[i]), r);
      } else if (G == 2) {
        f(UnionProducts<1>(heads, unions[i]), r);
      } else if (G == 4) {
        f(UnionProducts<2>(heads, unions[i]), r);
      } else if (G == 8) {
        f(UnionProducts<3>(heads, unions[i]), r);
      } else {
        f(UnionProducts<4>(heads, unions[i]), r);
      }
    }
  }
};

}  // namespace
}  // namespace lt2::dsa::LT2_ISA
