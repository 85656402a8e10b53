// Divergence of the indexer's scores from the attention weights, over the keys that each query of a block
// selects, and its gradient: products with the selected keys as for the attention itself, of which the index
// has one key head.
#pragma once

#include <type_traits>

#include "dsa/cpu/attention.h"

namespace lt2::dsa::LT2_ISA {
namespace {

using namespace lt2::LT2_ISA;

inline AttentionParams index_operands(LossParams const& p) {
  AttentionParams index{p};
  index.query_heads = p.index_heads;
  index.key_heads = 1;
  index.dim = p.index_dim;
  return index;
}

// target[query][i] = mean over heads of e^(scale q.k - lse); `x` is of the size of a key head's scores.
template <class Products>
void weigh(LossParams const& p, Document const& document, Block const& block, int64_t first, float* q,
           float* x, float* target) {
  int64_t const G = p.query_heads / p.key_heads, width = padded(p.topk);
  float const* const lse = p.lse + (document.row * p.tokens + document.query + first) * p.query_heads;
  for (int64_t head = 0; head < p.key_heads; ++head) {
    Products(p, document, block, first, head).score(p.q, p.k, p.dim, p.scale, 0.f, q, x);
    for (int query = 0; query < block.count; ++query) {
      float const* const own = lse + query * p.query_heads + head * G;
      for (int64_t i = 0; i < block.selected[query].count; i += kLanes) {
        Vec weight{};
        for (int64_t g = 0; g < G; ++g) weight += exp(load(x + (query * G + g) * width + i) - own[g]);
        float* const out = target + query * width + i;
        store(out, head == 0 ? weight : load(out) + weight);
      }
    }
  }
  for (int query = 0; query < block.count; ++query) {
    int64_t const count = block.selected[query].count;
    for (int64_t i = 0; i < count; i += kLanes) {
      float* const out = target + query * width + i;
      store(out, first_lanes(load(out) * (1.f / static_cast<float>(p.query_heads)), count - i, 0.f));
    }
  }
}

// LossForwardParams: the losses. LossBackwardParams: their gradients, dk added to partial.
template <class T, class Products, class IndexProducts, class Params>
void loss_block(Params const& p, Document const& document, int64_t first, float* partial, float* workspace) {
  constexpr bool kBackward = std::is_same_v<Params, LossBackwardParams>;
  int64_t const HI = p.index_heads, DI = padded(p.index_dim), width = padded(p.topk);
  Arena arena{workspace};
  float* const q = arena.take(kAttendQueries * loss_row(p));
  float* const x = arena.take(kAttendQueries * loss_heads(p) * width);
  float* const target = arena.take(kAttendQueries * width);
  float* const scores = arena.take(kAttendQueries * width);  // then their gradient
  Block const block(p, document, first, arena);
  int64_t const row = document.row * p.tokens + document.query + first;
  weigh<Products>(p, document, block, first, q, x, target);

  AttentionParams const operands = index_operands(p);
  IndexProducts const index(operands, document, block, first, 0);
  index.score(p.index_q, p.index_k, p.index_dim, p.index_scale, 0.f, q, x);
  auto const weight = [&](int64_t r) {
    return p.weights.data == nullptr ? 1.f : *row_of<float>(p.weights, document, first + r / HI, r % HI);
  };
  for (int query = 0; query < block.count; ++query) {
    int64_t const count = block.selected[query].count;
    float* const score = scores + query * width;
    for (int64_t j = 0; j < HI; ++j) {
      int64_t const r = query * HI + j;
      float const w = weight(r);
      for (int64_t i = 0; i < count; i += kLanes) {
        Vec const dot = load(x + r * width + i), part = (dot < 0.f ? Vec{} : dot) * w;
        store(score + i, j == 0 ? part : load(score + i) + part);
      }
    }
    end_row(score, count, -__builtin_inff());
  }

  for (int query = 0; query < block.count; ++query) {
    int64_t const count = block.selected[query].count;
    float* const score = scores + query * width;
    float const* const p_row = target + query * width;
    if constexpr (kBackward) {
      float const base = p.log_sums[row + query], mass = p.masses[row + query], mean = *p.dmean / *p.rows;
      for (int64_t i = 0; i < count; i += kLanes) {
        store(score + i, (exp(load(score + i) - base) * mass - load(p_row + i)) * mean);
      }
      end_row(score, count, 0.f);
    } else {
      double loss = 0, mass = 0;
      for (int64_t i = 0; i < count; ++i) {
        float const x_i = p_row[i];
        mass += x_i;
        if (x_i != 0.f) loss += static_cast<double>(x_i) * (__builtin_logf(x_i) - score[i]);
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
    for (int64_t r = 0; r < block.count * HI; ++r) {
      int64_t const count = block.selected[r / HI].count;
      float* const dots = x + r * width;
      float const factor = weight(r) * p.index_scale;
      end_row(dots, count, 0.f);
      Vec parts{};
      for (int64_t i = 0; i < count; i += kLanes) {
        Vec const dot = load(dots + i), slope = dot > 0.f ? load(scores + r / HI * width + i) : Vec{};
        parts += slope * dot;
        store(dots + i, slope * factor);
      }
      if (p.dweights.data != nullptr)
        *row_of<float>(p.dweights, document, first + r / HI, r % HI) = sum(parts);
    }
    index.add(x, p.index_k, p.index_dim, q);
    index.template narrow_rows<T>(q, p.index_dim, p.dq);
    index.add_outer(x, p.index_q, p.index_dim, q, partial + document.key * DI, DI);
  }
}

}  // namespace
}  // namespace lt2::dsa::LT2_ISA
