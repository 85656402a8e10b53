// Cuts sequences into blocks of queries, spreads them over threads, picks the instruction set.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "common/cpu_isa.h"
#include "dsa/cpu/kernels.h"

namespace lt2::dsa {

LT2_DEFINE_KERNELS()

namespace cpu {
namespace {

std::vector<Document> documents(Sequences const& p) {
  std::vector<Document> list;
  bool const packed = p.cu_seqlens.data != nullptr;
  for (int64_t n = 0; n < p.sequences; ++n) {
    Document d = packed ? Document{0,
                                   p.cu_seqlens[n],
                                   p.cu_seqlens[n + 1] - p.cu_seqlens[n],
                                   p.cu_seqlens_k[n],
                                   p.cu_seqlens_k[n + 1] - p.cu_seqlens_k[n],
                                   0}
                        : Document{n, 0, p.tokens, 0, p.keys, 0};
    // Further out than this makes no difference, and would overflow.
    d.position = p.q_offset == nullptr ? d.keys - d.queries : std::clamp(p.q_offset[n], -d.queries, d.keys);
    list.push_back(d);
  }
  return list;
}

// Blocks of `size` out of `length` of each document, the last ones first: their queries see most keys.
struct Block {
  int64_t document, index;
};

std::vector<Block> blocks(std::vector<Document> const& list, int64_t Document::* length, int64_t size) {
  std::vector<Block> result;
  for (int64_t n = 0; n < static_cast<int64_t>(list.size()); ++n) {
    for (int64_t i = (list[n].*length + size - 1) / size; i-- > 0;) result.push_back({n, i});
  }
  return result;
}

// First panels of the documents, then how many there are; a panel is of kBlockKeys rows, each of `tokens`
// keys.
std::vector<int64_t> panels(std::vector<Document> const& list, int64_t tokens) {
  std::vector<int64_t> first(list.size() + 1);
  for (size_t n = 0; n < list.size(); ++n) {
    first[n + 1] = first[n] + (list[n].keys / tokens + kBlockKeys - 1) / kBlockKeys;
  }
  return first;
}

// Rows of a contiguous [1, T, ..] tensor that belong to no sequence, filled by the element.
template <class T>
void fill_outside(Sequences const& p, T* data, int64_t row, T value) {
  if (p.cu_seqlens.data == nullptr) return;
  std::fill(data, data + p.cu_seqlens[0] * row, value);
  std::fill(data + p.cu_seqlens[p.sequences] * row, data + p.tokens * row, value);
}

void zero_outside(AttentionParams const& p, Heads const& x, int64_t row) {
  if (p.dtype == Dtype::kFloat32) {
    fill_outside(p, static_cast<float*>(x.data), row, 0.f);
  } else {
    fill_outside(p, static_cast<uint16_t*>(x.data), row, uint16_t{0});
  }
}

// dk and dv of a key head are summed in so many parts that all heads make kSummands of them: a number that
// does not depend on the threads, so neither does the order of the sums.
constexpr int64_t kSummands = 8;
int64_t splits(AttentionParams const& p) {
  int64_t const heads = std::max<int64_t>(p.batch * p.key_heads, 1);
  return (kSummands + heads - 1) / heads;
}

int64_t partial_size(AttentionParams const& p) { return p.keys * (padded(p.dim) + padded(p.value_dim)); }
int64_t partials(AttentionParams const& p) { return p.batch * p.key_heads * splits(p) * partial_size(p); }

// f(document, first query, key head, partial, lane) for all blocks of queries, then dk and dv out of the
// partials.
template <class F>
void accumulate(AttentionBackwardParams& p, float* workspace, ThreadPool const& pool, F const& f) {
  p.splits = splits(p);
  auto const list = documents(p);
  auto const queries = blocks(list, &Document::queries, kAttendQueries);
  int64_t const heads = p.batch * p.key_heads, size = partial_size(p);
  // Part i of a head takes every splits-th block of queries, so that all see many keys and few.
  pool.items(heads * p.splits, [&](int64_t item, int lane) {
    int64_t const row = item / p.splits / p.key_heads, head = item / p.splits % p.key_heads;
    float* const partial = workspace + item * size;
    std::fill(partial, partial + size, 0.f);
    int64_t count = 0;
    for (auto const [n, i] : queries) {
      if (list[n].row != row || count++ % p.splits != item % p.splits) continue;
      f(list[n], i * kAttendQueries, head, partial, lane);
    }
  });
  int64_t const spans = (p.keys + kReducedKeys - 1) / kReducedKeys;
  pool.items(heads * spans, [&](int64_t item, int) {
    int64_t const head = item / spans;
    kernels().reduce(p, head / p.key_heads, head % p.key_heads, item % spans * kReducedKeys,
                     workspace + head * p.splits * size);
  });
}

// As one key head without values, so that dk is summed in the same way.
AttentionBackwardParams index_keys(LossBackwardParams const& p) {
  AttentionBackwardParams keys{};
  static_cast<Sequences&>(keys) = p;
  keys.dtype = p.dtype;
  keys.query_heads = keys.key_heads = 1;
  keys.dim = p.index_dim;
  keys.dk = p.dk;
  return keys;
}

}  // namespace

int64_t indexer_workspace(IndexerParams const& p, ThreadPool const& pool) {
  auto const list = documents(p);
  int64_t const means = p.pool == 0 ? 0 : panels(list, p.pool).back();
  return (panels(list, 1).back() + means) * kBlockKeys * p.dim + pool.num_threads * select_workspace(p);
}

void lightning_indexer(IndexerParams const& p, float* workspace, ThreadPool const& pool) {
  fill_outside(p, p.indices, p.topk, -1);
  auto const list = documents(p);
  auto const queries = blocks(list, &Document::queries, kBlockQueries);
  int64_t const panel = kBlockKeys * p.dim;
  // Packed rows of all documents at workspace; returns their first panels.
  auto const packed = [&](int64_t tokens, auto pack) {
    auto const first = panels(list, tokens);
    auto const items = blocks(list, &Document::keys, tokens * kBlockKeys);
    pool.items(static_cast<int64_t>(items.size()), [&](int64_t item, int) {
      auto const [n, i] = items[item];
      if (first[n] + i < first[n + 1]) pack(p, list[n], i, workspace + (first[n] + i) * panel);
    });
    workspace += first.back() * panel;
    return first;
  };
  float const* const keys = workspace;
  auto const first_key = packed(1, kernels().pack);
  float const* const means = workspace;
  auto const first_mean = p.pool == 0 ? first_key : packed(p.pool, kernels().pack_means);
  pool.items(static_cast<int64_t>(queries.size()), [&](int64_t item, int lane) {
    auto const [n, i] = queries[item];
    kernels().select(p, list[n], i * kBlockQueries, keys + first_key[n] * panel,
                     means + first_mean[n] * panel, workspace + lane * select_workspace(p));
  });
}

int64_t attention_workspace(AttentionForwardParams const& p, ThreadPool const& pool) {
  return pool.num_threads * attend_workspace(p);
}

void attention(AttentionForwardParams const& p, float* workspace, ThreadPool const& pool) {
  zero_outside(p, p.o, p.query_heads * p.value_dim);
  fill_outside(p, p.lse, p.query_heads, -std::numeric_limits<float>::infinity());
  auto const list = documents(p);
  auto const queries = blocks(list, &Document::queries, kAttendQueries);
  int64_t const count = static_cast<int64_t>(queries.size());
  pool.items(count * p.key_heads, [&](int64_t item, int lane) {
    auto const [n, i] = queries[item % count];
    kernels().attend(p, list[n], i * kAttendQueries, item / count, workspace + lane * attend_workspace(p));
  });
}

int64_t attention_backward_workspace(AttentionBackwardParams const& p, ThreadPool const& pool) {
  return partials(p) + pool.num_threads * attend_workspace(p);
}

void attention_backward(AttentionBackwardParams const& params, float* workspace, ThreadPool const& pool) {
  AttentionBackwardParams p = params;
  zero_outside(p, p.dq, p.query_heads * p.dim);
  float* const lanes = workspace + partials(p);
  accumulate(p, workspace, pool,
             [&](Document const& document, int64_t first, int64_t head, float* partial, int lane) {
               kernels().attend_backward(p, document, first, head, partial,
                                         lanes + lane * attend_workspace(p));
             });
}

int64_t loss_workspace(LossForwardParams const& p, ThreadPool const& pool) {
  return pool.num_threads * loss_lane(p);
}

void indexer_loss(LossForwardParams const& p, float* workspace, ThreadPool const& pool) {
  fill_outside(p, p.losses, 1, 0.f);
  fill_outside(p, p.log_sums, 1, 0.f);
  fill_outside(p, p.masses, 1, -1.f);
  auto const list = documents(p);
  auto const queries = blocks(list, &Document::queries, kAttendQueries);
  pool.items(static_cast<int64_t>(queries.size()), [&](int64_t item, int lane) {
    auto const [n, i] = queries[item];
    kernels().loss(p, list[n], i * kAttendQueries, workspace + lane * loss_lane(p));
  });
  int64_t const tokens = p.batch * p.tokens;
  auto const rows = tokens - std::count(p.masses, p.masses + tokens, -1.f);
  *p.rows = static_cast<float>(rows);
  *p.mean = static_cast<float>(std::accumulate(p.losses, p.losses + tokens, 0.0) /
                               static_cast<double>(std::max<int64_t>(rows, 1)));
}

int64_t loss_backward_workspace(LossBackwardParams const& p, ThreadPool const& pool) {
  return partials(index_keys(p)) + pool.num_threads * loss_lane(p);
}

void indexer_loss_backward(LossBackwardParams const& p, float* workspace, ThreadPool const& pool) {
  auto keys = index_keys(p);
  zero_outside(p, p.dq, p.index_heads * p.index_dim);
  if (p.dweights.data != nullptr) {
    fill_outside(p, static_cast<float*>(p.dweights.data), p.index_heads, 0.f);
  }
  float* const lanes = workspace + partials(keys);
  accumulate(keys, workspace, pool,
             [&](Document const& document, int64_t first, int64_t, float* partial, int lane) {
               kernels().loss_backward(p, document, first, partial, lanes + lane * loss_lane(p));
             });
}

}  // namespace cpu
}  // namespace lt2::dsa
