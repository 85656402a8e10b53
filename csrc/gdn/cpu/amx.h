// Forward by chunks on the tile unit (AMX), for bf16 inputs: see chunk.h for the algebra.
//
// Tiles multiply bf16 and add up in fp32. q and k are bf16 already, and the l2norm scales rows of results
// instead. Every other operand (S, Y, T, P, U) is split into two bf16 numbers, high and low, 16 bits
// together, and multiplied part by part, so that no error but that of rounding the output is seen in it.
#pragma once

#include <immintrin.h>

#include "gdn/cpu/bf16.h"
#include "gdn/cpu/chunk.h"

namespace lt2::gdn::LT2_ISA {
namespace {

constexpr int kAmxChunk = 64;
constexpr int kBlock = kPanel;  // 2 x 2 tiles make a block of 32 x 32: one panel wide
constexpr int kMinAmxTokens = 16;

// Left operands are rows [m, depth]; right operands are pairs of rows, [depth / 2, n, 2]. Strides in
// elements.
struct Operand {
  Bf16* data;
  int64_t stride;

  Operand(Arena& arena, int rows, int64_t row_size)
      : data(reinterpret_cast<Bf16*>(arena.floats(rows * row_size / 2))), stride(row_size) {}
  Bf16* row(int64_t i) const { return data + i * stride; }
  // Column block of a right operand, or depth block of a left one.
  Bf16 const* right(int block) const { return data + 2 * kBlock * block; }
};

struct Split {
  Operand high, low;

  Split(Arena& arena, int rows, int64_t row_size) : high(arena, rows, row_size), low(arena, rows, row_size) {}
};

struct AmxBuffers {
  Chunk chunk;
  Panels s, y, qs, u;
  Operand k, q;               // [C, K]
  Operand k_pairs;            // K^T as a right operand [K / 2, C, 2]
  Operand k_t;                // K^T as a left one [K, C]
  Split state;                // [K / 2, V, 2]
  Split writes;               // Y, U, delta o U in turn [C / 2, V, 2]
  Split transfer, attention;  // [C, C]

