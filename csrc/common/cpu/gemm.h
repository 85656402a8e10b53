// Small fp32 matrix products on panels, the layout in which every operand streams from L1: [rows, cols] is
// stored as panels of 32 columns, element (i, j) at (j / 32) * rows * 32 + i * 32 + j % 32. Column counts are
// multiples of 32, row counts and depths multiples of 16; padding must be zero where it is summed over. See
// simd.h for who may include this.
#pragma once

#include "common/cpu/simd.h"

namespace lt2::LT2_ISA {
namespace {

constexpr int kPanel = 32;

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Panels {
  float* data;
  int rows, cols;

  float* row(int i, int panel) const { return data + (static_cast<int64_t>(panel) * rows + i) * kPanel; }
  float& at(int i, int j) const { return row(i, j / kPanel)[j % kPanel]; }
  int panels() const { return cols / kPanel; }
  int64_t panel_size() const { return static_cast<int64_t>(rows) * kPanel; }
  Panels columns(int begin, int n) const { return {row(0, begin / kPanel), rows, n}; }  // multiples of kPanel
  int64_t size() const { return static_cast<int64_t>(rows) * cols; }
};

struct Nothing {
  void operator()() const {}
};

// A register tile is kTileRows x (2 vectors): 16 accumulators where there are 32 registers, else 8. After
// kBetween of its steps (a divisor of kPanel) something else may happen: about as often in any of them.
// kUnroll steps, which are short where sums are few, are one turn of the loop.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8, kBetween = 8, kUnroll = 1;
#else
constexpr int kTileRows = 4, kBetween = 32, kUnroll = 2;
#endif
constexpr int kTileCols = 2 * kLanes;
static_assert(kPanel % kTileCols == 0);

template <int kVecs>
using TileOf = Vec[kTileRows][kVecs];
using Tile = TileOf<2>;

// What the 32 bits of an operand are, and how many rows of a product's depth.
struct Floats {
  static constexpr int kDepth = 1;
  static __attribute__((always_inline)) Vec spread(float const* x) { return splat(*x); }
  static __attribute__((always_inline)) void add(Vec& sum, Vec a, Vec b) { sum += a * b; }
};

// acc[r] += sum over k in [begin, end) of A(r, k) b[k][:], b rows kPanel apart. A(r, k) is a[r * kPanel + k],
// continued one panel (a_panel floats) further on every 32 k; transposed, it is a[k * kPanel + r].
template <bool kTransposed, class Element = Floats, int kVecs, class F = Nothing>
inline __attribute__((always_inline)) void accumulate_tile(float const* a, int64_t a_panel, float const* b,
                                                           TileOf<kVecs>& acc, int begin, int end,
                                                           F&& between = F{}) {
  auto const step = [&](float const* a_k, int64_t a_stride, float const* b_k) __attribute__((always_inline)) {
    Vec row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = load(b_k + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      Vec const x = Element::spread(a_k + r * a_stride);
      for (int v = 0; v < kVecs; ++v) Element::add(acc[r][v], x, row[v]);
    }
  };
  for (int k = begin; k < end;) {
    float const* const a_k = kTransposed ? a : a + k / kPanel * (a_panel - kPanel);
    int const whole = (k / kBetween + 1) * kBetween, stop = whole < end ? whole : end;
#pragma GCC unroll kUnroll
    for (; k < stop; ++k)
      step(kTransposed ? a_k + k * kPanel : a_k + k, kTransposed ? 1 : kPanel, b + k * kPanel);
    between();
  }
}

// c <- beta c + the same sum, c rows kPanel apart.
template <bool kTransposed, class Element, int kVecs, class F>
inline __attribute__((always_inline)) void multiply_tile(float const* a, int64_t a_panel, float const* b,
                                                         float* c, int begin, int end, float beta,
                                                         F&& between) {
  TileOf<kVecs> acc{};
  accumulate_tile<kTransposed, Element>(a, a_panel, b, acc, begin, end, between);
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* const out = c + r * kPanel + v * kLanes;
      if (beta != 0.f) acc[r][v] += load(out) * beta;
      store(out, acc[r][v]);
    }
  }
}

// What is known to be zero, or not wanted, of a square operand whose rows and columns are tokens.
enum class Triangle {
  kNone,
  kLowerA,    // A(i, k) = 0 for k > i
  kUpperA,    // A(i, k) = 0 for k < i
  kLowerOut,  // of C(i, j) only j <= i is wanted: vectors that begin right of it in a tile's last row stay
};

