// Backward of one sequence and query/key head, exact and without a division by a gate. With S, S' the states
// before and after a chunk, M = I + diag(beta) A, and dS' the gradient that arrives from later chunks:
//   dU = P^T dO + (tail o K) dS'           Z = M^{-T} dU        dY = beta o Z = dV     dbeta = <Z, R>
//   with R = V - (head o K) S - A U, so that U = beta o R; without delta Z = dU and R = V
//   dP = lower(dO U^T)                     dA = -strict_lower(dY U^T)
//   dQ_1 = scale head o (dO S^T)   dK_1 = -head o (dY S^T)   dK_2 = tail o (U dS'^T)
//   dQ_P = scale sum_j dP_ij D_ij o k_j    dK_A = sum_j dA_ij D_ij o k_j           of row i
//   dK_P = sum_i D_ij o (dP_ij scale q_i + dA_ij k_i)                              of row j
//   dS = last o dS' + (scale head o Q)^T dO - (head o K)^T dY
//   dg_i = sum_{j >= i} (q dQ_1 + k dK_1 + q dQ_P + k dK_A - k dK_P)_j + sum_{j < i} (k dK_2)_j +
//   last <S, dS'>, each a vector over key channels, dQ_P and dK_P here without j = i. Every term carries its
//   decay.
// A first pass runs forward over the chunks and keeps S^T, R and the inverse of each.
#pragma once

#include "kda/cpu/chunk.h"

namespace lt2::kda::LT2_ISA {
namespace {

// What the first pass keeps of a chunk.
struct Kept {
  Panels s_t;      // [V, K]
  Panels r;        // [C, V]
  Panels inverse;  // [C, C]

  Kept(Arena& arena, Geometry const& g)
      : s_t(arena.panels(g.value_padded, g.key_padded)),
        r(arena.panels(kChunk, g.value_padded)),
        inverse(arena.panels(kChunk, kChunk)) {}
};

struct BackwardBuffers {
  Chunk chunk;
  Panels s, y, u;                       // first pass: S, bracket, U; second: dS, dU, Z then dY then -dY
  Panels d_o, u_t, ds_t;                // [C, V], [V, C], [V, K]
  Panels ou, yu;                        // [C, C] dP, dA
  Panels dq, dk, carried, dG;           // [C, K]; carried is dK_2, then k dK_2
  Panels dq_block, dk_block, dk_first;  // [16, K]
  float* state_dot;                     // [K] last <S, dS'>
  float *dbeta, *dot;                   // [C]
  float* ddt_bias;                      // [K]
  float dA_log;

