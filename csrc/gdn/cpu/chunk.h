// One chunk of tokens of one value head: what forward and backward both need of it.
//
// With G the inclusive sum of the log decays inside the chunk, gamma_i = e^{G_i}, delta_i = e^{G_last - G_i}
// and E_ij = e^{G_i - G_j} for j <= i, else 0 (every exponent is <= 0):
//   T = E o (I + strict_lower(diag(beta) K K^T))^{-1}    the inverse never sees the gate
//   P = scale E o Q K^T
//   U = T diag(beta) (V - gamma o K S)                   the writes of the chunk
//   O = scale gamma o Q S + P U,   S' = e^{G_last} S + K^T (delta o U)
// Without the delta rule U = diag(beta) V.
#pragma once

#include "gdn/cpu/rows.h"

namespace lt2::gdn::LT2_ISA {
namespace {

// Shorter chunks do less work inside a chunk, longer ones read and write the state less often.
constexpr int kForwardChunk = 32, kBackwardChunk = 64;

// Everything about a chunk that does not depend on the state. [C, C] matrices are zero above the diagonal.
struct Chunk : TokenRows {
  Panels q, k;             // [C, K], normalised if asked for
  Panels k_t;              // [K, C]
  Panels kk, qk;           // [C, C] K K^T and Q K^T
  Panels decay;            // [C, C] E
  Panels inverse;          // [C, C] (I + strict_lower(diag(beta) K K^T))^{-1}
  Panels transfer;         // [C, C] T
  Panels attention;        // [C, C] P
  float *q_norm, *k_norm;  // reciprocal norms, or ones
  float *gamma, *delta, *beta;
  float last_decay;  // e^{G_last}

  Chunk(Arena& arena, int key_padded, int chunk_size)
      : TokenRows{chunk_size},
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

// Log decay of one token, activated.
inline float log_decay(Inputs const& p, int64_t row, int64_t token, int head) {
  if (p.g.data == nullptr) return 0.f;
  float const x = scalar(p.g, row, token, head);
  return p.A_log == nullptr ? x : -__builtin_expf(p.A_log[head]) * softplus(x + p.dt_bias[head]);
}

// Without decays gamma, delta and the lower triangle of E are ones.
inline void prepare_no_decay(Chunk& c) {
  for (int i = 0; i < c.rows; ++i) {
    c.gamma[i] = c.delta[i] = 1.f;
    for (int j = 0; j < c.decay.cols; ++j) c.decay.at(i, j) = j <= i ? 1.f : 0.f;
  }
  c.last_decay = 1.f;
}

// Gates of the chunk: gamma, delta, beta and E. G is summed in fp64 and kept as a sum of two floats, so that
// differences of large sums stay exact.
inline void prepare_gates(Inputs const& p, int64_t row, int head, Chunk& c) {
  alignas(64) float high[kBackwardChunk], low[kBackwardChunk];
  double sum = 0;
  for (int i = 0; i < c.rows; ++i) {
    c.beta[i] = i < c.tokens ? write_strength(p, row, c.begin + i, head) : 0.f;
  }
  if (p.g.data == nullptr) return prepare_no_decay(c);
  for (int i = 0; i < c.rows; ++i) {
    if (i < c.tokens) {
      float const g = log_decay(p, row, c.begin + i, head);
      sum += g < kNoDecay ? kNoDecay : g;
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
  if (p.delta) {
    multiply<false, Triangle::kLowerOut>(c.k, c.k_t, c.kk, c.rows, c.k_t.rows, 0.f, c.ahead);
    if (!inverse_given) invert(c.kk, c.beta, c.inverse, c.rows);
    hadamard(c.inverse, c.decay, 1.f, c.transfer, c.rows);
  }
  if (!with_queries) return;
  load_rows<T>(p.q, row, qk_head, c, 0, p.key_dim, c.q);
  normalise_rows(c.q, c.q_norm, c.rows, p.qk_l2norm);
  multiply<false, Triangle::kLowerOut>(c.q, c.k_t, c.qk, c.rows, c.k_t.rows, 0.f, c.ahead);
  hadamard(c.qk, c.decay, p.scale, c.attention, c.rows);
}

// u = T diag(beta) (V - gamma o K S), or diag(beta) V: y is scratch for the bracket, v's columns start at
// `column`.
template <class T>
void compute_writes(Inputs const& p, int64_t row, int head, Chunk const& c, Panels const& s, int column,
                    int n, Panels const& y, Panels const& u) {
  load_rows<T>(p.v, row, head, c, column, n, u);
  if (!p.delta) {
    if (p.beta.data != nullptr) scale_rows(u, c.beta, c.rows);
    return;
  }
  for (int panel = 0; panel < y.panels(); ++panel) {
    for (int i = 0; i < c.rows; i += kTileRows) {
      for (int j = 0; j < kPanel; j += kTileCols) {
        Tile ks{};
        accumulate_tile<false>(c.k.row(i, 0), c.k.panel_size(), s.row(0, panel) + j, ks, 0, s.rows, c.ahead);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          float const *const v = u.row(i + r, panel) + j, gamma = c.gamma[i + r], beta = c.beta[i + r];
          float* const to = y.row(i + r, panel) + j;
          store(to, (load(v) - ks[r][0] * gamma) * beta);
          store(to + kLanes, (load(v + kLanes) - ks[r][1] * gamma) * beta);
        }
      }
    }
  }
  multiply<false, Triangle::kLowerA>(c.transfer, y, u, c.rows, c.rows, 0.f);
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
