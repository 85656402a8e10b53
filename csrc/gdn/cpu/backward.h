// Backward of one sequence and query/key head, exact and without a division by a gate. With S, S' the states
// before and after a chunk, R = U / beta, and dS' the gradient that arrives from later chunks:
//   dU = P^T dO + delta o (K dS')           Z = T^T dU        dY = beta o Z = dV        dbeta = <Z, R>
//   dP = scale E o (dO U^T)                 dM = -strict_lower(E) o (dY U^T)
//   dQ = scale gamma o (dO S^T) + dP K
//   dK = -gamma o (dY S^T) + delta o (U dS'^T) + dP^T Q + (dM + dM^T) K
//   dS = e^{G_last} dS' + (scale gamma o Q)^T dO - (gamma o K)^T dY
//   dg_i = sum_{j >= i} (q . dQ_1 + k . dK_1 + rowsum(F) - colsum(F))_j + sum_{j < i} (k . dK_2)_j +
//   e^{G_last} <S, dS'>,
//     F = strict_lower(P o dO U^T + dM o K K^T), and dQ_1, dK_1, dK_2 the terms of dQ and dK that read a
//     state. Every term carries its decay, so nothing large cancels when the gates are strong.
// Without the delta rule Z = dU and R = V, and all terms with dM or -gamma o dY are gone.
// A first pass runs forward over the chunks and keeps S^T, R and the inverse of each.
#pragma once

#include "gdn/cpu/chunk.h"

namespace lt2::gdn::LT2_ISA {
namespace {

// What the first pass keeps of a chunk.
struct Kept {
  Panels s_t;      // [V, K]
  Panels r;        // [C, V]
  Panels inverse;  // [C, C]

  Kept(Arena& arena, Geometry const& g)
      : s_t(arena.panels(g.value_padded, g.key_padded)),
        r(arena.panels(kBackwardChunk, g.value_padded)),
        inverse(arena.panels(kBackwardChunk, kBackwardChunk)) {}
};

struct BackwardBuffers {
  Chunk chunk;
  Panels s, y, u;                     // first pass: S, bracket, U; second: dS, dU, Z then dY
  Panels d_o, u_t, ds_t;              // [C, V], [V, C], [V, K]
  Panels ou, yu;                      // [C, C] dO U^T then dP, dY U^T then dM
  Panels dq, dk, dk2;                 // [C, K]
  float *dG, *carried, *dot, *dbeta;  // [C]; carried is k . dK_2
  float state_dot;                    // e^{G_last} <S, dS'>

