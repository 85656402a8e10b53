// Tokens and states in memory to and from panels, and what any chunked recurrence of one head needs beside
// them.
#pragma once

#include "common/cpu/gemm.h"
#include "common/cpu/rows.h"
#include "gdn/cpu/kernels.h"

namespace lt2::gdn::LT2_ISA {
namespace {

using namespace ::lt2::LT2_ISA;

constexpr int kRowMultiple = 16;  // token rows are padded with zeros to this
constexpr int kMaxKeyDim = 256, kMaxValueDim = 512;
constexpr int kMaxStepTokens = 8;
constexpr float kNoDecay = -200.f;  // e^g is 0 in fp32 from here on: -inf is an exact reset without inf - inf
constexpr float kTinyBeta = 1e-20f;  // below, U / beta is not computed by division

struct Geometry {
  int key_padded, value_padded;
};
inline Geometry geometry(Inputs const& p, ValueSlice slice) {
  return {round_up(p.key_dim, kPanel), round_up(slice.end - slice.begin, kPanel)};
}

// Hands out pieces of a workspace; with a null base it only counts.
struct Arena {
  float* base;
  int64_t used = 0;

  float* floats(int64_t n) {
    float* const piece = base == nullptr ? nullptr : base + used;
    used += (n + 15) / 16 * 16;
    return piece;
  }
  Panels panels(int rows, int cols) { return {floats(static_cast<int64_t>(rows) * cols), rows, cols}; }
};

// Lines of rows that will be needed or written, which are too far apart for the hardware to foresee. Fetched
// all at once they wait for each other; with `spread`, between() of products fetches two at a time. But the
// first line of each row goes at once: its page is looked up, which stops the products if it happens among
// them, and some look-ups can be under way together. A row is some pieces, one after the other in memory if
// there is nothing between them, so that a page is visited once.
struct Ahead {
  static constexpr int kMost = 8, kLine = 64;
  struct Rows {
    char const* row;
    int64_t stride, piece_stride, bytes;  // bytes of a piece
    int pieces, left;
  } queue[kMost] = {};
  int first = 0, count = 0, piece = 0;
  char const *next = nullptr, *end = nullptr;  // of the current piece: all before `next` is under way
  bool spread = false;

