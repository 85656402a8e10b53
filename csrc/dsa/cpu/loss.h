// Divergence of the indexer's scores from the attention weights, over the keys that each query of a block
// selects, and its gradient. The keys are gathered as for the attention itself; a query's sums run in the
// order of its indices.
#pragma once

#include <type_traits>

#include "dsa/cpu/attention.h"

namespace lt2::dsa::LT2_ISA {
namespace {

using namespace lt2::LT2_ISA;

// LossForwardParams: the losses. LossBackwardParams: their gradients, dk added to partial.
template <class T, class Params>
void loss_block(Params const& p, Document const& document, int64_t first, float* partial, float* workspace) {
  constexpr bool kBackward = std::is_same_v<Params, LossBackwardParams>;
  int64_t const G = p.query_heads / p.key_heads, D = padded(p.dim);
  int64_t const HI = p.index_heads, DI = padded(p.index_dim), width = padded(p.topk);
  Arena arena{workspace};
  float* const q = arena.take(kAttendQueries * G * D);
  float* const index_q = arena.take(kAttendQueries * HI * DI);
  float* const dq = arena.take(kAttendQueries * HI * DI);
  float* const weights = arena.take(kAttendQueries * HI);
  float* const dweights = arena.take(kAttendQueries * HI);
  float* const target = arena.take(kAttendQueries * width);
  float* const scores = arena.take(kAttendQueries * width);  // then their gradient
  float* const tile = arena.take(kLanes * (D > DI ? D : DI));
  float* const factors = arena.take(kLanes * HI);
  Block const block(p, document, first, reinterpret_cast<int32_t*>(arena.take(kAttendQueries * width)));

  int64_t const row = document.row * p.tokens + document.query + first;
  for (int64_t head = 0; head < p.key_heads; ++head) {
    Rows<T> const k(p.k, p.dim, document, head);
    for (int64_t r = 0; r < block.count * G; ++r) {
      widen(row_of<T>(p.q, document, first + r / G, head * G + r % G), p.dim, q + r * D);
    }
    block.tiles(document.keys, [&](int query, int64_t i) {
      k.gather(block.selected[query], i, tile);
      float const* const lse = p.lse + (row + query) * p.query_heads + head * G;
      Vec mean{};
      for (int64_t g = 0; g < G; ++g) mean += exp(dots(q + (query * G + g) * D, tile, D) * p.scale - lse[g]);
      mean =
          first_lanes(mean * (1.f / static_cast<float>(p.query_heads)), block.selected[query].count - i, 0.f);
      float* const out = target + query * width + i;
      store(out, head == 0 ? mean : load(out) + mean);
    });
  }

  Rows<T> const k(p.index_k, p.index_dim, document, 0);
  for (int64_t r = 0; r < block.count * HI; ++r) {
    widen(row_of<T>(p.index_q, document, first + r / HI, r % HI), p.index_dim, index_q + r * DI);
    weights[r] =
        p.weights.data == nullptr ? 1.f : *row_of<float>(p.weights, document, first + r / HI, r % HI);
  }
  block.tiles(document.keys, [&](int query, int64_t i) {
    k.gather(block.selected[query], i, tile);
    Vec score{};
    for (int64_t r = query * HI; r < (query + 1) * HI; ++r) {
      Vec const x = dots(index_q + r * DI, tile, DI) * p.index_scale;
      score += (x < 0.f ? Vec{} : x) * weights[r];
    }
    store(scores + query * width + i, first_lanes(score, block.selected[query].count - i, -__builtin_inff()));
  });

  for (int query = 0; query < block.count; ++query) {
    int64_t const count = block.selected[query].count;
    float* const score = scores + query * width;
    float const* const p_row = target + query * width;
    if constexpr (kBackward) {
      float const base = p.log_sums[row + query], mass = p.masses[row + query], mean = *p.dmean / *p.rows;
      for (int64_t i = 0; i < count; i += kLanes) {
        store(score + i, (exp(load(score + i) - base) * mass - load(p_row + i)) * mean);
      }
    } else {
      double loss = 0, mass = 0;
      for (int64_t i = 0; i < count; ++i) {
        float const x = p_row[i];
        mass += x;
        if (x != 0.f) loss += static_cast<double>(x) * (__builtin_logf(x) - score[i]);
      }
      auto const [base, total] = Exponentials(score, count);
      double const log_sum = base + static_cast<double>(__builtin_logf(total));
      bool const empty = count == 0;
      p.losses[row + query] = empty ? 0.f : static_cast<float>(loss + mass * log_sum);
      p.log_sums[row + query] = empty ? 0.f : static_cast<float>(log_sum);
      p.masses[row + query] = empty ? -1.f : static_cast<float>(mass);
    }
  }
  if constexpr (kBackward) {
    __builtin_memset(dq, 0, block.count * HI * DI * sizeof(float));
    __builtin_memset(dweights, 0, block.count * HI * sizeof(float));
    block.tiles(document.keys, [&](int query, int64_t i) {
      auto const& selected = block.selected[query];
      int const n = selected.in_tile(i);
      k.gather(selected, i, tile);
      Vec const dscore = load(scores + query * width + i);
      for (int64_t j = 0; j < HI; ++j) {
        int64_t const r = query * HI + j;
        Vec const x = dots(index_q + r * DI, tile, DI) * p.index_scale;
        Vec const dx = x > 0.f ? dscore : Vec{};
        dweights[r] += sum(dx * x);
        store(factors + j * kLanes, dx * (weights[r] * p.index_scale));
        add_rows(factors + j * kLanes, 1, tile, n, DI, dq + r * DI);
      }
      for (int s = 0; s < n; ++s) {
        add_rows(factors + s, kLanes, index_q + query * HI * DI, static_cast<int>(HI), DI,
                 partial + (document.key + selected.keys[i + s]) * DI);
      }
    });
    for (int64_t r = 0; r < block.count * HI; ++r) {
      narrow(dq + r * DI, p.index_dim, row_of<T>(p.dq, document, first + r / HI, r % HI));
      if (p.dweights.data != nullptr)
        *row_of<float>(p.dweights, document, first + r / HI, r % HI) = dweights[r];
    }
  }
}

void loss(LossForwardParams const& p, Document const& document, int64_t first, float* workspace) {
  auto const body = p.dtype == Dtype::kBFloat16 ? loss_block<Bf16, LossForwardParams>
                                                : loss_block<float, LossForwardParams>;
  body(p, document, first, nullptr, workspace);
}

void loss_backward(LossBackwardParams const& p, Document const& document, int64_t first, float* partial,
                   float* workspace) {
  auto const body = p.dtype == Dtype::kBFloat16 ? loss_block<Bf16, LossBackwardParams>
                                                : loss_block<float, LossBackwardParams>;
  body(p, document, first, partial, workspace);
}

}  // namespace
}  // namespace lt2::dsa::LT2_ISA
