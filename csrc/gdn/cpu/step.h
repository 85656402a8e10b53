// One token on a state in memory: u = beta (v - erase k^T S); S <- decay S + k u^T; o = scale q^T S. The
// delta rule erases what the decay leaves (erase = decay), other rules nothing (0). Also the in-place decode
// op, which does this for a few tokens while a block of the state stays in L1.
#pragma once

#include "gdn/cpu/chunk.h"

namespace lt2::gdn::LT2_ISA {
namespace {

// q, k [K] and v, o [V] in fp32.
struct Token {
  float const *q, *k, *v;
  float* o;
  float decay, erase, beta, scale;
};

// Columns [0, kVecs * kLanes) of a state whose rows are keys, `stride` floats apart.
// q^T S' = decay q^T S + (q . k) u needs no pass over S'.
template <int kVecs>
inline void update_columns(float* s, int64_t stride, int key_dim, Token const& t, int column, float qk) {
  Vec ks[kVecs] = {}, qs[kVecs] = {}, u[kVecs];
  for (int i = 0; i < key_dim; ++i) {
    for (int l = 0; l < kVecs; ++l) {
      Vec const x = load(s + i * stride + l * kLanes);
      ks[l] += x * t.k[i];
      qs[l] += x * t.q[i];
    }
  }
  for (int l = 0; l < kVecs; ++l) {
    u[l] = (load(t.v + column + l * kLanes) - ks[l] * t.erase) * t.beta;
    store(t.o + column + l * kLanes, (qs[l] * t.decay + u[l] * qk) * t.scale);
  }
  for (int i = 0; i < key_dim; ++i) {
    for (int l = 0; l < kVecs; ++l) {
      float* const x = s + i * stride + l * kLanes;
      store(x, load(x) * t.decay + u[l] * t.k[i]);
    }
  }
}

inline void update_column(float* s, int64_t stride, int key_dim, Token const& t, int column, float qk) {
  float ks = 0.f, qs = 0.f;
  for (int i = 0; i < key_dim; ++i) {
    ks += s[i * stride] * t.k[i];
    qs += s[i * stride] * t.q[i];
  }
  float const u = (t.v[column] - ks * t.erase) * t.beta;
  t.o[column] = (qs * t.decay + u * qk) * t.scale;
  for (int i = 0; i < key_dim; ++i) s[i * stride] = s[i * stride] * t.decay + u * t.k[i];
}

// State [K, V], rows `stride` apart, tokens in order. Blocks of columns are independent.
inline void update_rows_k(float* s, int64_t stride, int key_dim, int value_dim, Token const* tokens,
                          int count) {
  constexpr int kVecs = 4;
  float qk[kMaxStepTokens];
  for (int t = 0; t < count; ++t) qk[t] = dot(tokens[t].q, tokens[t].k, key_dim);
  int column = 0;
  for (; column + kVecs * kLanes <= value_dim; column += kVecs * kLanes) {
    for (int t = 0; t < count; ++t)
      update_columns<kVecs>(s + column, stride, key_dim, tokens[t], column, qk[t]);
  }
  for (; column + kLanes <= value_dim; column += kLanes) {
    for (int t = 0; t < count; ++t) update_columns<1>(s + column, stride, key_dim, tokens[t], column, qk[t]);
  }
  for (; column < value_dim; ++column) {
    for (int t = 0; t < count; ++t) update_column(s + column, stride, key_dim, tokens[t], column, qk[t]);
  }
}
inline void update_rows_k(float* s, int64_t stride, int key_dim, int value_dim, Token const& token) {
  update_rows_k(s, stride, key_dim, value_dim, &token, 1);
}

// State [V, K]: every row is one value, updated for all tokens before the next.
inline void update_rows_v(float* s, int64_t stride, int key_dim, int value_dim, Token const* tokens,
                          int count) {
  float qk[kMaxStepTokens];
  for (int t = 0; t < count; ++t) qk[t] = dot(tokens[t].q, tokens[t].k, key_dim);
  for (int v = 0; v < value_dim; ++v) {
    float* const row = s + v * stride;
    for (int t = 0; t < count; ++t) {
      Token const& token = tokens[t];
      float const ks = dot(row, token.k, key_dim), qs = dot(row, token.q, key_dim);
      float const u = (token.v[v] - ks * token.erase) * token.beta;
      token.o[v] = (qs * token.decay + u * qk[t]) * token.scale;
      int i = 0;
      for (; i + kLanes <= key_dim; i += kLanes) {
        store(row + i, load(row + i) * token.decay + load(token.k + i) * u);
      }
      for (; i < key_dim; ++i) row[i] = row[i] * token.decay + token.k[i] * u;
    }
  }
}

// The same on a state of bf16: fp32 for all tokens, a few columns at a time, and rounded once.
inline void update_rounded(Bf16* s, bool v_first, int64_t stride, int key_dim, int value_dim,
                           Token const* tokens, int count) {
  constexpr int kColumns = 32;
  alignas(64) float block[kMaxKeyDim * kColumns];
  Token here[kMaxStepTokens];
  for (int first = 0; first < value_dim; first += kColumns) {
    int const columns = value_dim - first < kColumns ? value_dim - first : kColumns;
    int const rows = v_first ? columns : key_dim, width = v_first ? key_dim : columns;
    Bf16* const from = s + (v_first ? first * stride : first);
    for (int i = 0; i < rows; ++i) load_unit(from + i * stride, width, false, block + i * width);
    for (int t = 0; t < count; ++t) {
      here[t] = tokens[t];
      here[t].v += first;
      here[t].o += first;
    }
    if (v_first) {
      update_rows_v(block, width, key_dim, columns, here, count);
    } else {
      update_rows_k(block, width, key_dim, columns, here, count);
    }
    for (int i = 0; i < rows; ++i) store_values(block + i * width, width, from + i * stride);
  }
}

template <class T, class G>
void step_item(StepParams const& p, int64_t row, int head, ValueSlice slice) {
  int const qk_head = head / (p.value_heads / p.heads), n = slice.end - slice.begin;
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
  if (slot < 0 || slot >= p.slots) {
    for (int t = 0; t < p.tokens; ++t) {
      T* const out = token_row<T>(p.o, row, t, head) + slice.begin;
      for (int j = 0; j < n; ++j) store_one(out + j, 0.f);
    }
    return;
  }
  alignas(64) float q[kMaxStepTokens][kMaxKeyDim], k[kMaxStepTokens][kMaxKeyDim];
  alignas(64) float v[kMaxStepTokens][kMaxValueDim], o[kMaxStepTokens][kMaxValueDim];
  Token tokens[kMaxStepTokens];
  for (int t = 0; t < p.tokens; ++t) {
    load_unit(token_row<T const>(p.q, row, t, qk_head), p.key_dim, p.qk_l2norm, q[t]);
    load_unit(token_row<T const>(p.k, row, t, qk_head), p.key_dim, p.qk_l2norm, k[t]);
    load_unit(token_row<T const>(p.v, row, t, head) + slice.begin, n, false, v[t]);
    float g = p.a.data == nullptr ? 0.f : to_float(*token_row<G const>(p.a, row, t, head));
    if (p.A_log != nullptr) g = -__builtin_expf(p.A_log[head]) * softplus(g + p.dt_bias[head]);
    float b = p.b.data == nullptr ? 1.f : to_float(*token_row<G const>(p.b, row, t, head));
    if (p.beta_sigmoid) b = (p.neg_eigval ? 2.f : 1.f) * sigmoid(b);
    float const decay = exp(g < kNoDecay ? kNoDecay : g);
    tokens[t] = {q[t], k[t], v[t], o[t], decay, p.delta ? decay : 0.f, b, p.scale};
  }
  int64_t const at =
      slot * p.state_slot + head * p.state_head + slice.begin * (p.state_v_first ? p.state_row : int64_t{1});
  if (p.state_dtype == Dtype::kBFloat16) {
    update_rounded(static_cast<Bf16*>(p.state) + at, p.state_v_first, p.state_row, p.key_dim, n, tokens,
                   p.tokens);
  } else if (p.state_v_first) {
    update_rows_v(static_cast<float*>(p.state) + at, p.state_row, p.key_dim, n, tokens, p.tokens);
  } else {
    update_rows_k(static_cast<float*>(p.state) + at, p.state_row, p.key_dim, n, tokens, p.tokens);
  }
  for (int t = 0; t < p.tokens; ++t) {
    store_values(o[t], n, token_row<T>(p.o, row, t, head) + slice.begin);
  }
}

void step(StepParams const& p, int64_t row, int head, ValueSlice slice) {
  bool const bf16 = p.dtype == Dtype::kBFloat16, gate_bf16 = p.gate_dtype == Dtype::kBFloat16;
  auto* const item = bf16 ? (gate_bf16 ? step_item<Bf16, Bf16> : step_item<Bf16, float>)
                          : (gate_bf16 ? step_item<float, Bf16> : step_item<float, float>);
  item(p, row, head, slice);
}

}  // namespace
}  // namespace lt2::gdn::LT2_ISA