  BackwardBuffers(Arena& arena, Geometry const& g)
      : chunk(arena, g.key_padded, kBackwardChunk),
        s(arena.panels(g.key_padded, g.value_padded)),
        y(arena.panels(kBackwardChunk, g.value_padded)),
        u(arena.panels(kBackwardChunk, g.value_padded)),
        d_o(arena.panels(kBackwardChunk, g.value_padded)),
        u_t(arena.panels(g.value_padded, kBackwardChunk)),
        ds_t(arena.panels(g.value_padded, g.key_padded)),
        ou(arena.panels(kBackwardChunk, kBackwardChunk)),
        yu(arena.panels(kBackwardChunk, kBackwardChunk)),
        dq(arena.panels(kBackwardChunk, g.key_padded)),
        dk(arena.panels(kBackwardChunk, g.key_padded)),
        dk2(arena.panels(kBackwardChunk, g.key_padded)),
        dG(arena.floats(kBackwardChunk)),
        carried(arena.floats(kBackwardChunk)),
        dot(arena.floats(kBackwardChunk)),
        dbeta(arena.floats(kBackwardChunk)) {}
};

// R = U / beta; where beta is (nearly) zero R_i = beta-free residual y_i - sum_{j < i} E_ij (k_i . k_j) u_j.
// y holds beta o (V - gamma o K S), so such rows recompute their bracket.
template <class T>
void keep_residuals(Inputs const& p, int64_t row, int head, Chunk const& c, Panels const& s, Panels const& u,
                    Panels const& r) {
  for (int i = 0; i < c.rows; ++i) {
    if ((__builtin_fabsf(c.beta[i]) >= kTinyBeta && p.delta) || i >= c.tokens) {
      float const factor = i < c.tokens ? 1.f / c.beta[i] : 0.f;
      for (int panel = 0; panel < u.panels(); ++panel) {
        for (int j = 0; j < kPanel; j += kLanes)
          store(r.row(i, panel) + j, load(u.row(i, panel) + j) * factor);
      }
      continue;
    }
    load_row(token_row<T const>(p.v, row, c.begin + i, head), p.value_dim, r, i);
    if (!p.delta) continue;
    for (int panel = 0; panel < u.panels(); ++panel) {
      for (int j = 0; j < kPanel; j += kLanes) {
        Vec acc = load(r.row(i, panel) + j);
        for (int k = 0; k < s.rows; ++k) acc -= load(s.row(k, panel) + j) * (c.gamma[i] * c.k.at(i, k));
        for (int m = 0; m < i; ++m) acc -= load(u.row(m, panel) + j) * (c.decay.at(i, m) * c.kk.at(i, m));
        store(r.row(i, panel) + j, acc);
      }
    }
  }
}

template <class T>
void first_pass(BackwardParams const& p, Span span, int head, BackwardBuffers& b, Arena kept_arena,
                Geometry const& g) {
  Chunk& c = b.chunk;
  c.direction = 1;
  for (int64_t t = span.begin; t < span.end; t += kBackwardChunk) {
    int const tokens = static_cast<int>(span.end - t < kBackwardChunk ? span.end - t : kBackwardChunk);
    Kept const kept(kept_arena, g);
    c.inverse = kept.inverse;
    prepare_chunk<T>(p, span.row, head, t, tokens, false, false, c);
    transpose(b.s, kept.s_t, b.s.rows);
    compute_writes<T>(p, span.row, head, c, b.s, 0, p.value_dim, b.y, b.u);
    keep_residuals<T>(p, span.row, head, c, b.s, b.u, kept.r);
    scale_rows(b.u, c.delta, c.rows);
    multiply<true>(c.k, b.u, b.s, b.s.rows, c.rows, c.last_decay);
  }
}

// dP and dM over ou and yu; adds rowsum(F) - colsum(F) to dG.
inline void score_gradients(float scale, bool delta, BackwardBuffers& b) {
  Chunk const& c = b.chunk;
  Vec lane{};
  for (int j = 0; j < kLanes; ++j) lane[j] = static_cast<float>(j);
  for (int i = 0; i < c.rows; ++i) {
    Vec row_sum{};
    for (int column = 0; column < kBackwardChunk; column += kLanes) {
      int const panel = column / kPanel, j = column % kPanel;
      float *const ou = b.ou.row(i, panel) + j, *const yu = b.yu.row(i, panel) + j;
      if (column > i) {
        store(ou, Vec{});
        store(yu, Vec{});
        continue;
      }
      Vec const distance = splat(static_cast<float>(i - column)) - lane, zero{};
      Vec const e = load(c.decay.row(i, panel) + j);
      Vec dm{}, f = distance > zero ? load(c.attention.row(i, panel) + j) * load(ou) : zero;
      if (delta) {
        dm = distance > zero ? -e * load(yu) : zero;
        f += distance > zero ? dm * load(c.kk.row(i, panel) + j) : zero;
      }
      row_sum += f;
      store(b.dG + column, load(b.dG + column) - f);
      store(ou, distance >= zero ? scale * e * load(ou) : zero);
      store(yu, dm);
    }
    b.dG[i] += sum(row_sum);
  }
}

// dbeta and dg of the chunk's tokens, through their activations; returns dA_log and ddt_bias in sums.
inline void gate_gradients(BackwardParams const& p, Span span, int head, BackwardBuffers const& b,
                           float* sums) {
  Chunk const& c = b.chunk;
  float earlier = 0.f;
  for (int i = 0; i < c.tokens; ++i) {
    float const term = b.carried[i];
    b.carried[i] = earlier;
    earlier += term;
  }
  double later = b.state_dot;
  for (int i = c.tokens - 1; i >= 0; --i) {
    int64_t const t = c.begin + i;
    if (p.dbeta.data != nullptr) {
      float d = b.dbeta[i];
      if (p.beta_sigmoid) {
        float const s = sigmoid(scalar(p.beta, span.row, t, head));
        d *= (p.neg_eigval ? 2.f : 1.f) * s * (1.f - s);
      }
      *token_row<float>(p.dbeta, span.row, t, head) = d;
    }
    later += b.dG[i];
    if (p.dg.data == nullptr) continue;
    float const decay = log_decay(p, span.row, t, head);
    float d = decay <= kNoDecay ? 0.f : static_cast<float>(later + b.carried[i]);
    if (p.A_log != nullptr) {
      sums[0] += d * decay;
      float const raw = scalar(p.g, span.row, t, head) + p.dt_bias[head];
      d *= -__builtin_expf(p.A_log[head]) * (raw > 20.f ? 1.f : sigmoid(raw));
      sums[1] += d;
    }
    *token_row<float>(p.dg, span.row, t, head) = d;
  }
}

// Chunk `index` of the second pass; leaves dQ and dK of this value head, before the l2norm's backward, in b.
template <class T>
void chunk_backward(BackwardParams const& p, Span span, int head, Kept const& kept, BackwardBuffers& b) {
  Chunk const& c = b.chunk;
  Panels const &ds = b.s, &z = p.delta ? b.u : b.y, &dy = z, &u = kept.r;
  int const qk_head = head / (p.value_heads / p.heads);
  load_rows<T>(p.dout, span.row, head, c, 0, p.value_dim, b.d_o);
  expect_rows<T>(p.dv, span.row, head, c, c.begin, 0, p.value_dim);
  expect_rows<T>(p.dq, span.row, qk_head, c, c.begin, 0, p.key_dim);
  expect_rows<T>(p.dk, span.row, qk_head, c, c.begin, 0, p.key_dim);
  multiply<false>(c.k, ds, b.y, c.rows, ds.rows, 0.f);
  scale_rows(b.y, c.delta, c.rows);
  multiply<true, Triangle::kUpperA>(c.attention, b.d_o, b.y, c.rows, c.rows, 1.f);
  if (p.delta) multiply<true, Triangle::kUpperA>(c.transfer, b.y, z, c.rows, c.rows, 0.f);
  row_dots(z, kept.r, b.dbeta, c.rows);
  scale_rows(z, c.beta, c.rows);
  scale_rows(kept.r, c.beta, c.rows);
  store_rows<T>(dy, p.dv, span.row, head, c, 0, p.value_dim);

  transpose(u, b.u_t, c.rows);
  multiply<false, Triangle::kLowerOut>(b.d_o, b.u_t, b.ou, c.rows, b.u_t.rows, 0.f);
  if (p.delta) multiply<false, Triangle::kLowerOut>(dy, b.u_t, b.yu, c.rows, b.u_t.rows, 0.f);
  __builtin_memset(b.dG, 0, kBackwardChunk * sizeof(float));
  score_gradients(p.scale, p.delta, b);

  for (int i = 0; i < c.rows; ++i) b.dot[i] = p.scale * c.gamma[i];
  scale_rows(b.d_o, b.dot, c.rows);
  multiply<false>(b.d_o, kept.s_t, b.dq, c.rows, kept.s_t.rows, 0.f);
  row_dots(b.dq, c.q, b.dot, c.rows);
  for (int i = 0; i < c.tokens; ++i) b.dG[i] += b.dot[i];
  if (p.delta) {
    for (int i = 0; i < c.rows; ++i) b.dot[i] = -c.gamma[i];
    scale_rows(dy, b.dot, c.rows);
    multiply<false>(dy, kept.s_t, b.dk, c.rows, kept.s_t.rows, 0.f);
    row_dots(b.dk, c.k, b.dot, c.rows);
    for (int i = 0; i < c.tokens; ++i) b.dG[i] += b.dot[i];
  } else {
    __builtin_memset(b.dk.data, 0, b.dk.size() * sizeof(float));
  }
  transpose(ds, b.ds_t, ds.rows);
  scale_rows(u, c.delta, c.rows);
  multiply<false>(u, b.ds_t, b.dk2, c.rows, b.ds_t.rows, 0.f);

  row_dots(b.dk2, c.k, b.carried, c.rows);
  b.state_dot = c.last_decay * dot(kept.s_t.data, b.ds_t.data, b.ds_t.size());

  multiply<false, Triangle::kLowerA>(b.ou, c.k, b.dq, c.rows, c.rows, 1.f);
  add_rows(b.dk, b.dk2, c.rows);
  multiply<true, Triangle::kUpperA>(b.ou, c.q, b.dk, c.rows, c.rows, 1.f);
  multiply<true>(c.q, b.d_o, ds, ds.rows, c.rows, c.last_decay);
  if (!p.delta) return;
  multiply<false, Triangle::kLowerA>(b.yu, c.k, b.dk, c.rows, c.rows, 1.f);
  multiply<true, Triangle::kUpperA>(b.yu, c.k, b.dk, c.rows, c.rows, 1.f);
  multiply<true>(c.k, dy, ds, ds.rows, c.rows, 1.f);
}

// All chunks of one value head in reverse. dq and dk of a group's value heads add up in group_dq and group_dk
// ([tokens, K], only used for groups); the last head of the group writes them out.
template <class T>
void second_pass(BackwardParams const& p, Span span, int head, float* sums, BackwardBuffers& b,
                 Arena kept_arena, Geometry const& g, float* group_dq, float* group_dk) {
  Chunk& c = b.chunk;
  c.direction = -1;
  int const group = p.value_heads / p.heads, qk_head = head / group;
  int64_t const kept_base = kept_arena.used;
  Arena counter{nullptr};
  Kept const counted(counter, g);
  for (int64_t index = (span.length() + kBackwardChunk - 1) / kBackwardChunk - 1; index >= 0; --index) {
    int64_t const t = span.begin + index * kBackwardChunk;
    int const tokens = static_cast<int>(span.end - t < kBackwardChunk ? span.end - t : kBackwardChunk);
    kept_arena.used = kept_base + index * counter.used;
    Kept const kept(kept_arena, g);
    c.inverse = kept.inverse;
    prepare_chunk<T>(p, span.row, head, t, tokens, true, true, c);
    chunk_backward<T>(p, span, head, kept, b);
    gate_gradients(p, span, head, b, sums);
    if (group > 1) {
      int64_t const offset = index * kBackwardChunk * g.key_padded;
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
  int64_t const group_size = group > 1 ? (span.length() + kBackwardChunk) * g.key_padded : 0;
  float *const group_dq = arena.floats(group_size), *const group_dk = arena.floats(group_size);
  for (int h = head * group; h < (head + 1) * group; ++h) {
    int64_t const index = sequence * p.value_heads + h, state = index * p.key_dim * p.value_dim;
    load_state(p, p.initial_state == nullptr ? nullptr : p.initial_state + state, {0, p.value_dim}, b.s);
    first_pass<T>(p, span, h, b, arena, g);
    load_state(p, p.dfinal_state == nullptr ? nullptr : p.dfinal_state + state, {0, p.value_dim}, b.s);
    float sums[2] = {};
    second_pass<T>(p, span, h, sums, b, arena, g, group_dq, group_dk);
    if (p.dA_log != nullptr) {
      p.dA_log[index] = sums[0];
      p.ddt_bias[index] = sums[1];
    }
    if (p.dinitial_state != nullptr) store_state(p, b.s, {0, p.value_dim}, p.dinitial_state + state);
  }
}

void backward(BackwardParams const& p, int64_t sequence, int head, float* workspace) {
  if (p.dtype == Dtype::kBFloat16) return backward_item<Bf16>(p, sequence, head, workspace);
  backward_item<float>(p, sequence, head, workspace);
}

int64_t backward_workspace(BackwardParams const& p, int64_t longest) {
  Arena arena{nullptr};
  Geometry const g = geometry(p, {0, p.value_dim});
  BackwardBuffers const b(arena, g);
  if (p.value_heads > p.heads) {
    arena.floats((longest + kBackwardChunk) * g.key_padded);
    arena.floats((longest + kBackwardChunk) * g.key_padded);
  }
  Arena chunk{nullptr};
  Kept const kept(chunk, g);
  return arena.used + (longest + kBackwardChunk - 1) / kBackwardChunk * chunk.used;
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
