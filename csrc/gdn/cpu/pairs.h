// Forward by chunks in pairs of bf16, for bf16 inputs without the delta rule and the l2norm: see chunk.h for
// the algebra. A pair, two numbers that are next to each other in the depth of a product, takes the place of
// one fp32 number: panels, register tiles and transposition are the same, of half the depth.
//
// q and k are bf16 already. P, U and S are rounded once where O is made of them, which is rounded itself;
// what the state gains is split into two bf16 numbers, high and low.
#pragma once

#include "gdn/cpu/bf16.h"
#include "gdn/cpu/chunk.h"

namespace lt2::gdn::LT2_ISA {
namespace {

struct Bf16Pairs {
  static constexpr int kDepth = 2;
  static __attribute__((always_inline)) Vec spread(float const* x) {
    int32_t bits;
    __builtin_memcpy(&bits, x, sizeof(bits));
    return reinterpret_cast<Vec>(_mm512_set1_epi32(bits));
  }
  static __attribute__((always_inline)) void add(Vec& sum, Vec a, Vec b) {
    sum = reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                 reinterpret_cast<__m512bh>(b)));
  }
};

inline bool takes_pairs(ForwardParams const& p) {
  return p.dtype == Dtype::kBFloat16 && !p.recurrent && !p.delta && !p.qk_l2norm && p.key_dim % kPanel == 0;
}

// Rows and columns of tokens or channels that are halved are of pairs.
struct PairBuffers {
  Chunk chunk;
  States states, rounded;       // [K, V]; [K / 2, V]
  Panels q, k, k_t, k_tokens;   // [C, K / 2]; [K / 2, C]; [C / 2, K]
  Panels attention;             // [C, C / 2] P
  Panels u, writes, high, low;  // [C, V] U; [C / 2, V] U and delta o U

  PairBuffers(Arena& arena, Geometry const& g, int heads)
      : chunk(arena, kPanel, kForwardChunk),
        states(arena, g, heads),
        rounded(arena, {g.key_padded / 2, g.value_padded}, heads),
        q(arena.panels(kForwardChunk, round_up(g.key_padded / 2, kPanel))),
        k(arena.panels(kForwardChunk, q.cols)),
        k_t(arena.panels(k.cols, kForwardChunk)),
        k_tokens(arena.panels(kForwardChunk / 2, g.key_padded)),
        attention(arena.panels(kForwardChunk, kPanel)),
        u(arena.panels(kForwardChunk, g.value_padded)),
        writes(arena.panels(kForwardChunk / 2, g.value_padded)),
        high(arena.panels(kForwardChunk / 2, g.value_padded)),
        low(arena.panels(kForwardChunk / 2, g.value_padded)) {}
};

inline void store_pairs(float* to, __m512i pairs) { _mm512_storeu_si512(to, pairs); }
inline __m512i load_pairs(void const* from) { return _mm512_loadu_si512(from); }

// Rows of q or k of the chunk as they are, zeros around them.
inline void load_pair_rows(Strided const& x, int64_t row, int head, Chunk const& c, int dim,
                           Panels const& out) {
  for (int i = 0; i < c.rows; ++i) {
    for (int j = 0; j < out.cols; j += kLanes) {
      bool const there = i < c.tokens && 2 * j < dim;
      store_pairs(out.row(i, j / kPanel) + j % kPanel,
                  there ? load_pairs(token_row<Bf16 const>(x, row, c.begin + i, head) + 2 * j) : __m512i{});
    }
  }
}

// Pairs of channels to pairs of tokens.
inline void pair_tokens(Panels const& k, int rows, Panels const& out) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  __m512i const first = load_pairs(kOrder), second = _mm512_add_epi16(first, _mm512_set1_epi16(kLanes));
  for (int i = 0; i < rows; i += 2) {
    for (int panel = 0; panel < out.panels(); ++panel) {
      float const* const from = k.row(i, panel / 2) + panel % 2 * kLanes;
      __m512i const even = load_pairs(from), odd = load_pairs(from + kPanel);
      store_pairs(out.row(i / 2, panel), _mm512_permutex2var_epi16(even, first, odd));
      store_pairs(out.row(i / 2, panel) + kLanes, _mm512_permutex2var_epi16(even, second, odd));
    }
  }
}

inline void round_state(Panels const& s, Panels const& out) {
  for (int panel = 0; panel < s.panels(); ++panel) {
    for (int i = 0; i < s.rows; i += 2) {
      for (int j = 0; j < kPanel; j += kLanes)
        store_pairs(out.row(i / 2, panel) + j,
                    interleave(load(s.row(i, panel) + j), load(s.row(i + 1, panel) + j)));
    }
  }
}

