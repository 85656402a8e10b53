// Forward by chunks (see chunk.h for the algebra) and token by token.
#pragma once

#include "gdn/cpu/chunk.h"
#include "gdn/cpu/step.h"
#if defined(__AMX_BF16__)
#include "gdn/cpu/amx.h"
#endif

namespace lt2::gdn::LT2_ISA {
namespace {

struct ForwardBuffers {
  Chunk chunk;
  Panels s, y, u, o;

  ForwardBuffers(Arena& arena, Geometry const& g)
      : chunk(arena, g.key_padded, kForwardChunk),
        s(arena.panels(g.key_padded, g.value_padded)),
        y(arena.panels(kForwardChunk, g.value_padded)),
        u(arena.panels(kForwardChunk, g.value_padded)),
        o(arena.panels(kForwardChunk, g.value_padded)) {}
};

template <class T>
void forward_chunks(ForwardParams const& p, Span span, int head, ValueSlice slice, ForwardBuffers& b) {
  Chunk& c = b.chunk;
  int const n = slice.end - slice.begin;
  c.ahead.spread = true;
  for (int64_t t = span.begin; t < span.end; t += kForwardChunk) {
    int const tokens = static_cast<int>(span.end - t < kForwardChunk ? span.end - t : kForwardChunk);
    prepare_chunk<T>(p, span.row, head, t, tokens, true, false, c);
    compute_writes<T>(p, span.row, head, c, b.s, slice.begin, n, b.y, b.u);
    for (int i = 0; i < c.rows; ++i) b.y.data[i] = p.scale * c.gamma[i];
    multiply<false>(c.q, b.s, b.o, c.rows, b.s.rows, 0.f, c.ahead);
    scale_rows(b.o, b.y.data, c.rows);
    multiply<false, Triangle::kLowerA>(c.attention, b.u, b.o, c.rows, c.rows, 1.f, c.ahead);
    store_rows<T>(b.o, p.o, span.row, head, c, slice.begin, n);
    expect_rows<T>(p.o, span.row, head, c, c.begin + c.size, slice.begin, n);
    scale_rows(b.u, c.delta, c.rows);
    multiply<true>(c.k, b.u, b.s, b.s.rows, c.rows, c.last_decay, c.ahead);
  }
}

// The same recurrence through the decode step: the state in plain [K, V] rows.
template <class T>
void forward_tokens(ForwardParams const& p, Span span, int head, ValueSlice slice, Panels const& s,
                    float* scratch) {
  int const qk_head = head / (p.value_heads / p.heads), n = slice.end - slice.begin;
  float *const q = scratch, *const k = q + kMaxKeyDim, *const v = k + kMaxKeyDim, *const o = v + kMaxValueDim;
  float* const state = o + kMaxValueDim;
  for (int i = 0; i < p.key_dim; ++i) {
    for (int j = 0; j < n; ++j) state[i * n + j] = s.at(i, j);
  }
  for (int64_t t = span.begin; t < span.end; ++t) {
    load_unit(token_row<T const>(p.q, span.row, t, qk_head), p.key_dim, p.qk_l2norm, q);
    load_unit(token_row<T const>(p.k, span.row, t, qk_head), p.key_dim, p.qk_l2norm, k);
    load_unit(token_row<T const>(p.v, span.row, t, head) + slice.begin, n, false, v);
    float const g = log_decay(p, span.row, t, head), decay = exp(g < kNoDecay ? kNoDecay : g);
    Token const token{q,      k, v, o, decay, p.delta ? decay : 0.f, write_strength(p, span.row, t, head),
                      p.scale};
    update_rows_k(state, n, p.key_dim, n, token);
    store_values(o, n, token_row<T>(p.o, span.row, t, head) + slice.begin);
  }
  for (int i = 0; i < p.key_dim; ++i) {
    for (int j = 0; j < n; ++j) s.at(i, j) = state[i * n + j];
  }
}

inline int64_t token_scratch(ForwardParams const& p, int value_dim) {
  return 2 * (kMaxKeyDim + kMaxValueDim) + static_cast<int64_t>(p.key_dim) * value_dim;
}

template <class T>
void forward_item(ForwardParams const& p, int64_t sequence, int head, ValueSlice slice, float* workspace) {
  Arena arena{workspace};
  Span const span = sequence_span(p, sequence);
  int64_t const states = (sequence * p.value_heads + head) * p.key_dim * p.value_dim;
#if defined(__AMX_BF16__)
  if (sizeof(T) == sizeof(Bf16) && !p.recurrent && span.length() >= kMinAmxTokens) {
    AmxBuffers b(arena, geometry(p, slice));
    load_state(p, p.initial_state == nullptr ? nullptr : p.initial_state + states, slice, b.s);
    forward_amx(p, span, head, slice, b);
    if (p.final_state != nullptr) store_state(p, b.s, slice, p.final_state + states);
    return;
  }
#endif
  ForwardBuffers b(arena, geometry(p, slice));
  load_state(p, p.initial_state == nullptr ? nullptr : p.initial_state + states, slice, b.s);
  if (p.recurrent) {
    forward_tokens<T>(p, span, head, slice, b.s, arena.floats(token_scratch(p, slice.end - slice.begin)));
  } else {
    forward_chunks<T>(p, span, head, slice, b);
  }
  if (p.final_state != nullptr) store_state(p, b.s, slice, p.final_state + states);
}

void forward(ForwardParams const& p, int64_t sequence, int head, ValueSlice slice, float* workspace) {
  if (p.dtype == Dtype::kBFloat16) return forward_item<Bf16>(p, sequence, head, slice, workspace);
  forward_item<float>(p, sequence, head, slice, workspace);
}

int64_t forward_workspace(ForwardParams const& p, int slices) {
  Arena arena{nullptr};
  int const width = (p.value_dim + slices - 1) / slices;
  ForwardBuffers const b(arena, geometry(p, {0, round_up(width, kPanel)}));
  arena.floats(token_scratch(p, round_up(width, kPanel)));
#if defined(__AMX_BF16__)
  Arena amx{nullptr};
  AmxBuffers const buffers(amx, geometry(p, {0, round_up(width, kPanel)}));
  if (amx.used > arena.used) return amx.used;
#endif
  return arena.used;
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
