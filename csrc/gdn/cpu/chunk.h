// One chunk of tokens of one value head: what forward and backward both need of it.
//
// With G the inclusive sum of the log decays inside the chunk, gamma_i = e^{G_i}, delta_i = e^{G_last - G_i}
// and E_ij = e^{G_i - G_j} for j <= i, else 0 (every exponent is <= 0):
//   T = E o (I + strict_lower(diag(beta) K K^T))^{-1}    the inverse never sees the gate
//   P = scale E o Q K^T
//   U = T diag(beta) (V - gamma o K S)                   the writes of the chunk
//   O = scale gamma o Q S + P U,   S' = e^{G_last} S + K^T (delta o U)
#pragma once

#include "common/cpu/gemm.h"
#include "gdn/cpu/kernels.h"

namespace lt2::gdn::LT2_ISA {
namespace {

using namespace ::lt2::LT2_ISA;

// Shorter chunks do less work inside a chunk, longer ones read and write the state less often.
constexpr int kForwardChunk = 32, kBackwardChunk = 64;
constexpr int kRowMultiple = 16;    // token rows are padded with zeros to this
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

// Everything about a chunk that does not depend on the state. [C, C] matrices are zero above the diagonal.
struct Chunk {
  int size;                // C
  Panels q, k;             // [C, K], normalised if asked for
  Panels k_t;              // [K, C]
  Panels kk, qk;           // [C, C] K K^T and Q K^T
  Panels decay;            // [C, C] E
  Panels inverse;          // [C, C] (I + strict_lower(diag(beta) K K^T))^{-1}
  Panels transfer;         // [C, C] T
  Panels attention;        // [C, C] P
  float *q_norm, *k_norm;  // reciprocal norms, or ones
  float *gamma, *delta, *beta;
  float last_decay;   // e^{G_last}
  int64_t begin;      // first token in the batch row
  int tokens, rows;   // valid, and padded with zeros
  int direction = 1;  // the chunks are walked forward (1) or backward (-1)

