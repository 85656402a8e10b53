// One token on a state in memory: S <- Diag(a) S; u = beta (v - k^T S) or beta v; S <- S + k u^T;
// o = scale q^T S. Also the in-place decode op, which does this for a few tokens while a block of the state
// stays in L1.
#pragma once

#include "kda/cpu/chunk.h"

namespace lt2::kda::LT2_ISA {
namespace {

// q, k [K] and v, o [V] in fp32. With the decay in q and k, both products take the old state:
// q^T S' = (a o q)^T S + (q . k) u.
struct Token {
  alignas(64) float k[kMaxKeyDim], decay[kMaxKeyDim], decayed_q[kMaxKeyDim], decayed_k[kMaxKeyDim];
  alignas(64) float v[kMaxValueDim], o[kMaxValueDim];
  float qk, beta, scale;
  bool delta;
};

template <class T>
void load_token(Inputs const& p, int64_t row, int64_t token, int head, ValueSlice slice, Token& t) {
  int const qk_head = head / (p.value_heads / p.heads), K = p.key_dim;
  alignas(64) float q[kMaxKeyDim];
  load_unit(token_row<T const>(p.q, row, token, qk_head), K, p.qk_l2norm, q);
  load_unit(token_row<T const>(p.k, row, token, qk_head), K, p.qk_l2norm, t.k);
  load_unit(token_row<T const>(p.v, row, token, head) + slice.begin, slice.end - slice.begin, false, t.v);
  t.qk = dot(q, t.k, K);
  t.beta = write_strength(p, row, token, head);
  t.scale = p.scale;
  t.delta = p.delta;
  Gate const gate(p, head);
  float const* const g = token_row<float const>(p.g, row, token, head);
  for (int c = K; c < round_up(K, kLanes); ++c) q[c] = t.k[c] = 0.f;
  for (int c = 0; c < K; c += kLanes) {
    Vec const decay = exp(gate.log_decay(load_channels(g, c, K), c));
    store(t.decay + c, decay);
    store(t.decayed_q + c, decay * load(q + c));
    store(t.decayed_k + c, decay * load(t.k + c));
  }
}

// Columns [0, kWidth * kLanes) of a state whose rows are keys, `stride` floats apart.
template <int kWidth>
inline void update_columns(float* s, int64_t stride, int key_dim, Token& t, int column) {
  Vec ks[kWidth] = {}, qs[kWidth] = {}, u[kWidth];
  for (int i = 0; i < key_dim; ++i) {
    for (int l = 0; l < kWidth; ++l) {
      Vec const x = load(s + i * stride + l * kLanes);
      ks[l] += x * t.decayed_k[i];
      qs[l] += x * t.decayed_q[i];
    }
  }
  for (int l = 0; l < kWidth; ++l) {
    Vec const v = load(t.v + column + l * kLanes);
    u[l] = (t.delta ? v - ks[l] : v) * t.beta;
    store(t.o + column + l * kLanes, (qs[l] + u[l] * t.qk) * t.scale);
  }
  for (int i = 0; i < key_dim; ++i) {
    for (int l = 0; l < kWidth; ++l) {
      float* const x = s + i * stride + l * kLanes;
      store(x, load(x) * t.decay[i] + u[l] * t.k[i]);
    }
  }
}

inline void update_column(float* s, int64_t stride, int key_dim, Token& t, int column) {
  float ks = 0.f, qs = 0.f;
  for (int i = 0; i < key_dim; ++i) {
    ks += s[i * stride] * t.decayed_k[i];
    qs += s[i * stride] * t.decayed_q[i];
  }
  float const u = (t.delta ? t.v[column] - ks : t.v[column]) * t.beta;
  t.o[column] = (qs + u * t.qk) * t.scale;
  for (int i = 0; i < key_dim; ++i) s[i * stride] = s[i * stride] * t.decay[i] + u * t.k[i];
}

// State [K, V], rows `stride` apart, its first column is `first` of the tokens' values; tokens in order.
// Blocks of columns are independent.
inline void update_rows_k(float* s, int64_t stride, int key_dim, int first, int value_dim, Token* tokens,
                          int count) {
  constexpr int kWidth = 4;
  int column = 0;
  for (; column + kWidth * kLanes <= value_dim; column += kWidth * kLanes) {
    for (int t = 0; t < count; ++t)
      update_columns<kWidth>(s + column, stride, key_dim, tokens[t], first + column);
  }
  for (; column + kLanes <= value_dim; column += kLanes) {
    for (int t = 0; t < count; ++t) update_columns<1>(s + column, stride, key_dim, tokens[t], first + column);
  }
  for (; column < value_dim; ++column) {
    for (int t = 0; t < count; ++t) update_column(s + column, stride, key_dim, tokens[t], first + column);
  }
}

// State [V, K]: every row is one value, updated for all tokens before the next.
inline void update_rows_v(float* s, int64_t stride, int key_dim, int first, int value_dim, Token* tokens,
                          int count) {
  for (int v = 0; v < value_dim; ++v) {
    float* const row = s + v * stride;
    for (int t = 0; t < count; ++t) {
      Token& token = tokens[t];
      float const ks = dot(row, token.decayed_k, key_dim), qs = dot(row, token.decayed_q, key_dim);
      float const value = token.v[first + v], u = (token.delta ? value - ks : value) * token.beta;
      token.o[first + v] = (qs + u * token.qk) * token.scale;
      int i = 0;
      for (; i + kLanes <= key_dim; i += kLanes) {
        store(row + i, load(row + i) * load(token.decay + i) + load(token.k + i) * u);
      }
      for (; i < key_dim; ++i) row[i] = row[i] * token.decay[i] + token.k[i] * u;
    }
  }
}

inline void update_rows(bool v_first, float* s, int64_t stride, int key_dim, int first, int value_dim,
                        Token* tokens, int count) {
  (v_first ? update_rows_v : update_rows_k)(s, stride, key_dim, first, value_dim, tokens, count);
}

// The same on a state of bf16: fp32 for all tokens, a few columns at a time, and rounded once.
inline void update_rounded(bool v_first, Bf16* s, int64_t stride, int key_dim, int value_dim, Token* tokens,
                           int count) {
  constexpr int kColumns = 32;
  alignas(64) float block[kMaxKeyDim * kColumns];
  for (int first = 0; first < value_dim; first += kColumns) {
    int const columns = value_dim - first < kColumns ? value_dim - first : kColumns;
    int const rows = v_first ? columns : key_dim, width = v_first ? key_dim : columns;
    Bf16* const from = s + (v_first ? first * stride : first);
    for (int i = 0; i < rows; ++i) load_unit(from + i * stride, width, false, block + i * width);
    update_rows(v_first, block, width, key_dim, first, columns, tokens, count);
    for (int i = 0; i < rows; ++i) store_values(block + i * width, width, from + i * stride);
  }
}

template <class T>
void step_item(StepParams const& p, int64_t row, int head, ValueSlice slice) {
  int const n = slice.end - slice.begin, count = static_cast<int>(p.tokens);
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
  if (slot < 0 || slot >= p.slots) {
    for (int t = 0; t < count; ++t) {
      T* const out = token_row<T>(p.o, row, t, head) + slice.begin;
      for (int j = 0; j < n; ++j) store_one(out + j, 0.f);
    }
    return;
  }
  Token tokens[kMaxStepTokens];
  for (int t = 0; t < count; ++t) load_token<T>(p, row, t, head, slice, tokens[t]);
  int64_t const at =
      slot * p.state_slot + head * p.state_head + slice.begin * (p.state_v_first ? p.state_row : int64_t{1});
  if (p.state_dtype == Dtype::kBFloat16) {
    update_rounded(p.state_v_first, static_cast<Bf16*>(p.state) + at, p.state_row, p.key_dim, n, tokens,
                   count);
  } else {
    update_rows(p.state_v_first, static_cast<float*>(p.state) + at, p.state_row, p.key_dim, 0, n, tokens,
                count);
  }
  for (int t = 0; t < count; ++t) store_values(tokens[t].o, n, token_row<T>(p.o, row, t, head) + slice.begin);
}

void step(StepParams const& p, int64_t row, int head, ValueSlice slice) {
  (p.dtype == Dtype::kBFloat16 ? step_item<Bf16> : step_item<float>)(p, row, head, slice);
}

}  // namespace
}  // namespace lt2::kda::LT2_ISA