// C[0:m, :] = beta C + op(A) B over the first `depth` rows of B. op(A)(i, k) is A(i, k), or A(k, i) when
// kTransposed. With beta = 0, C is not read. between() is called after every kBetween steps of a register
// tile.
template <bool kTransposed, Triangle kTriangle = Triangle::kNone, class Element = Floats, class F = Nothing>
void multiply(Panels const& a, Panels const& b, Panels const& c, int m, int depth, float beta,
              F&& between = F{}) {
  static_assert(Element::kDepth == 1 || kTriangle == Triangle::kNone || kTriangle == Triangle::kLowerOut);
  for (int panel = 0; panel < c.panels(); ++panel) {
    for (int i = 0; i < m; i += kTileRows) {
      int const begin = kTriangle == Triangle::kUpperA ? i : 0;
      int const end = kTriangle == Triangle::kLowerA && i + kTileRows < depth ? i + kTileRows : depth;
      float const* const a_rows = kTransposed ? a.row(0, i / kPanel) + i % kPanel : a.row(i, 0);
      for (int j = 0; j < kPanel; j += kTileCols) {
        if (kTriangle == Triangle::kLowerOut && panel * kPanel + j > i + kTileRows - 1) break;
        float *const b_rows = b.row(0, panel) + j, *const out = c.row(i, panel) + j;
        if (kTriangle == Triangle::kLowerOut && panel * kPanel + j + kLanes > i + kTileRows - 1) {
          multiply_tile<kTransposed, Element, 1>(a_rows, a.panel_size(), b_rows, out, begin, end, beta,
                                                 between);
        } else {
          multiply_tile<kTransposed, Element, 2>(a_rows, a.panel_size(), b_rows, out, begin, end, beta,
                                                 between);
        }
      }
    }
  }
}

// Exchanges blocks of kStep rows with blocks of kStep columns; after all steps 1, 2, 4, .. rows is
// transposed.
template <int kStep>
inline __attribute__((always_inline)) void exchange(Vec (&rows)[kLanes]) {
  VecI low{}, high{};
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j & kStep ? kLanes + j - kStep : j;
    high[j] = j & kStep ? kLanes + j : j + kStep;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    Vec const a = rows[i], b = rows[i | kStep];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i | kStep] = __builtin_shuffle(a, b, high);
  }
  if constexpr (kStep * 2 < kLanes) exchange<kStep * 2>(rows);
}

// out[kLanes][kLanes] = in^T, rows in_stride and out_stride apart.
inline __attribute__((always_inline)) void transpose_block(float const* in, int64_t in_stride, float* out,
                                                           int64_t out_stride) {
  Vec rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load(in + i * in_stride);
  exchange<1>(rows);
  for (int i = 0; i < kLanes; ++i) store(out + i * out_stride, rows[i]);
}

// out(j, i) = in(i, j) for i < m.
inline void transpose(Panels const& in, Panels const& out, int m) {
  for (int panel = 0; panel < in.panels(); ++panel) {
    for (int i = 0; i < m; i += kLanes) {
      for (int j = 0; j < kPanel; j += kLanes) {
        transpose_block(in.row(i, panel) + j, kPanel, out.row(panel * kPanel + j, i / kPanel) + i % kPanel,
                        kPanel);
      }
    }
  }
}

// row i of x times factor[i].
inline void scale_rows(Panels const& x, float const* factor, int m) {
  for (int panel = 0; panel < x.panels(); ++panel) {
    for (int i = 0; i < m; ++i) {
      float* const r = x.row(i, panel);
      for (int j = 0; j < kPanel; j += kLanes) store(r + j, load(r + j) * factor[i]);
    }
  }
}

// out[i] = <x_i, y_i> over whole rows: kLanes rows at a time, so that one transpose sums all their lanes.
inline void row_dots(Panels const& x, Panels const& y, float* out, int m) {
  for (int i = 0; i < m; i += kLanes) {
    Vec acc[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      Vec a{}, b{};
      for (int panel = 0; panel < x.panels(); ++panel) {
        float const *const x_row = x.row(i + r, panel), *const y_row = y.row(i + r, panel);
        for (int j = 0; j < kPanel; j += 2 * kLanes) {
          a += load(x_row + j) * load(y_row + j);
          b += load(x_row + j + kLanes) * load(y_row + j + kLanes);
        }
      }
      acc[r] = a + b;
    }
    exchange<1>(acc);
    Vec total = acc[0];
    for (int r = 1; r < kLanes; ++r) total += acc[r];
    store(out + i, total);
  }
}

}  // namespace
}  // namespace lt2::LT2_ISA