inline void prepare_pair_chunk(ForwardParams const& p, int64_t row, int head, int tokens, PairBuffers& b) {
  Chunk& c = b.chunk;
  int const qk_head = head / (p.value_heads / p.heads);
  c.tokens = tokens;
  c.rows = round_up(tokens, kRowMultiple);
  load_pair_rows(p.k, row, qk_head, c, p.key_dim, b.k);
  load_pair_rows(p.q, row, qk_head, c, p.key_dim, b.q);
  transpose(b.k, b.k_t, c.rows);
  pair_tokens(b.k, c.rows, b.k_tokens);
  prepare_gates(p, row, head, c);
  multiply<false, Triangle::kLowerOut, Bf16Pairs>(b.q, b.k_t, c.qk, c.rows, p.key_dim / 2, 0.f, c.ahead);
  for (int i = 0; i < c.rows; ++i) {
    float const *const qk = c.qk.row(i, 0), *const decay = c.decay.row(i, 0);
    store_pairs(b.attention.row(i, 0), round_row(load(qk) * load(decay) * p.scale,
                                                 load(qk + kLanes) * load(decay + kLanes) * p.scale));
  }
}

// U = diag(beta) V, and delta o U.
inline void pair_writes(ForwardParams const& p, int64_t row, int head, ValueSlice slice, PairBuffers& b) {
  Chunk const& c = b.chunk;
  load_rows<Bf16>(p.v, row, head, c, slice.begin, slice.end - slice.begin, b.u);
  for (int panel = 0; panel < b.u.panels(); ++panel) {
    for (int i = 0; i < c.rows; i += 2) {
      for (int j = 0; j < kPanel; j += kLanes) {
        Vec const even = load(b.u.row(i, panel) + j) * c.beta[i];
        Vec const odd = load(b.u.row(i + 1, panel) + j) * c.beta[i + 1];
        store_pairs(b.writes.row(i / 2, panel) + j, interleave(even, odd));
        SplitRows const rest = split_interleaved(even * c.delta[i], odd * c.delta[i + 1]);
        store_pairs(b.high.row(i / 2, panel) + j, rest.high);
        store_pairs(b.low.row(i / 2, panel) + j, rest.low);
      }
    }
  }
}

// S <- decay S + K^T (delta o U), and S rounded.
inline void gain_pairs(PairBuffers const& b, Panels const& s, Panels const& rounded) {
  Chunk const& c = b.chunk;
  for (int panel = 0; panel < s.panels(); ++panel) {
    for (int i = 0; i < s.rows; i += kTileRows) {
      float const* const k = b.k_tokens.row(0, i / kPanel) + i % kPanel;
      Tile acc{};
      accumulate_tile<true, Bf16Pairs>(k, 0, b.low.row(0, panel), acc, 0, c.rows / 2, c.ahead);
      accumulate_tile<true, Bf16Pairs>(k, 0, b.high.row(0, panel), acc, 0, c.rows / 2, c.ahead);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < 2; ++v) {
          float* const to = s.row(i + r, panel) + v * kLanes;
          acc[r][v] += load(to) * c.last_decay;
          store(to, acc[r][v]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; r += 2) {
        for (int v = 0; v < 2; ++v)
          store_pairs(rounded.row((i + r) / 2, panel) + v * kLanes, interleave(acc[r][v], acc[r + 1][v]));
      }
    }
  }
}

// One chunk after the other of all these heads.
inline void forward_pairs(ForwardParams const& p, int64_t sequence, Heads heads, ValueSlice slice,
                          Arena& arena) {
  PairBuffers b(arena, geometry(p, slice), heads.end - heads.begin);
  Chunk& c = b.chunk;
  Span const span = sequence_span(p, sequence);
  alignas(64) float factor[kForwardChunk];
  c.ahead.spread = true;
  for (int h = 0; h < heads.end - heads.begin; ++h) {
    load_initial_state(p, sequence, heads.begin + h, slice, b.states[h]);
    round_state(b.states[h], b.rounded[h]);
  }
  for (c.begin = span.begin; c.begin < span.end; c.begin += kForwardChunk) {
    int const tokens =
        static_cast<int>(span.end - c.begin < kForwardChunk ? span.end - c.begin : kForwardChunk);
    expect_next_chunk<Bf16>(p, span, heads, slice, c);
    for (int head = heads.begin; head < heads.end; ++head) {
      Panels const s = b.states[head - heads.begin], rounded = b.rounded[head - heads.begin];
      prepare_pair_chunk(p, span.row, head, tokens, b);
      pair_writes(p, span.row, head, slice, b);
      for (int i = 0; i < c.rows; ++i) factor[i] = p.scale * c.gamma[i];
      store_outputs<Bf16, Bf16Pairs>(b.q, rounded, factor, b.attention, b.writes, p.o, span.row, head, c,
                                     slice.begin, slice.end - slice.begin);
      gain_pairs(b, s, rounded);
    }
  }
  for (int h = 0; h < heads.end - heads.begin; ++h)
    store_final_state(p, sequence, heads.begin + h, slice, b.states[h]);
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