  void add(Rows rows) {
    if (rows.left <= 0 || rows.bytes == 0) return;
    if (rows.piece_stride == rows.bytes) {
      rows.bytes *= rows.pieces;
      rows.pieces = 1;
    }
    for (int i = 0; spread && i < rows.left; ++i) __builtin_prefetch(rows.row + i * rows.stride, 0, 2);
    queue[(first + count) % kMost] = rows;
    if (count++ == 0) start_piece();
    while (count > (spread ? kMost - 1 : 0)) (*this)();
  }
  void start_piece() {
    Rows const& rows = queue[first];
    next = rows.row + piece * rows.piece_stride;
    end = next + rows.bytes;
  }
  // Rare among products, and out of line: it needs none of the registers that hold their sums.
  __attribute__((noinline, cold)) void advance() {
    Rows& rows = queue[first];
    if (++piece == rows.pieces) {
      piece = 0;
      rows.row += rows.stride;
      if (--rows.left == 0) {
        first = (first + 1) % kMost;
        if (--count == 0) {
          next = end = nullptr;
          return;
        }
      }
    }
    start_piece();
  }
  void operator()() {
    if (next == end) return;
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + kLine, 0, 2);
    next += 2 * kLine;
    if (__builtin_expect(next >= end, 0)) advance();
  }
};

// The tokens of a chunk.
struct TokenRows {
  int size;                  // of all chunks but the last
  int64_t begin = 0;         // first token in the batch row
  int tokens = 0, rows = 0;  // valid, and padded with zeros
  int direction = 1;         // the chunks are walked forward (1) or backward (-1)
  mutable Ahead ahead{};
};

template <class T>
T* token_row(Strided const& x, int64_t row, int64_t token, int head) {
  return static_cast<T*>(x.data) + row * x.batch + token * x.token + head * x.head;
}
inline float scalar(Strided const& x, int64_t row, int64_t token, int head) {
  return *token_row<float const>(x, row, token, head);
}

// One row of n elements into row i of x, zeros behind them.
template <class T>
void load_row(T const* src, int n, Panels const& x, int i) {
  for (int panel = 0; panel < x.panels(); ++panel) {
    float* const dst = x.row(i, panel);
    T const* const from = src + panel * kPanel;
    int const count = n - panel * kPanel;
    for (int j = 0; j < kPanel; j += kLanes) {
      if (j + kLanes <= count) {
        store(dst + j, load(from + j));
      } else {
        for (int l = j; l < j + kLanes; ++l) dst[l] = l < count ? to_float(from[l]) : 0.f;
      }
    }
  }
}

template <class T>
void store_row(Panels const& x, int i, int n, T* dst) {
  for (int panel = 0; panel * kPanel < n; ++panel) {
    float const* const src = x.row(i, panel);
    T* const to = dst + panel * kPanel;
    int const count = n - panel * kPanel;
    for (int j = 0; j < kPanel; j += kLanes) {
      if (j + kLanes <= count) {
        store(to + j, load(src + j));
      } else {
        for (int l = j; l < count && l < j + kLanes; ++l) store_one(to + l, src[l]);
      }
    }
  }
}

// Columns [column, column + n) of these heads go ahead, of `tokens` rows from token `begin` on.
template <class T>
void expect_rows(Strided const& x, int64_t row, Heads heads, TokenRows const& c, int64_t begin,
                 int64_t tokens, int column, int n) {
  auto const bytes = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)); };
  T const* const rows = token_row<T const>(x, row, begin, heads.begin) + column;
  c.ahead.add({reinterpret_cast<char const*>(rows), bytes(x.token), bytes(x.head), bytes(n),
               heads.end - heads.begin, static_cast<int>(tokens)});
}
// As many rows as the chunk has, of one head.
template <class T>
void expect_rows(Strided const& x, int64_t row, int head, TokenRows const& c, int64_t begin, int column,
                 int n) {
  expect_rows<T>(x, row, Heads{head, head + 1}, c, begin, c.tokens, column, n);
}
// Rows of the chunk behind c.
template <class T>
void expect_next(Strided const& x, Span span, Heads heads, TokenRows const& c, int column, int n) {
  int64_t const begin = c.begin + c.size, left = span.end - begin;
  expect_rows<T>(x, span.row, heads, c, begin, left < c.size ? left : c.size, column, n);
}
// What the forward pass reads and writes of these heads in the chunk behind c, but for the gates.
template <class T>
void expect_next_chunk(ForwardParams const& p, Span span, Heads heads, ValueSlice slice, TokenRows const& c) {
  int const share = p.value_heads / p.heads, n = slice.end - slice.begin;
  Heads const qk{heads.begin / share, (heads.end - 1) / share + 1};
  expect_next<T>(p.k, span, qk, c, 0, p.key_dim);
  expect_next<T>(p.q, span, qk, c, 0, p.key_dim);
  expect_next<T>(p.v, span, heads, c, slice.begin, n);
  expect_next<T>(p.o, span, heads, c, slice.begin, n);
}

// The chunk's rows of one head, columns [column, column + n). Those of the chunk that comes next go ahead,
// unless with `spread` the pass has asked for them.
template <class T>
void load_rows(Strided const& x, int64_t row, int head, TokenRows const& c, int column, int n,
               Panels const& out) {
  for (int i = 0; i < c.tokens; ++i) {
    load_row(token_row<T const>(x, row, c.begin + i, head) + column, n, out, i);
  }
  if (!c.ahead.spread) expect_rows<T>(x, row, head, c, c.begin + c.direction * c.size, column, n);
  for (int i = c.tokens; i < c.rows; ++i) load_row(static_cast<T const*>(nullptr), 0, out, i);
}