  Chunk(Arena& arena, int key_padded, int chunk_size)
      : size(chunk_size),
        q(arena.panels(size, key_padded)),
        k(arena.panels(size, key_padded)),
        k_t(arena.panels(key_padded, size)),
        kk(arena.panels(size, size)),
        qk(arena.panels(size, size)),
        decay(arena.panels(size, size)),
        inverse(arena.panels(size, size)),
        transfer(arena.panels(size, size)),
        attention(arena.panels(size, size)),
        q_norm(arena.floats(size)),
        k_norm(arena.floats(size)),
        gamma(arena.floats(size)),
        delta(arena.floats(size)),
        beta(arena.floats(size)) {}
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

// The chunk's rows of one head, columns [column, column + n); asks for those of the chunk that comes next,
// whose rows are too far apart for the hardware to foresee.
template <class T>
void load_rows(Strided const& x, int64_t row, int head, Chunk const& c, int column, int n,
               Panels const& out) {
  for (int i = 0; i < c.tokens; ++i) {
    T const* const src = token_row<T const>(x, row, c.begin + i, head) + column;
    T const* const next = src + c.direction * c.size * x.token;
    for (int j = 0; j < n; j += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(next + j, 0, 2);
    load_row(src, n, out, i);
  }
  for (int i = c.tokens; i < c.rows; ++i) load_row(static_cast<T const*>(nullptr), 0, out, i);
}

// Asks for the lines that store_rows will write, early enough to arrive while the chunk is computed.
template <class T>
void expect_rows(Strided const& out, int64_t row, int head, Chunk const& c, int column, int n) {
  for (int i = 0; i < c.tokens; ++i) {
    T* const dst = token_row<T>(out, row, c.begin + i, head) + column;
    for (int j = 0; j < n; j += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(dst + j, 1, 2);
  }
}

template <class T>
void store_rows(Panels const& x, Strided const& out, int64_t row, int head, Chunk const& c, int column,
                int n) {
  for (int i = 0; i < c.tokens; ++i) store_row(x, i, n, token_row<T>(out, row, c.begin + i, head) + column);
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

// Log decay and beta of one token, activated.
inline float log_decay(Inputs const& p, int64_t row, int64_t token, int head) {
  if (p.g.data == nullptr) return 0.f;
  float const x = scalar(p.g, row, token, head);
  return p.A_log == nullptr ? x : -__builtin_expf(p.A_log[head]) * softplus(x + p.dt_bias[head]);
}
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

// Gates of the chunk: gamma, delta, beta and E. G is summed in fp64 and kept as a sum of two floats, so that
// differences of large sums stay exact.
inline void prepare_gates(Inputs const& p, int64_t row, int head, Chunk& c) {
  alignas(64) float high[kBackwardChunk], low[kBackwardChunk];
  double sum = 0;
  for (int i = 0; i < c.rows; ++i) {
    if (i < c.tokens) {
      float const g = log_decay(p, row, c.begin + i, head);
      sum += g < kNoDecay ? kNoDecay : g;
      c.beta[i] = write_strength(p, row, c.begin + i, head);
    } else {
      c.beta[i] = 0.f;
    }
    high[i] = static_cast<float>(sum);
    low[i] = static_cast<float>(sum - high[i]);
  }
  for (int i = 0; i < c.rows; i += kLanes) {
    Vec const h = load(high + i), l = load(low + i);
    store(c.gamma + i, exp(h + l));
    store(c.delta + i, exp((splat(high[c.rows - 1]) - h) + (splat(low[c.rows - 1]) - l)));
  }
  c.last_decay = c.gamma[c.rows - 1];

  Vec lane{};
  for (int j = 0; j < kLanes; ++j) lane[j] = static_cast<float>(j);
  for (int i = 0; i < c.rows; ++i) {
    for (int panel = 0; panel < c.decay.panels(); ++panel) {
      float* const e = c.decay.row(i, panel);
      for (int j = 0; j < kPanel; j += kLanes) {
        int const column = panel * kPanel + j;
        if (column > i) {
          store(e + j, Vec{});
          continue;
        }
        Vec const d = (splat(high[i]) - load(high + column)) + (splat(low[i]) - load(low + column));
        Vec const kept = lane + static_cast<float>(column) <= splat(static_cast<float>(i)) ? exp(d) : Vec{};
        store(e + j, kept);
      }
    }
  }
}

// (I + strict_lower(diag(beta) K K^T))^{-1} by forward substitution in fp32, row by row:
// row_i = e_i - beta_i sum_{j < i} (k_i . k_j) row_j.
inline void invert(Chunk const& c) {
  for (int i = 0; i < c.rows; ++i) {
    for (int panel = 0; panel < c.inverse.panels(); ++panel) {
      float* const out = c.inverse.row(i, panel);
      Vec acc[kPanel / kLanes] = {};
      for (int j = panel * kPanel; j < i; ++j) {
        Vec const factor = splat(-c.beta[i] * c.kk.at(i, j));
        float const* const row = c.inverse.row(j, panel);
        for (int l = 0; l < kPanel / kLanes; ++l) acc[l] += factor * load(row + l * kLanes);
      }
      for (int l = 0; l < kPanel / kLanes; ++l) store(out + l * kLanes, acc[l]);
    }
    c.inverse.at(i, i) = 1.f;
  }
}

// out = a o b * factor for the rows and columns of the chunk.
inline void hadamard(Panels const& a, Panels const& b, float factor, Panels const& out, int rows) {
  for (int panel = 0; panel < out.panels(); ++panel) {
    for (int i = panel * kPanel; i < rows; ++i) {
      for (int j = 0; j < kPanel; j += kLanes) {
        store(out.row(i, panel) + j, load(a.row(i, panel) + j) * load(b.row(i, panel) + j) * factor);
      }
    }
  }
}

// Fills c for tokens [begin, begin + tokens) of a row. Q K^T and P only with_queries; the inverse is computed
// unless it is there already.
template <class T>
void prepare_chunk(Inputs const& p, int64_t row, int head, int64_t begin, int tokens, bool with_queries,
                   bool inverse_given, Chunk& c) {
  int const qk_head = head / (p.value_heads / p.heads);
  c.begin = begin;
  c.tokens = tokens;
  c.rows = round_up(tokens, kRowMultiple);
  load_rows<T>(p.k, row, qk_head, c, 0, p.key_dim, c.k);
  normalise_rows(c.k, c.k_norm, c.rows, p.qk_l2norm);
  transpose(c.k, c.k_t, c.rows);
  prepare_gates(p, row, head, c);
  multiply<false, Triangle::kLowerOut>(c.k, c.k_t, c.kk, c.rows, c.k_t.rows, 0.f);
  if (!inverse_given) invert(c);
  hadamard(c.inverse, c.decay, 1.f, c.transfer, c.rows);
  if (!with_queries) return;
  load_rows<T>(p.q, row, qk_head, c, 0, p.key_dim, c.q);
  normalise_rows(c.q, c.q_norm, c.rows, p.qk_l2norm);
  multiply<false, Triangle::kLowerOut>(c.q, c.k_t, c.qk, c.rows, c.k_t.rows, 0.f);
  hadamard(c.qk, c.decay, p.scale, c.attention, c.rows);
}

// u = T diag(beta) (V - gamma o K S): y is scratch for the bracket, v's columns start at `column`.
template <class T>
void compute_writes(Inputs const& p, int64_t row, int head, Chunk const& c, Panels const& s, int column,
                    int n, Panels const& y, Panels const& u) {
  multiply<false>(c.k, s, y, c.rows, s.rows, 0.f);
  load_rows<T>(p.v, row, head, c, column, n, u);
  for (int panel = 0; panel < y.panels(); ++panel) {
    for (int i = 0; i < c.rows; ++i) {
      for (int j = 0; j < kPanel; j += kLanes) {
        Vec const residual = load(u.row(i, panel) + j) - load(y.row(i, panel) + j) * c.gamma[i];
        store(y.row(i, panel) + j, residual * c.beta[i]);
      }
    }
  }
  multiply<false, Triangle::kLowerA>(c.transfer, y, u, c.rows, c.rows, 0.f);
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