  BackwardBuffers(Arena& arena, Geometry const& g)
      : chunk(arena, g.key_padded),
        s(arena.panels(g.key_padded, g.value_padded)),
        y(arena.panels(kChunk, g.value_padded)),
        u(arena.panels(kChunk, g.value_padded)),
        d_o(arena.panels(kChunk, g.value_padded)),
        u_t(arena.panels(g.value_padded, kChunk)),
        ds_t(arena.panels(g.value_padded, g.key_padded)),
        ou(arena.panels(kChunk, kChunk)),
        yu(arena.panels(kChunk, kChunk)),
        dq(arena.panels(kChunk, g.key_padded)),
        dk(arena.panels(kChunk, g.key_padded)),
        carried(arena.panels(kChunk, g.key_padded)),
        dG(arena.panels(kChunk, g.key_padded)),
        dq_block(arena.panels(kBlock, g.key_padded)),
        dk_block(arena.panels(kBlock, g.key_padded)),
        dk_first(arena.panels(kBlock, g.key_padded)),
        state_dot(arena.floats(g.key_padded)),
        dbeta(arena.floats(kChunk)),
        dot(arena.floats(kChunk)),
        ddt_bias(arena.floats(g.key_padded)) {}
};

template <class T>
void first_pass(BackwardParams const& p, Span span, int head, BackwardBuffers& b, Arena kept_arena,
                Geometry const& g) {
  Chunk& c = b.chunk;
  c.direction = 1;
  for (int64_t t = span.begin; t < span.end; t += kChunk) {
    int const tokens = static_cast<int>(span.end - t < kChunk ? span.end - t : kChunk);
    Kept const kept(kept_arena, g);
    c.inverse = kept.inverse;
    prepare_chunk<T>(p, span.row, head, t, tokens, false, false, c);
    transpose(b.s, kept.s_t, b.s.rows);
    load_rows<T>(p.v, span.row, head, c, 0, p.value_dim, kept.r);
    if (p.delta) {
      multiply<false>(c.k_head, b.s, b.y, c.rows, b.s.rows, 0.f);
      subtract_rows(kept.r, b.y, c.rows);
      __builtin_memcpy(b.y.data, kept.r.data, b.y.size() * sizeof(float));
      scale_by_beta(c, b.y);
      multiply<false, Triangle::kLowerA>(c.inverse, b.y, b.u, c.rows, c.rows, 0.f);
      multiply<false, Triangle::kLowerA>(c.scores, b.u, b.y, c.rows, c.rows, 0.f);
      subtract_rows(kept.r, b.y, c.rows);
    } else {
      __builtin_memcpy(b.u.data, kept.r.data, b.u.size() * sizeof(float));
      scale_by_beta(c, b.u);
    }
    update_state(c, b.u, b.s);
  }
}

// Zeros above the diagonal, and on it if `strict`.
inline void clear_upper(Panels const& x, int rows, bool strict) {
  for (int i = 0; i < rows; ++i) {
    for (int j = strict ? i : i + 1; j < kChunk; ++j) x.at(i, j) = 0.f;
  }
}

// dQ_P, dK_A and dK_P within the block that begins at row `first`, without the diagonal of P, by Horner's
// rule: the sum over j of D_ij x_j is (((x_0) a_1 + x_1) a_2 + ..) a_i. Added to dq, dk and dG.
inline void block_gradients(BackwardParams const& p, BackwardBuffers& b, int first) {
  Chunk const& c = b.chunk;
  for_channels(c.k, [&](int panel, int j, int) __attribute__((always_inline)) {
    Vec decay[kBlock], k[kBlock], q[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      decay[i] = load(c.decay.row(first + i, panel) + j);
      k[i] = load(c.k.row(first + i, panel) + j);
      q[i] = load(c.q.row(first + i, panel) + j) * p.scale;
    }
    for (int i = 0; i < kBlock; ++i) {
      Vec by_p{}, by_a{}, from{};
      float const *const ou = &b.ou.at(first + i, first), *const yu = &b.yu.at(first + i, first);
      for (int m = 0; m < i; ++m) {
        by_p = (by_p + ou[m] * k[m]) * decay[m + 1];
        if (p.delta) by_a = (by_a + yu[m] * k[m]) * decay[m + 1];
      }
      for (int m = kBlock - 1; m > i; --m) {
        from += b.ou.at(first + m, first + i) * q[m];
        if (p.delta) from += b.yu.at(first + m, first + i) * k[m];
        from *= decay[m];
      }
      by_p *= p.scale;
      float *const dq = b.dq.row(first + i, panel) + j, *const dk = b.dk.row(first + i, panel) + j,
                   *const dG = b.dG.row(first + i, panel) + j;
      store(dG, load(dG) + load(c.q.row(first + i, panel) + j) * by_p + k[i] * (by_a - from));
      float const self = ou[i];  // P's diagonal has no decay
      store(dq, load(dq) + by_p + (p.scale * self) * k[i]);
      store(dk, load(dk) + by_a + from + self * q[i]);
    }
  });
}

// The same between the blocks.
inline void border_gradients(BackwardParams const& p, BackwardBuffers& b) {
  Chunk const& c = b.chunk;
  multiply<false>(second(b.ou), c.far_k, b.dq_block, kBlock, kBlock, 0.f);
  multiply<true>(second(b.ou), c.near_q, b.dk_first, kBlock, kBlock, 0.f);
  if (p.delta) {
    multiply<false>(second(b.yu), c.far_k, b.dk_block, kBlock, kBlock, 0.f);
    multiply<true>(second(b.yu), c.near_k, b.dk_first, kBlock, kBlock, 1.f);
  }
  for (int panel = 0; panel < c.k.panels(); ++panel) {
    for (int i = 0; i < kBlock; ++i) {
      for (int j = 0; j < kPanel; j += kLanes) {
        auto const add = [&](Panels const& x, int row, Vec v) {
          float* const at = x.row(row, panel) + j;
          store(at, load(at) + v);
        };
        Vec const near = load(c.near.row(i, panel) + j);
        Vec const dq = p.scale * near * load(b.dq_block.row(i, panel) + j);
        Vec const dk = p.delta ? near * load(b.dk_block.row(i, panel) + j) : Vec{};
        Vec const from = load(c.far.row(i, panel) + j) * load(b.dk_first.row(i, panel) + j);
        add(b.dq, kBlock + i, dq);
        add(b.dk, kBlock + i, dk);
        add(b.dG, kBlock + i,
            load(c.q.row(kBlock + i, panel) + j) * dq + load(c.k.row(kBlock + i, panel) + j) * dk);
        add(b.dk, i, from);
        add(b.dG, i, -(load(c.k.row(i, panel) + j) * from));
      }
    }
  }
}

// dbeta and dg of the chunk's tokens, through their activations; adds to dA_log and ddt_bias.
inline void gate_gradients(BackwardParams const& p, Span span, int head, BackwardBuffers& b) {
  Chunk const& c = b.chunk;
  for (int i = 0; i < c.tokens && p.dbeta.data != nullptr; ++i) {
    float d = b.dbeta[i];
    if (p.beta_sigmoid) {
      float const s = sigmoid(*token_row<float const>(p.beta, span.row, c.begin + i, head));
      d *= (p.neg_eigval ? 2.f : 1.f) * s * (1.f - s);
    }
    *token_row<float>(p.dbeta, span.row, c.begin + i, head) = d;
  }
  Gate const gate(p, head);
  Panels const& logs = b.carried;
  Vec dA_log{};
  for_channels(c.k, [&](int panel, int j, int channel) __attribute__((always_inline)) {
    Vec earlier{}, total[kChunk];
    for (int i = 0; i < c.tokens; ++i) {
      total[i] = earlier;
      earlier += load(b.carried.row(i, panel) + j);
    }
    Vec later = load(b.state_dot + channel);
    for (int i = c.tokens - 1; i >= 0; --i) {
      later += load(b.dG.row(i, panel) + j);
      total[i] += later;
    }
    for (int i = 0; i < c.tokens; ++i) store(b.dG.row(i, panel) + j, total[i]);
  });
  load_rows<float>(p.g, span.row, head, c, 0, p.key_dim, logs);
  for_channels(c.k, [&](int panel, int j, int channel) __attribute__((always_inline)) {
    Vec ddt_bias{};
    for (int i = 0; i < c.tokens; ++i) {
      Vec const g = load(logs.row(i, panel) + j), log_decay = gate.log_decay(g, channel);
      Vec d = log_decay <= splat(kNoDecay) ? Vec{} : load(b.dG.row(i, panel) + j);
      if (gate.raw()) {
        Vec const raw = gate.shifted(g, channel);
        dA_log += d * log_decay;
        d *= gate.rate * (raw > splat(20.f) ? splat(1.f) : sigmoid(raw));
        ddt_bias += d;
      }
      store(b.dG.row(i, panel) + j, d);
    }
    store(b.ddt_bias + channel, load(b.ddt_bias + channel) + ddt_bias);
  });
  b.dA_log += sum(dA_log);
  store_rows<float>(b.dG, p.dg, span.row, head, c, 0, p.key_dim);
}

// A chunk of the second pass; leaves dQ and dK of this value head, before the l2norm's backward, in b.
template <class T>
void chunk_backward(BackwardParams const& p, Span span, int head, Kept const& kept, BackwardBuffers& b) {
  Chunk const& c = b.chunk;
  Panels const &ds = b.s, &z = p.delta ? b.u : b.y, &u = kept.r;
  int const qk_head = head / (p.value_heads / p.heads);
  load_rows<T>(p.dout, span.row, head, c, 0, p.value_dim, b.d_o);
  expect_rows<T>(p.dv, span.row, head, c, c.begin, 0, p.value_dim);
  expect_rows<T>(p.dq, span.row, qk_head, c, c.begin, 0, p.key_dim);
  expect_rows<T>(p.dk, span.row, qk_head, c, c.begin, 0, p.key_dim);
  expect_rows<float>(p.dg, span.row, head, c, c.begin, 0, p.key_dim);
  multiply<false>(c.k_tail, ds, b.y, c.rows, ds.rows, 0.f);
  multiply<true, Triangle::kUpperA>(c.attention, b.d_o, b.y, c.rows, c.rows, 1.f);
  if (p.delta) multiply<true, Triangle::kUpperA>(c.inverse, b.y, z, c.rows, c.rows, 0.f);
  row_dots(z, kept.r, b.dbeta, c.rows);
  scale_by_beta(c, z);
  scale_by_beta(c, u);
  store_rows<T>(z, p.dv, span.row, head, c, 0, p.value_dim);

  transpose(u, b.u_t, c.rows);
  transpose(ds, b.ds_t, ds.rows);
  multiply<false, Triangle::kLowerOut>(b.d_o, b.u_t, b.ou, c.rows, b.u_t.rows, 0.f);
  clear_upper(b.ou, c.rows, false);
  multiply<false>(b.d_o, kept.s_t, b.dq, c.rows, kept.s_t.rows, 0.f);
  hadamard(b.dq, c.head, p.scale, b.dq, c.rows);
  multiply<false>(u, b.ds_t, b.carried, c.rows, b.ds_t.rows, 0.f);
  hadamard(b.carried, c.tail, 1.f, b.carried, c.rows);
  hadamard(b.dq, c.q, 1.f, b.dG, c.rows);
  if (p.delta) {
    for (int i = 0; i < c.rows; ++i) b.dot[i] = -1.f;
    scale_rows(z, b.dot, c.rows);
    multiply<false, Triangle::kLowerOut>(z, b.u_t, b.yu, c.rows, b.u_t.rows, 0.f);
    clear_upper(b.yu, c.rows, true);
    multiply<false>(z, kept.s_t, b.dk, c.rows, kept.s_t.rows, 0.f);
  }
  for_channels(c.k, [&](int panel, int j, int channel) __attribute__((always_inline)) {
    for (int i = 0; i < c.rows; ++i) {
      float *const dk = b.dk.row(i, panel) + j, *const carried = b.carried.row(i, panel) + j,
                   *const dG = b.dG.row(i, panel) + j;
      Vec const k = load(c.k.row(i, panel) + j), by_tail = load(carried);
      Vec const by_head = p.delta ? load(dk) * load(c.head.row(i, panel) + j) : Vec{};
      store(dG, load(dG) + k * by_head);
      store(dk, by_head + by_tail);
      store(carried, k * by_tail);
    }
    Vec products{};
    for (int v = 0; v < kept.s_t.rows; ++v) {
      products += load(kept.s_t.row(v, panel) + j) * load(b.ds_t.row(v, panel) + j);
    }
    store(b.state_dot + channel, products * load(c.last + channel));
  });
  if (c.rows > kBlock) border_gradients(p, b);
  for (int first = 0; first < c.rows; first += kBlock) block_gradients(p, b, first);

  scale_rows(ds, c.last, ds.rows);
  multiply<true>(c.q_head, b.d_o, ds, ds.rows, c.rows, 1.f);
  if (p.delta) multiply<true>(c.k_head, z, ds, ds.rows, c.rows, 1.f);
}

// All chunks of one value head in reverse. dq and dk of a group's value heads add up in group_dq and group_dk
// ([tokens, K], only used for groups); the last head of the group writes them out.
template <class T>
void second_pass(BackwardParams const& p, Span span, int head, BackwardBuffers& b, Arena kept_arena,
                 Geometry const& g, float* group_dq, float* group_dk) {
  Chunk& c = b.chunk;
  c.direction = -1;
  int const group = p.value_heads / p.heads, qk_head = head / group;
  int64_t const kept_base = kept_arena.used;
  Arena counter{nullptr};
  Kept const counted(counter, g);
  for (int64_t index = (span.length() + kChunk - 1) / kChunk - 1; index >= 0; --index) {
    int64_t const t = span.begin + index * kChunk;
    int const tokens = static_cast<int>(span.end - t < kChunk ? span.end - t : kChunk);
    kept_arena.used = kept_base + index * counter.used;
    Kept const kept(kept_arena, g);
    c.inverse = kept.inverse;
    prepare_chunk<T>(p, span.row, head, t, tokens, true, true, c);
    chunk_backward<T>(p, span, head, kept, b);
    gate_gradients(p, span, head, b);
    if (group > 1) {
      int64_t const offset = index * kChunk * g.key_padded;
      accumulate(b.dq, group_dq + offset, c.rows, head % group == 0);
      accumulate(b.dk, group_dk + offset, c.rows, head % group == 0);
      if (head % group != group - 1) continue;
    }
    if (p.qk_l2norm) {
      normalise_backward(b.dq, c.q, c.q_norm, b.dot, c.rows);
      normalise_backward(b.dk, c.k, c.k_norm, b.dot, c.rows);
    }
    store_rows<T>(b.dq, p.dq, span.row, qk_head, c, 0, p.key_dim);
    store_rows<T>(b.dk, p.dk, span.row, qk_head, c, 0, p.key_dim);
  }
}

template <class T>
void backward_item(BackwardParams const& p, int64_t sequence, int head, float* workspace) {
  Arena arena{workspace};
  Geometry const g = geometry(p, {0, p.value_dim});
  BackwardBuffers b(arena, g);
  Span const span = sequence_span(p, sequence);
  int const group = p.value_heads / p.heads;
  int64_t const group_size = group > 1 ? (span.length() + kChunk) * g.key_padded : 0;
  float *const group_dq = arena.floats(group_size), *const group_dk = arena.floats(group_size);
  for (int h = head * group; h < (head + 1) * group; ++h) {
    int64_t const index = sequence * p.value_heads + h, state = index * p.key_dim * p.value_dim;
    load_state(p, p.initial_state == nullptr ? nullptr : p.initial_state + state, {0, p.value_dim}, b.s);
    first_pass<T>(p, span, h, b, arena, g);
    load_state(p, p.dfinal_state == nullptr ? nullptr : p.dfinal_state + state, {0, p.value_dim}, b.s);
    b.dA_log = 0.f;
    __builtin_memset(b.ddt_bias, 0, g.key_padded * sizeof(float));
    second_pass<T>(p, span, h, b, arena, g, group_dq, group_dk);
    if (p.dA_log != nullptr) {
      p.dA_log[index] = b.dA_log;
      __builtin_memcpy(p.ddt_bias + index * p.key_dim, b.ddt_bias, p.key_dim * sizeof(float));
    }
    if (p.dinitial_state != nullptr) store_state(p, b.s, {0, p.value_dim}, p.dinitial_state + state);
  }
}

void backward(BackwardParams const& p, int64_t sequence, int head, float* workspace) {
  (p.dtype == Dtype::kBFloat16 ? backward_item<Bf16> : backward_item<float>)(p, sequence, head, workspace);
}

int64_t backward_workspace(BackwardParams const& p, int64_t longest) {
  Arena arena{nullptr};
  Geometry const g = geometry(p, {0, p.value_dim});
  BackwardBuffers const b(arena, g);
  if (p.value_heads > p.heads) {
    arena.floats((longest + kChunk) * g.key_padded);
    arena.floats((longest + kChunk) * g.key_padded);
  }
  Arena chunk{nullptr};
  Kept const kept(chunk, g);
  return arena.used + (longest + kChunk - 1) / kChunk * chunk.used;
}

}  // namespace
}  // namespace lt2::kda::LT2_ISA
