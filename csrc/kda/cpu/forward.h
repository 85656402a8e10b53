// Forward by chunks (see chunk.h for the algebra) and token by token.
#pragma once

#include "kda/cpu/chunk.h"
#include "kda/cpu/step.h"

namespace lt2::kda::LT2_ISA {
namespace {

struct ForwardBuffers {
  Chunk chunk;
  States states;
  Panels y, u;

  ForwardBuffers(Arena& arena, Geometry const& g, int heads)
      : chunk(arena, g.key_padded),
        states(arena, g, heads),
        y(arena.panels(kChunk, g.value_padded)),
        u(arena.panels(kChunk, g.value_padded)) {}
};

// One chunk after the other of all these heads: their rows are side by side in memory.
template <class T>
void forward_chunks(ForwardParams const& p, Span span, Heads heads, ValueSlice slice, ForwardBuffers& b) {
  Chunk& c = b.chunk;
  int const n = slice.end - slice.begin;
  alignas(64) float ones[kChunk];
  for (float& x : ones) x = 1.f;
  c.ahead.spread = true;
  for (c.begin = span.begin; c.begin < span.end; c.begin += kChunk) {
    int const tokens = static_cast<int>(span.end - c.begin < kChunk ? span.end - c.begin : kChunk);
    expect_next_chunk<T>(p, span, heads, slice, c);
    expect_next<float>(p.g, span, heads, c, 0, p.key_dim);
    for (int head = heads.begin; head < heads.end; ++head) {
      Panels const s = b.states[head - heads.begin];
      prepare_chunk<T>(p, span.row, head, c.begin, tokens, true, false, c);
      load_rows<T>(p.v, span.row, head, c, slice.begin, n, b.u);
      if (p.delta) {
        multiply<false>(c.k_head, s, b.y, c.rows, s.rows, 0.f, c.ahead);
        subtract_rows(b.u, b.y, c.rows);
        scale_by_beta(c, b.u);
        multiply<false, Triangle::kLowerA>(c.inverse, b.u, b.y, c.rows, c.rows, 0.f);
      } else {
        scale_by_beta(c, b.u);
      }
      Panels const& u = p.delta ? b.y : b.u;
      store_outputs<T>(c.q_head, s, ones, c.attention, u, p.o, span.row, head, c, slice.begin, n);
      update_state(c, u, s);
    }
  }
}

// The same recurrence through the decode step: the state in plain [K, V] rows.
template <class T>
void forward_tokens(ForwardParams const& p, Span span, int head, ValueSlice slice, Panels const& s,
                    float* state) {
  int const n = slice.end - slice.begin;
  Token token;
  for (int i = 0; i < p.key_dim; ++i) {
    for (int j = 0; j < n; ++j) state[i * n + j] = s.at(i, j);
  }
  for (int64_t t = span.begin; t < span.end; ++t) {
    load_token<T>(p, span.row, t, head, slice, token);
    update_rows_k(state, n, p.key_dim, 0, n, &token, 1);
    store_values(token.o, n, token_row<T>(p.o, span.row, t, head) + slice.begin);
  }
  for (int i = 0; i < p.key_dim; ++i) {
    for (int j = 0; j < n; ++j) s.at(i, j) = state[i * n + j];
  }
}

template <class T>
void forward_item(ForwardParams const& p, int64_t sequence, Heads heads, ValueSlice slice, float* workspace) {
  Arena arena{workspace};
  Span const span = sequence_span(p, sequence);
  ForwardBuffers b(arena, geometry(p, slice), heads.end - heads.begin);
  for (int h = heads.begin; h < heads.end; ++h)
    load_initial_state(p, sequence, h, slice, b.states[h - heads.begin]);
  if (p.recurrent) {
    float* const state = arena.floats(static_cast<int64_t>(p.key_dim) * (slice.end - slice.begin));
    for (int h = heads.begin; h < heads.end; ++h)
      forward_tokens<T>(p, span, h, slice, b.states[h - heads.begin], state);
  } else {
    forward_chunks<T>(p, span, heads, slice, b);
  }
  for (int h = heads.begin; h < heads.end; ++h)
    store_final_state(p, sequence, h, slice, b.states[h - heads.begin]);
}

void forward(ForwardParams const& p, int64_t sequence, Heads heads, ValueSlice slice, float* workspace) {
  (p.dtype == Dtype::kBFloat16 ? forward_item<Bf16> : forward_item<float>)(p, sequence, heads, slice,
                                                                           workspace);
}

int forward_heads(ForwardParams const& p) { return p.recurrent ? 1 : heads_in_cache(p); }

int64_t forward_workspace(ForwardParams const& p, int heads, int slices) {
  Arena arena{nullptr};
  int const width = round_up((p.value_dim + slices - 1) / slices, kPanel);
  ForwardBuffers const b(arena, geometry(p, {0, width}), heads);
  arena.floats(static_cast<int64_t>(p.key_dim) * width);
  return arena.used;
}

}  // namespace
}  // namespace lt2::kda::LT2_ISA
