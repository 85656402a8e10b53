// Forward by chunks (see chunk.h for the algebra) and token by token.
#pragma once

#include "gdn/cpu/chunk.h"
#include "gdn/cpu/step.h"
#if defined(__AMX_BF16__)
#include "gdn/cpu/amx.h"
#elif defined(__AVX512BF16__)
#include "gdn/cpu/pairs.h"
#endif

namespace lt2::gdn::LT2_ISA {
namespace {

struct ForwardBuffers {
  Chunk chunk;
  States states;
  Panels y, u;

  ForwardBuffers(Arena& arena, Geometry const& g, int heads)
      : chunk(arena, g.key_padded, kForwardChunk),
        states(arena, g, heads),
        y(arena.panels(kForwardChunk, g.value_padded)),
        u(arena.panels(kForwardChunk, g.value_padded)) {}
};

// One chunk after the other of all these heads: their rows are side by side in memory.
template <class T>
void forward_chunks(ForwardParams const& p, Span span, Heads heads, ValueSlice slice, ForwardBuffers& b) {
  Chunk& c = b.chunk;
  int const n = slice.end - slice.begin;
  alignas(64) float factor[kForwardChunk];
  c.ahead.spread = true;
  for (c.begin = span.begin; c.begin < span.end; c.begin += kForwardChunk) {
    int const tokens =
        static_cast<int>(span.end - c.begin < kForwardChunk ? span.end - c.begin : kForwardChunk);
    expect_next_chunk<T>(p, span, heads, slice, c);
    for (int head = heads.begin; head < heads.end; ++head) {
      Panels const s = b.states[head - heads.begin];
      prepare_chunk<T>(p, span.row, head, c.begin, tokens, true, false, c);
      compute_writes<T>(p, span.row, head, c, s, slice.begin, n, b.y, b.u);
      for (int i = 0; i < c.rows; ++i) factor[i] = p.scale * c.gamma[i];
      store_outputs<T>(c.q, s, factor, c.attention, b.u, p.o, span.row, head, c, slice.begin, n);
      scale_rows(b.u, c.delta, c.rows);
      multiply<true>(c.k, b.u, s, s.rows, c.rows, c.last_decay, c.ahead);
    }
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
void forward_item(ForwardParams const& p, int64_t sequence, Heads heads, ValueSlice slice, float* workspace) {
  Arena arena{workspace};
  Span const span = sequence_span(p, sequence);
#if defined(__AMX_BF16__)
  if (sizeof(T) == sizeof(Bf16) && !p.recurrent && span.length() >= kMinAmxTokens) {
    AmxBuffers b(arena, geometry(p, slice));
    int const head = heads.begin;  // the only one, see forward_heads
    load_initial_state(p, sequence, head, slice, b.s);
    forward_amx(p, span, head, slice, b);
    return store_final_state(p, sequence, head, slice, b.s);
  }
#endif
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if (takes_pairs(p)) return forward_pairs(p, sequence, heads, slice, arena);
#endif
  ForwardBuffers b(arena, geometry(p, slice), heads.end - heads.begin);
  for (int h = heads.begin; h < heads.end; ++h)
    load_initial_state(p, sequence, h, slice, b.states[h - heads.begin]);
  if (p.recurrent) {
    float* const scratch = arena.floats(token_scratch(p, slice.end - slice.begin));
    for (int h = heads.begin; h < heads.end; ++h)
      forward_tokens<T>(p, span, h, slice, b.states[h - heads.begin], scratch);
  } else {
    forward_chunks<T>(p, span, heads, slice, b);
  }
  for (int h = heads.begin; h < heads.end; ++h)
    store_final_state(p, sequence, h, slice, b.states[h - heads.begin]);
}

void forward(ForwardParams const& p, int64_t sequence, Heads heads, ValueSlice slice, float* workspace) {
  if (p.dtype == Dtype::kBFloat16) return forward_item<Bf16>(p, sequence, heads, slice, workspace);
  forward_item<float>(p, sequence, heads, slice, workspace);
}

int forward_heads(ForwardParams const& p) {
#if defined(__AMX_BF16__)
  if (p.dtype == Dtype::kBFloat16) return 1;  // with its parts a state is twice as large, and all are slower
#endif
  int const heads = p.recurrent ? 1 : heads_in_cache(p);
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if (takes_pairs(p)) return heads * 2 / 3;  // with what is rounded of it a state is half as large again
#endif
  return heads;
}

int64_t forward_workspace(ForwardParams const& p, int heads, int slices) {
  Arena arena{nullptr};
  int const width = round_up((p.value_dim + slices - 1) / slices, kPanel);
  ForwardBuffers const b(arena, geometry(p, {0, width}), heads);
  arena.floats(token_scratch(p, width));
#if defined(__AMX_BF16__)
  Arena amx{nullptr};
  AmxBuffers const buffers(amx, geometry(p, {0, width}));
  if (amx.used > arena.used) return amx.used;
#elif defined(__AVX512BF16__)
  Arena pairs{nullptr};
  PairBuffers const buffers(pairs, geometry(p, {0, width}), heads);
  if (pairs.used > arena.used) return pairs.used;
#endif
  return arena.used;
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