template <class T>
void store_rows(Panels const& x, Strided const& out, int64_t row, int head, TokenRows const& c, int column,
                int n) {
  for (int i = 0; i < c.tokens; ++i) store_row(x, i, n, token_row<T>(out, row, c.begin + i, head) + column);
}

// Rows of the chunk in memory, columns [column, column + n) of one head: diag(factor) Q S + P U, with P lower
// triangular.
template <class T, class Element = Floats>
void store_outputs(Panels const& q, Panels const& s, float const* factor, Panels const& attention,
                   Panels const& u, Strided const& o, int64_t row, int head, TokenRows const& c, int column,
                   int n) {
  for (int panel = 0; panel < s.panels(); ++panel) {
    for (int i = 0; i < c.rows; i += kTileRows) {
      for (int j = 0; j < kPanel; j += kTileCols) {
        Tile acc{};
        accumulate_tile<false, Element>(q.row(i, 0), q.panel_size(), s.row(0, panel) + j, acc, 0, s.rows,
                                        c.ahead);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          acc[r][0] *= factor[i + r];
          acc[r][1] *= factor[i + r];
        }
        accumulate_tile<false, Element>(attention.row(i, 0), attention.panel_size(), u.row(0, panel) + j, acc,
                                        0, (i + kTileRows) / Element::kDepth, c.ahead);
        int const first = panel * kPanel + j, left = n - first;
        int const halves[] = {left < kLanes ? left : kLanes, left < kTileCols ? left - kLanes : kLanes};
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          if (i + r >= c.tokens) break;
          T* const to = token_row<T>(o, row, c.begin + i + r, head) + column + first;
          if (halves[0] > 0) store_some(to, acc[r][0], halves[0]);
          if (halves[1] > 0) store_some(to + kLanes, acc[r][1], halves[1]);
        }
      }
    }
  }
}

// A row in memory to and from plain fp32.
template <class T>
void load_unit(T const* src, int n, bool normalise, float* dst) {
  Vec partial{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec const x = load(src + i);
    store(dst + i, x);
    partial += x * x;
  }
  float squares = sum(partial);
  for (; i < n; ++i) {
    dst[i] = to_float(src[i]);
    squares += dst[i] * dst[i];
  }
  if (!normalise) return;
  float const norm = 1.f / __builtin_sqrtf(squares + 1e-6f);
  for (int j = 0; j < n; ++j) dst[j] *= norm;
}

template <class T>
void store_values(float const* src, int n, T* dst) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  for (; i < n; ++i) store_one(dst + i, src[i]);
}

// State [K, V] (or [V, K]) of fp32 in memory to and from panels; value columns [slice).
inline int64_t state_index(Inputs const& p, int k, int v) {
  return p.state_v_first ? static_cast<int64_t>(v) * p.key_dim + k
                         : static_cast<int64_t>(k) * p.value_dim + v;
}
inline void load_state(Inputs const& p, float const* state, ValueSlice slice, Panels const& s) {
  __builtin_memset(s.data, 0, s.size() * sizeof(float));
  if (state == nullptr) return;
  for (int k = 0; k < p.key_dim; ++k) {
    for (int v = slice.begin; v < slice.end; ++v) s.at(k, v - slice.begin) = state[state_index(p, k, v)];
  }
}
inline void store_state(Inputs const& p, Panels const& s, ValueSlice slice, float* state) {
  for (int k = 0; k < p.key_dim; ++k) {
    for (int v = slice.begin; v < slice.end; ++v) state[state_index(p, k, v)] = s.at(k, v - slice.begin);
  }
}