  AmxBuffers(Arena& arena, Geometry const& g)
      : chunk(arena, kPanel, kAmxChunk),
        s(arena.panels(g.key_padded, g.value_padded)),
        y(arena.panels(kAmxChunk, g.value_padded)),
        qs(arena.panels(kAmxChunk, g.value_padded)),
        u(arena.panels(kAmxChunk, g.value_padded)),
        k(arena, kAmxChunk, g.key_padded),
        q(arena, kAmxChunk, g.key_padded),
        k_pairs(arena, g.key_padded / 2, 2 * kAmxChunk),
        k_t(arena, g.key_padded, kAmxChunk),
        state(arena, g.key_padded / 2, 2 * g.value_padded),
        writes(arena, kAmxChunk / 2, 2 * g.value_padded),
        transfer(arena, kAmxChunk, kAmxChunk),
        attention(arena, kAmxChunk, kAmxChunk) {}
};

// Tiles 0 to 3 are the sums of a block, 4 and 5 its rows, 6 and 7 its columns; all are 16 rows of 64 bytes.
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  asm volatile("ldtilecfg %0" : : "m"(config));
}
inline void release_tiles() { asm volatile("tilerelease"); }

inline void zero_tiles() {
  asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
}

// Adds a [32, depth] times b [depth, 32] to the block.
inline void multiply_tiles(Bf16 const* a, int64_t a_stride, Bf16 const* b, int64_t b_stride, int depth) {
  for (int k = 0; k < depth; k += 32, a += 32, b += 16 * b_stride) {
    asm volatile(
        "tileloadd (%0,%4,1), %%tmm4\n\t"
        "tileloadd (%2,%5,1), %%tmm6\n\t"
        "tileloadd (%3,%5,1), %%tmm7\n\t"
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
        "tileloadd (%1,%4,1), %%tmm5\n\t"
        "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
        "tdpbf16ps %%tmm7, %%tmm5, %%tmm3"
        :
        : "r"(a), "r"(a + 16 * a_stride), "r"(b), "r"(b + 32), "r"(2 * a_stride), "r"(2 * b_stride)
        : "memory");
  }
}
inline void multiply_tiles(Operand const& a, int row, Operand const& b, int block, int depth) {
  multiply_tiles(a.row(row), a.stride, b.right(block), b.stride, depth);
}
inline void multiply_tiles(Operand const& a, int row, Split const& b, int block, int depth) {
  multiply_tiles(a, row, b.low, block, depth);
  multiply_tiles(a, row, b.high, block, depth);
}
inline void multiply_tiles(Split const& a, int row, Split const& b, int block, int depth) {
  multiply_tiles(a.low, row, b.high, block, depth);
  multiply_tiles(a.high, row, b, block, depth);
}

// Writes the block to rows of kPanel floats.
inline void store_tiles(float* c) {
  asm volatile(
      "tilestored %%tmm0, (%0,%4,1)\n\t"
      "tilestored %%tmm1, (%1,%4,1)\n\t"
      "tilestored %%tmm2, (%2,%4,1)\n\t"
      "tilestored %%tmm3, (%3,%4,1)"
      :
      : "r"(c), "r"(c + 16), "r"(c + 16 * kPanel), "r"(c + 16 * kPanel + 16), "r"(4L * kPanel)
      : "memory");
}

inline void put_pairs(Vec even, Vec odd, int64_t at, Split const& out) {
  SplitRows const rows = split_interleaved(even, odd);
  _mm512_storeu_si512(out.high.data + at, rows.high);
  _mm512_storeu_si512(out.low.data + at, rows.low);
}
// 32 numbers in a row.
inline void put_row(Vec first, Vec second, int64_t at, Split const& out) {
  Bf16* const high = out.high.data + at;
  _mm512_storeu_si512(high, round_row(first, second));
  _mm512_storeu_si512(out.low.data + at, round_row(first - load(high), second - load(high + kLanes)));
}

// Rows of q or k of the chunk as they are, zeros around them.
inline void copy_rows(Strided const& x, int64_t row, int head, Chunk const& c, int dim, Operand const& out) {
  for (int i = 0; i < c.rows; ++i) {
    Bf16* const to = out.row(i);
    if (i >= c.tokens) {
      __builtin_memset(to, 0, out.stride * sizeof(Bf16));
      continue;
    }
    Bf16 const* const from = token_row<Bf16 const>(x, row, c.begin + i, head);
    __builtin_memcpy(to, from, dim * sizeof(Bf16));
    if (dim < out.stride) __builtin_memset(to + dim, 0, (out.stride - dim) * sizeof(Bf16));
  }
  expect_rows<Bf16>(x, row, head, c, c.begin + c.size, 0, dim);
}

// K^T in both forms. A pair of keys is one 32-bit element, which the transposition of floats moves as it is.
inline void transpose_keys(AmxBuffers const& b, int rows) {
  int64_t const pairs = b.k.stride / 2;
  for (int64_t j = 0; j < pairs; j += kLanes) {
    for (int i = 0; i < rows; i += kLanes) {
      transpose_block(reinterpret_cast<float const*>(b.k.row(i)) + j, pairs,
                      reinterpret_cast<float*>(b.k_pairs.row(j)) + i, b.k_pairs.stride / 2);
    }
  }
  for (int64_t j = 0; j < pairs; ++j) {
    for (int i = 0; i < rows; i += kLanes) {
      VecU both;
      __builtin_memcpy(&both, b.k_pairs.row(j) + 2 * i, sizeof(both));
      VecH const even = __builtin_convertvector(both, VecH), odd = __builtin_convertvector(both >> 16, VecH);
      __builtin_memcpy(b.k_t.row(2 * j) + i, &even, sizeof(even));
      __builtin_memcpy(b.k_t.row(2 * j + 1) + i, &odd, sizeof(odd));
    }
  }
}

// 1 / |x_i| of rows of x, or ones.
inline void row_norms(Operand const& x, int rows, bool enabled, float* norm) {
  for (int i = 0; i < rows; i += kLanes) {
    if (!enabled) {
      store(norm + i, splat(1.f));
      continue;
    }
    Vec squares[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      Vec sum{};
      for (int64_t j = 0; j < x.stride; j += kLanes) {
        Vec const v = load(x.row(i + r) + j);
        sum += v * v;
      }
      squares[r] = sum;
    }
    exchange<1>(squares);
    Vec total = splat(1e-6f);
    for (int r = 0; r < kLanes; ++r) total += squares[r];
    for (int r = 0; r < kLanes; ++r) norm[i + r] = 1.f / __builtin_sqrtf(total[r]);
  }
}

// out = x K^T for the blocks on and below the diagonal.
inline void score_blocks(AmxBuffers const& b, Operand const& x, Panels const& out) {
  for (int i = 0; i < b.chunk.rows; i += kBlock) {
    for (int block = 0; block <= i / kBlock; ++block) {
      zero_tiles();
      multiply_tiles(x, i, b.k_pairs, block, static_cast<int>(x.stride));
      store_tiles(out.row(i, block));
    }
  }
}

// T = E o inverse for the delta rule, and P = scale E o Q K^T.
inline void split_scores(AmxBuffers const& b, float scale, bool delta) {
  Chunk const& c = b.chunk;
  for (int i = 0; i < c.rows; ++i) {
    float const factor = scale * c.q_norm[i];
    for (int panel = 0; panel <= i / kPanel; ++panel) {
      Vec t[2], p[2];
      for (int l = 0; l < 2; ++l) {
        int const j = l * kLanes;
        Vec const decay = load(c.decay.row(i, panel) + j);
        t[l] = delta ? decay * load(c.inverse.row(i, panel) + j) : Vec{};
        p[l] = decay * load(c.qk.row(i, panel) + j) * load(c.k_norm + panel * kPanel + j) * factor;
      }
      if (delta) put_row(t[0], t[1], i * b.transfer.high.stride + panel * kPanel, b.transfer);
      put_row(p[0], p[1], i * b.attention.high.stride + panel * kPanel, b.attention);
    }
  }
}

inline void prepare_amx_chunk(ForwardParams const& p, int64_t row, int head, int64_t begin, int tokens,
                              AmxBuffers& b) {
  Chunk& c = b.chunk;
  int const qk_head = head / (p.value_heads / p.heads);
  c.begin = begin;
  c.tokens = tokens;
  c.rows = round_up(tokens, kBlock);
  copy_rows(p.k, row, qk_head, c, p.key_dim, b.k);
  copy_rows(p.q, row, qk_head, c, p.key_dim, b.q);
  transpose_keys(b, c.rows);
  row_norms(b.k, c.rows, p.qk_l2norm, c.k_norm);
  row_norms(b.q, c.rows, p.qk_l2norm, c.q_norm);
  if (p.delta) score_blocks(b, b.k, c.kk);
  score_blocks(b, b.q, c.qk);
  if (p.delta && p.qk_l2norm) {
    for (int i = 0; i < c.rows; ++i) {
      for (int j = 0; j < round_up(i + 1, kPanel); j += kLanes) {
        float* const x = c.kk.row(i, j / kPanel) + j % kPanel;
        store(x, load(x) * load(c.k_norm + j) * c.k_norm[i]);
      }
    }
  }
  prepare_gates(p, row, head, c);
  if (p.delta) invert(c.kk, c.beta, c.inverse, c.rows);
  split_scores(b, p.scale, p.delta);
}

// Rows i and i + 1 of x as pairs, rows scaled by factor.
inline void split_rows(Panels const& x, float const* factor, int rows, Split const& out) {
  for (int panel = 0; panel < x.panels(); ++panel) {
    for (int i = 0; i < rows; i += 2) {
      for (int j = 0; j < kPanel; j += kLanes) {
        int64_t const at = i / 2 * out.high.stride + 2 * (panel * kPanel + j);
        put_pairs(load(x.row(i, panel) + j) * factor[i], load(x.row(i + 1, panel) + j) * factor[i + 1], at,
                  out);
      }
    }
  }
}

// U = T diag(beta) (V - gamma o K S) from V in u and K S in y.
inline void erase_and_solve(AmxBuffers& b, int panels) {
  Chunk const& c = b.chunk;
  alignas(64) float factor[kAmxChunk];
  for (int i = 0; i < c.rows; ++i) factor[i] = c.gamma[i] * c.k_norm[i];
  for (int panel = 0; panel < panels; ++panel) {
    for (int i = 0; i < c.rows; ++i) {
      for (int j = 0; j < kPanel; j += kLanes) {
        float* const y = b.y.row(i, panel) + j;
        store(y, load(b.u.row(i, panel) + j) - load(y) * factor[i]);
      }
    }
  }
  split_rows(b.y, c.beta, c.rows, b.writes);
  for (int i = 0; i < c.rows; i += kBlock) {
    for (int block = 0; block < panels; ++block) {
      zero_tiles();
      multiply_tiles(b.transfer, i, b.writes, block, i + kBlock);
      store_tiles(b.u.row(i, block));
    }
  }
}

// Writes O of the chunk, leaves delta o U in writes.
inline void amx_chunk(ForwardParams const& p, int64_t row, int head, ValueSlice slice, AmxBuffers& b) {
  Chunk& c = b.chunk;
  int const n = slice.end - slice.begin, panels = b.s.panels(), key_dim = b.s.rows;
  alignas(64) float factor[kAmxChunk];
  for (int i = 0; i < c.rows; i += kBlock) {
    for (int block = 0; block < panels; ++block) {
      if (p.delta) {
        zero_tiles();
        multiply_tiles(b.k, i, b.state, block, key_dim);
        store_tiles(b.y.row(i, block));
      }
      zero_tiles();
      multiply_tiles(b.q, i, b.state, block, key_dim);
      store_tiles(b.qs.row(i, block));
      for (int k = 0; k < key_dim; k += kBetween) c.ahead();
    }
  }
  load_rows<Bf16>(p.v, row, head, c, slice.begin, n, b.u);
  expect_rows<Bf16>(p.v, row, head, c, c.begin + c.size, slice.begin, n);
  if (p.delta) {
    erase_and_solve(b, panels);
  } else {
    scale_rows(b.u, c.beta, c.rows);
  }
  for (int i = 0; i < c.rows; ++i) factor[i] = 1.f;
  split_rows(b.u, factor, c.rows, b.writes);
  for (int i = 0; i < c.rows; i += kBlock) {
    for (int block = 0; block < panels; ++block) {
      zero_tiles();
      multiply_tiles(b.attention, i, b.writes, block, i + kBlock);
      store_tiles(b.y.row(i, block));
      for (int k = 0; k < key_dim; k += kBetween) c.ahead();
    }
  }
  for (int i = 0; i < c.rows; ++i) factor[i] = p.scale * c.gamma[i] * c.q_norm[i];
  for (int panel = 0; panel < panels; ++panel) {
    for (int i = 0; i < c.rows; ++i) {
      for (int j = 0; j < kPanel; j += kLanes) {
        float* const o = b.y.row(i, panel) + j;
        store(o, load(o) + load(b.qs.row(i, panel) + j) * factor[i]);
      }
    }
  }
  store_rows<Bf16>(b.y, p.o, row, head, c, slice.begin, n);
  expect_rows<Bf16>(p.o, row, head, c, c.begin + c.size, slice.begin, n);
  for (int i = 0; i < c.rows; ++i) factor[i] = c.delta[i] * c.k_norm[i];
  split_rows(b.u, factor, c.rows, b.writes);
}

// S <- decay S + what the tiles hold of block (k, panel), if anything; and S in two parts.
inline void update_state(AmxBuffers const& b, int k, int panel, float decay, float const* added) {
  for (int i = 0; i < kBlock; i += 2) {
    for (int j = 0; j < kPanel; j += kLanes) {
      float *const even = b.s.row(k + i, panel) + j, *const odd = even + kPanel;
      Vec x = load(even), y = load(odd);
      if (added != nullptr) {
        x = x * decay + load(added + i * kPanel + j);
        y = y * decay + load(added + (i + 1) * kPanel + j);
        store(even, x);
        store(odd, y);
      }
      int64_t const at = (k + i) / 2 * b.state.high.stride + 2 * (panel * kPanel + j);
      put_pairs(x, y, at, b.state);
    }
  }
}

inline void forward_amx(ForwardParams const& p, Span span, int head, ValueSlice slice, AmxBuffers& b) {
  Chunk const& c = b.chunk;
  c.ahead.spread = true;
  alignas(64) float added[kBlock * kPanel];
  configure_tiles();
  for (int panel = 0; panel < b.s.panels(); ++panel) {
    for (int k = 0; k < b.s.rows; k += kBlock) update_state(b, k, panel, 1.f, nullptr);
  }
  for (int64_t t = span.begin; t < span.end; t += kAmxChunk) {
    int const tokens = static_cast<int>(span.end - t < kAmxChunk ? span.end - t : kAmxChunk);
    prepare_amx_chunk(p, span.row, head, t, tokens, b);
    amx_chunk(p, span.row, head, slice, b);
    for (int k = 0; k < b.s.rows; k += kBlock) {  // S' = e^{G_last} S + K^T (delta o U)
      for (int panel = 0; panel < b.s.panels(); ++panel) {
        zero_tiles();
        multiply_tiles(b.k_t, k, b.writes, panel, c.rows);
        store_tiles(added);
        for (int i = 0; i < b.s.rows; i += kBetween) c.ahead();
        update_state(b, k, panel, c.last_decay, added);
      }
    }
  }
  release_tiles();
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
