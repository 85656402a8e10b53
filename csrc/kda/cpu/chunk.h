// One chunk of tokens of one value head: what forward and backward both need of it.
//
// A chunk is two blocks of 16 tokens. With D_ij the decays (a vector over key channels) of the tokens after j
// up to and with i, head_i those from the start of the chunk to i, tail_i those after i to its end, and
// last the whole chunk's:
//   A_ij = <k_i, D_ij o k_j> for j < i,  P_ij = scale <q_i, D_ij o k_j> for j <= i, both else 0
//   U = (I + diag(beta) A)^{-1} diag(beta) (V - (head o K) S)       without delta: U = diag(beta) V
//   O = scale (head o Q) S + P U,   S' = last o S + (tail o K)^T U
// Between the blocks D is a product of the decays up to the border and those behind it. Inside a block it is
// multiplied up token by token. So no decay is ever divided by, no exponent is positive, nothing overflows,
// and a decay of 0 (g = -inf) is an exact reset.
#pragma once

#include "common/cpu/activations.h"
#include "gdn/cpu/rows.h"
#include "kda/cpu/kernels.h"

namespace lt2::kda::LT2_ISA {
namespace {

using namespace ::lt2::gdn::LT2_ISA;
using gdn::Span;

constexpr int kBlock = 16, kChunk = 32;
static_assert(kBlock == kRowMultiple && kChunk == 2 * kBlock && kBlock % kLanes == 0);
constexpr int kVecs = kPanel / kLanes;

// [C, C] matrices are zero above the diagonal.
struct Chunk : TokenRows {
  Panels q, k;            // [C, K], normalised if asked for
  Panels decay;           // [C, K] e^g
  Panels head, tail;      // [C, K]
  Panels q_head;          // [C, K] scale q o head
  Panels k_head, k_tail;  // [C, K]
  Panels near, near_q,
      near_k;  // [16, K] of the second block: decays from the border, scale q and k times them
  Panels far, far_k, far_k_t;  // [16, K] of the first block: decays up to the border, k times them; [K, C]
  Panels scores, attention;    // [C, C] A and P
  Panels inverse;              // [C, C] (I + diag(beta) A)^{-1}
  float *q_norm, *k_norm;      // reciprocal norms, or ones
  float* beta;
  float *through, *last;  // [2, K] decays of the blocks, [K] of the chunk
  float* partial;         // [2, 16, 16, lanes]

  Chunk(Arena& arena, int key_padded)
      : TokenRows{kChunk},
        q(arena.panels(kChunk, key_padded)),
        k(arena.panels(kChunk, key_padded)),
        decay(arena.panels(kChunk, key_padded)),
        head(arena.panels(kChunk, key_padded)),
        tail(arena.panels(kChunk, key_padded)),
        q_head(arena.panels(kChunk, key_padded)),
        k_head(arena.panels(kChunk, key_padded)),
        k_tail(arena.panels(kChunk, key_padded)),
        near(arena.panels(kBlock, key_padded)),
        near_q(arena.panels(kBlock, key_padded)),
        near_k(arena.panels(kBlock, key_padded)),
        far(arena.panels(kBlock, key_padded)),
        far_k(arena.panels(kBlock, key_padded)),
        far_k_t(arena.panels(key_padded, kChunk)),
        scores(arena.panels(kChunk, kChunk)),
        attention(arena.panels(kChunk, kChunk)),
        inverse(arena.panels(kChunk, kChunk)),
        q_norm(arena.floats(kChunk)),
        k_norm(arena.floats(kChunk)),
        beta(arena.floats(kChunk)),
        through(arena.floats(2 * key_padded)),
        last(arena.floats(key_padded)),
        partial(arena.floats(2 * kBlock * kBlock * kLanes)) {}
};

// The second block's rows of x.
inline Panels second(Panels const& x) { return {x.row(kBlock, 0), x.rows, x.cols}; }

// f(panel, j, channel) for every vector of channels.
template <class F>
inline void for_channels(Panels const& x, F const& f) {
  for (int panel = 0; panel < x.panels(); ++panel) {
    for (int j = 0; j < kPanel; j += kLanes) f(panel, j, panel * kPanel + j);
  }
}

// Channels [channel, channel + kLanes) of a row of key_dim numbers, zeros behind them.
inline Vec load_channels(float const* row, int channel, int key_dim) {
  if (channel + kLanes <= key_dim) return load(row + channel);
  Vec x{};
  for (int l = 0; l < kLanes && channel + l < key_dim; ++l) x[l] = row[channel + l];
  return x;
}

// The log decays of one head out of what is in memory.
struct Gate {
  Inputs const& p;
  float const* bias;
  float rate;

