// Forward by chunks (see chunk.h for the algebra) and token by token.
#pragma once

#include "kda/cpu/chunk.h"
#include "kda/cpu/step.h"

namespace lt2::kda::LT2_ISA {
namespace {

struct ForwardBuffers {
  Chunk chunk;
  Panels s, y, u, o;

  ForwardBuffers(Arena& arena, Geometry const& g)
      : chunk(arena, g.key_padded),
        s(arena.panels(g.key_padded, g.value_padded)),
        y(arena.panels(kChunk, g.value_padded)),
        u(arena.panels(kChunk, g.value_padded)),
        o(arena.panels(kChunk, g.value_padded)) {}
};

template <class T>
void forward_chunks(ForwardParams const& p, Span span, int head, ValueSlice slice, ForwardBuffers& b) {
  Chunk& c = b.chunk;
  int const n = slice.end - slice.begin;
  for (int64_t t = span.begin; t < span.end; t += kChunk) {
    int const tokens = static_cast<int>(span.end - t < kChunk ? span.end - t : kChunk);
    prepare_chunk<T>(p, span.row, head, t, tokens, true, false, c);
    expect_rows<T>(p.o, span.row, head, c, c.begin, slice.begin, n);
    load_rows<T>(p.v, span.row, head, c, slice.begin, n, b.u);
    if (p.delta) {
      multiply<false>(c.k_head, b.s, b.y, c.rows, b.s.rows, 0.f);
      subtract_rows(b.u, b.y, c.rows);
      scale_by_beta(c, b.u);
      multiply<false, Triangle::kLowerA>(c.inverse, b.u, b.y, c.rows, c.rows, 0.f);
    } else {
      scale_by_beta(c, b.u);
    }
    Panels const& u = p.delta ? b.y : b.u;
    multiply<false>(c.q_head, b.s, b.o, c.rows, b.s.rows, 0.f);
    multiply<false, Triangle::kLowerA>(c.attention, u, b.o, c.rows, c.rows, 1.f);
    store_rows<T>(b.o, p.o, span.row, head, c, slice.begin, n);
    update_state(c, u, b.s);
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
void forward_item(ForwardParams const& p, int64_t sequence, int head, ValueSlice slice, float* workspace) {
  Arena arena{workspace};
  Span const span = sequence_span(p, sequence);
  int64_t const states = (sequence * p.value_heads + head) * p.key_dim * p.value_dim;
  ForwardBuffers b(arena, geometry(p, slice));
  load_state(p, p.initial_state == nullptr ? nullptr : p.initial_state + states, slice, b.s);
  if (p.recurrent) {
    int64_t const floats = static_cast<int64_t>(p.key_dim) * (slice.end - slice.begin);
    forward_tokens<T>(p, span, head, slice, b.s, arena.floats(floats));
  } else {
    forward_chunks<T>(p, span, head, slice, b);
  }
  if (p.final_state != nullptr) store_state(p, b.s, slice, p.final_state + states);
}

void forward(ForwardParams const& p, int64_t sequence, int head, ValueSlice slice, float* workspace) {
  (p.dtype == Dtype::kBFloat16 ? forward_item<Bf16> : forward_item<float>)(p, sequence, head, slice,
                                                                           workspace);
}

int64_t forward_workspace(ForwardParams const& p, int slices) {
  Arena arena{nullptr};
  int const width = round_up((p.value_dim + slices - 1) / slices, kPanel);
  ForwardBuffers const b(arena, geometry(p, {0, width}));
  arena.floats(static_cast<int64_t>(p.key_dim) * width);
  return arena.used;
}

}  // namespace
}  // namespace lt2::kda::LT2_ISA