// Those of a head at the ends of the forward pass.
inline int64_t state_offset(Inputs const& p, int64_t sequence, int head) {
  return (sequence * p.value_heads + head) * p.key_dim * p.value_dim;
}
inline void load_initial_state(Inputs const& p, int64_t sequence, int head, ValueSlice slice,
                               Panels const& s) {
  load_state(p, p.initial_state == nullptr ? nullptr : p.initial_state + state_offset(p, sequence, head),
             slice, s);
}
inline void store_final_state(ForwardParams const& p, int64_t sequence, int head, ValueSlice slice,
                              Panels const& s) {
  if (p.final_state != nullptr) store_state(p, s, slice, p.final_state + state_offset(p, sequence, head));
}

// States of the heads of a forward item.
struct States {
  Panels all;
  int value_padded;

  States(Arena& arena, Geometry const& g, int heads)
      : all(arena.panels(g.key_padded, heads * g.value_padded)), value_padded(g.value_padded) {}
  Panels operator[](int i) const { return all.columns(i * value_padded, value_padded); }
};

// Beta of one token, activated.
inline float write_strength(Inputs const& p, int64_t row, int64_t token, int head) {
  if (p.beta.data == nullptr) return 1.f;
  float const x = scalar(p.beta, row, token, head);
  return p.beta_sigmoid ? (p.neg_eigval ? 2.f : 1.f) * sigmoid(x) : x;
}

inline void normalise_rows(Panels const& x, float* norm, int rows, bool enabled) {
  if (!enabled) {
    for (int i = 0; i < rows; ++i) norm[i] = 1.f;
    return;
  }
  row_dots(x, x, norm, rows);
  for (int i = 0; i < rows; ++i) norm[i] = 1.f / __builtin_sqrtf(norm[i] + 1e-6f);
  scale_rows(x, norm, rows);
}

// x_i <- norm_i (x_i - unit_i <unit_i, x_i>): the gradient through unit = raw * norm.
inline void normalise_backward(Panels const& x, Panels const& unit, float const* norm, float* dot, int rows) {
  row_dots(x, unit, dot, rows);
  for (int panel = 0; panel < x.panels(); ++panel) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < kPanel; j += kLanes) {
        float* const out = x.row(i, panel) + j;
        store(out, (load(out) - load(unit.row(i, panel) + j) * dot[i]) * norm[i]);
      }
    }
  }
}

// x <- x + y.
inline void add_rows(Panels const& x, Panels const& y, int rows) {
  for (int panel = 0; panel < x.panels(); ++panel) {
    for (int i = 0; i < rows * kPanel; i += kLanes) {
      float* const out = x.row(0, panel) + i;
      store(out, load(out) + load(y.row(0, panel) + i));
    }
  }
}

// total <- x (first) or total + x, and x <- total. total is laid out as x.
inline void accumulate(Panels const& x, float* total, int rows, bool first) {
  for (int panel = 0; panel < x.panels(); ++panel) {
    int64_t const base = static_cast<int64_t>(panel) * x.rows * kPanel;
    for (int64_t i = base; i < base + rows * kPanel; i += kLanes) {
      Vec const v = first ? load(x.data + i) : load(x.data + i) + load(total + i);
      store(total + i, v);
      store(x.data + i, v);
    }
  }
}

// (I + strict_lower(diag(beta) K K^T))^{-1} by forward substitution in fp32, row by row:
// row_i = e_i - beta_i sum_{j < i} (k_i . k_j) row_j.
inline void invert(Panels const& kk, float const* beta, Panels const& inverse, int rows) {
  for (int i = 0; i < rows; ++i) {
    for (int panel = 0; panel < inverse.panels(); ++panel) {
      float* const out = inverse.row(i, panel);
      Vec acc[kPanel / kLanes] = {};
      for (int j = panel * kPanel; j < i; ++j) {
        Vec const factor = splat(-beta[i] * kk.at(i, j));
        float const* const row = inverse.row(j, panel);
        for (int l = 0; l < kPanel / kLanes; ++l) acc[l] += factor * load(row + l * kLanes);
      }
      for (int l = 0; l < kPanel / kLanes; ++l) store(out + l * kLanes, acc[l]);
    }
    inverse.at(i, i) = 1.f;
  }
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
