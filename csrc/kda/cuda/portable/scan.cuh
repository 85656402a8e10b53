// Tokens and columns with a decay per key channel, for the kernels of gdn's scan.cuh.
#pragma once

#include "gdn/cuda/portable/scan.cuh"
#include "kda/cuda/portable/problem.cuh"

namespace lt2::kda::portable {

template <class Tile>
struct Tokens : gdn::portable::Tokens<Tile, kMaxStepTokens> {
  static constexpr int kStaged = kMaxStepTokens;
  static_assert(kChunk % kStaged == 0);
  // e^g - 1 (with its sign bit set) where it is above -1/2, else e^g: near 1, where thousands of decays
  // multiply up, e^g itself is not rounded.
  alignas(16) float decays[kStaged][Tile::kKeys];

  // Everything of tokens [begin, begin + count); `values` is v or dO.
  template <class T>
  __device__ void load(Inputs const& p, Strided const& values, int64_t row, int64_t begin, int count,
                       int head, int first_column) {
    int const key_head = head / (p.value_heads / p.heads);
    this->load_keys(token_row<T const>(p.q, row, begin, key_head), p.q.token,
                    token_row<T const>(p.k, row, begin, key_head), p.k.token, count, p.key_dim, p.qk_l2norm);
    this->load_values(token_row<T const>(values, row, begin, head), values.token, count, first_column,
                      p.value_dim);
    for (int e = threadIdx.x; e < count * Tile::kKeys; e += kScanThreads) {
      int const i = e / Tile::kKeys, c = e % Tile::kKeys;
      float const g = c < p.key_dim ? log_decay(p, row, begin + i, head, c) : 0.f, change = expm1f(g);
      decays[i][c] = change > -0.5f ? -fabsf(change) : expf(g);
    }
    if (int const i = threadIdx.x; i < count) this->beta[i] = write_strength(p, row, begin + i, head);
  }
  template <class T>
  __device__ void load_step(StepParams const& p, int64_t row, int count, int head, int first_column) {
    load<T>(p, p.v, row, 0, count, head, first_column);
  }
};

template <class Tile>
struct Column : gdn::portable::Column<Tile> {
  using Staged = Tokens<Tile>;

  // s <- Diag(e^g) s.
  __device__ void apply_decay(Staged const& t, int i) {
    float x[Tile::kRows];
    this->read(t.decays[i], x);
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      float& s = this->s[r];
      s = fmaf(x[r], s, __float_as_int(x[r]) < 0 ? s : 0.f);
    }
  }

  // One token; returns r = v - k^T (decayed S), or v. With kOutput, *o = q^T S after it.
  template <bool kOutput>
  __device__ float advance(Staged const& t, int i, bool delta, float* o) {
    apply_decay(t, i);
    float k[Tile::kRows];
    this->read(t.k[i], k);
    float residual = t.v[i][this->index()];
    if (delta) residual -= this->dot(k);
    float const write = t.beta[i] * residual;
    if constexpr (kOutput) {
      float q[Tile::kRows];
      this->read(t.q[i], q);
      *o = this->dot(q) + t.qk[i] * write;
    }
    this->add(k, write);
    return residual;
  }
};

}  // namespace lt2::kda::portable