  Gate(Inputs const& inputs, int head)
      : p(inputs),
        bias(inputs.A_log == nullptr ? nullptr
                                     : inputs.dt_bias + static_cast<int64_t>(head) * inputs.key_dim),
        rate(inputs.A_log == nullptr ? 0.f : -__builtin_expf(inputs.A_log[head])) {}

  bool raw() const { return bias != nullptr; }
  Vec shifted(Vec x, int channel) const { return x + load_channels(bias, channel, p.key_dim); }
  Vec log_decay(Vec x, int channel) const { return raw() ? rate * softplus(shifted(x, channel)) : x; }
};

// decay, head, tail, through and last; leaves head and tail of the blocks in near and far.
inline void prepare_gates(Inputs const& p, int64_t row, int value_head, Chunk& c) {
  Gate const gate(p, value_head);
  load_rows<float>(p.g, row, value_head, c, 0, p.key_dim, c.decay);
  int const blocks = c.rows / kBlock;
  for_channels(c.decay, [&](int panel, int j, int channel) __attribute__((always_inline)) {
    Vec logs[kChunk], behind[2];
    for (int i = 0; i < c.rows; ++i) {
      logs[i] = i < c.tokens ? gate.log_decay(load(c.decay.row(i, panel) + j), channel) : Vec{};
      store(c.decay.row(i, panel) + j, exp(logs[i]));
    }
    for (int block = 0; block < blocks; ++block) {
      int const first = block * kBlock;
      Vec sum{};
      for (int i = first; i < first + kBlock; ++i) {
        sum += logs[i];
        store(c.head.row(i, panel) + j, exp(sum));
      }
      behind[block] = exp(sum);
      sum = Vec{};
      for (int i = first + kBlock - 1; i >= first; --i) {
        store(c.tail.row(i, panel) + j, exp(sum));
        sum += logs[i];
      }
    }
    store(c.last + channel, blocks == 1 ? behind[0] : behind[0] * behind[1]);
    if (blocks == 1) return;
    for (int i = 0; i < kBlock; ++i) {
      float *const head = c.head.row(kBlock + i, panel) + j, *const tail = c.tail.row(i, panel) + j;
      Vec const near = load(head), far = load(tail);
      store(c.near.row(i, panel) + j, near);
      store(c.far.row(i, panel) + j, far);
      store(head, near * behind[0]);
      store(tail, far * behind[1]);
    }
  });
}

// out = a o b * factor, rows [0, rows).
inline void hadamard(Panels const& a, Panels const& b, float factor, Panels const& out, int rows) {
  for (int panel = 0; panel < out.panels(); ++panel) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < kPanel; j += kLanes) {
        store(out.row(i, panel) + j, load(a.row(i, panel) + j) * load(b.row(i, panel) + j) * factor);
      }
    }
  }
}

// Rows of the scores within the block that begins at row `first`: A if kKeys, P without its diagonal if
// kQueries.
template <bool kQueries, bool kKeys>
void block_scores(Chunk const& c, int first, float scale) {
  float* const partial_q = c.partial;
  float* const partial_k = c.partial + kBlock * kBlock * kLanes;
  for (int panel = 0; panel < c.k.panels(); ++panel) {
    for (int j = 0; j < kBlock - 1; ++j) {
      Vec w[kVecs];
      for (int l = 0; l < kVecs; ++l) w[l] = load(c.k.row(first + j, panel) + l * kLanes);
      for (int i = j + 1; i < kBlock; ++i) {
        float const *const decay = c.decay.row(first + i, panel), *const q = c.q.row(first + i, panel),
                           *const k = c.k.row(first + i, panel);
        int const at = (i * kBlock + j) * kLanes;
        Vec by_q{}, by_k{};
        if (panel > 0) {
          if (kQueries) by_q = load(partial_q + at);
          if (kKeys) by_k = load(partial_k + at);
        }
        for (int l = 0; l < kVecs; ++l) {
          w[l] *= load(decay + l * kLanes);
          if (kQueries) by_q += w[l] * load(q + l * kLanes);
          if (kKeys) by_k += w[l] * load(k + l * kLanes);
        }
        if (kQueries) store(partial_q + at, by_q);
        if (kKeys) store(partial_k + at, by_k);
      }
    }
  }
  auto const sum_row = [&](float const* partial, int i, float factor, Panels const& out) {
    float* const to = out.row(first + i, 0);
    for (int j = 0; j < kChunk; j += kLanes) {
      Vec total{};
      if (j >= first && j < first + kBlock) {
        Vec rows[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          int const column = j - first + r;
          rows[r] = column < i ? load(partial + (i * kBlock + column) * kLanes) : Vec{};
        }
        exchange<1>(rows);
        for (int r = 0; r < kLanes; ++r) total += rows[r];
        store(to + j, total * factor);
      } else if (j > first) {
        store(to + j, total);
      }
    }
  };
  for (int i = 0; i < kBlock; ++i) {
    if (kQueries) sum_row(partial_q, i, scale, c.attention);
    if (kKeys) sum_row(partial_k, i, 1.f, c.scores);
  }
}

// A and P.
template <bool kQueries, bool kKeys>
void compute_scores(Chunk const& c, float scale) {
  if (c.rows > kBlock) {
    transpose(c.far_k, c.far_k_t, kBlock);
    if (kQueries) multiply<false>(c.near_q, c.far_k_t, second(c.attention), kBlock, c.far_k_t.rows, 0.f);
    if (kKeys) multiply<false>(c.near_k, c.far_k_t, second(c.scores), kBlock, c.far_k_t.rows, 0.f);
  }
  for (int first = 0; first < c.rows; first += kBlock) block_scores<kQueries, kKeys>(c, first, scale);
  if (!kQueries) return;
  alignas(64) float self[kChunk];
  row_dots(c.q, c.k, self, c.rows);
  for (int i = 0; i < c.rows; ++i) c.attention.at(i, i) = scale * self[i];
}

// Fills c for tokens [begin, begin + tokens) of a row: P only with_queries, the inverse unless it is there
// already (or not needed).
template <class T>
void prepare_chunk(Inputs const& p, int64_t row, int value_head, int64_t begin, int tokens, bool with_queries,
                   bool inverse_given, Chunk& c) {
  int const qk_head = value_head / (p.value_heads / p.heads);
  bool const with_inverse = p.delta && !inverse_given;
  c.begin = begin;
  c.tokens = tokens;
  c.rows = round_up(tokens, kRowMultiple);
  prepare_gates(p, row, value_head, c);
  for (int i = 0; i < c.rows; ++i)
    c.beta[i] = i < c.tokens ? write_strength(p, row, c.begin + i, value_head) : 0.f;

  load_rows<T>(p.k, row, qk_head, c, 0, p.key_dim, c.k);
  normalise_rows(c.k, c.k_norm, c.rows, p.qk_l2norm);
  hadamard(c.k, c.tail, 1.f, c.k_tail, c.rows);
  if (p.delta) hadamard(c.k, c.head, 1.f, c.k_head, c.rows);
  if (with_queries) {
    load_rows<T>(p.q, row, qk_head, c, 0, p.key_dim, c.q);
    normalise_rows(c.q, c.q_norm, c.rows, p.qk_l2norm);
    hadamard(c.q, c.head, p.scale, c.q_head, c.rows);
  }
  if (c.rows > kBlock) {
    hadamard(c.k, c.far, 1.f, c.far_k, kBlock);
    if (p.delta) hadamard(second(c.k), c.near, 1.f, c.near_k, kBlock);
    if (with_queries) hadamard(second(c.q), c.near, p.scale, c.near_q, kBlock);
  }
  if (with_queries && with_inverse) {
    compute_scores<true, true>(c, p.scale);
  } else if (with_queries) {
    compute_scores<true, false>(c, p.scale);
  } else if (with_inverse) {
    compute_scores<false, true>(c, p.scale);
  }
  if (with_inverse) invert(c.scores, c.beta, c.inverse, c.rows);
}

// x <- beta o x.
inline void scale_by_beta(Chunk const& c, Panels const& x) { scale_rows(x, c.beta, c.rows); }

// x <- x - y, rows [0, rows).
inline void subtract_rows(Panels const& x, Panels const& y, int rows) {
  for (int panel = 0; panel < x.panels(); ++panel) {
    for (int i = 0; i < rows * kPanel; i += kLanes) {
      float* const out = x.row(0, panel) + i;
      store(out, load(out) - load(y.row(0, panel) + i));
    }
  }
}

// S <- last o S + (tail o K)^T U.
inline void update_state(Chunk const& c, Panels const& u, Panels const& s) {
  scale_rows(s, c.last, s.rows);
  multiply<true>(c.k_tail, u, s, s.rows, c.rows, 1.f);
}

}  // namespace
}  // namespace lt2::kda::LT2_ISA
