// Cuts sequences into blocks of queries, spreads them over threads, picks the instruction set.
#include <algorithm>
#include <cstring>
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

// Queries of no sequence have no rows among the items.
int64_t first_query(Sequences const& p) { return p.cu_seqlens.data == nullptr ? 0 : p.cu_seqlens[0]; }
int64_t last_query(Sequences const& p) {
  return p.cu_seqlens.data == nullptr ? p.tokens : p.cu_seqlens[p.sequences];
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

int64_t panels(IndexerParams const& p) {
  return static_cast<int64_t>(blocks(documents(p), &Document::keys, kBlockKeys).size());
}

}  // namespace

int64_t indexer_workspace(IndexerParams const& p, ThreadPool const& pool) {
  return panels(p) * kBlockKeys * p.dim + pool.num_threads * select_workspace(p);
}

void lightning_indexer(IndexerParams const& p, float* workspace, ThreadPool const& pool) {
  int64_t const row = p.topk * sizeof(int32_t), last = last_query(p);
  if (p.cu_seqlens.data != nullptr) {
    std::memset(p.indices, 0xff, first_query(p) * row);
    std::memset(p.indices + last * p.topk, 0xff, (p.tokens - last) * row);
  }
  auto const list = documents(p);
  auto const keys = blocks(list, &Document::keys, kBlockKeys);
  auto const queries = blocks(list, &Document::queries, kBlockQueries);
  int64_t const panel = kBlockKeys * p.dim;
  std::vector<int64_t> first_panel(list.size() + 1);
  for (size_t n = 0; n < list.size(); ++n) {
    first_panel[n + 1] = first_panel[n] + (list[n].keys + kBlockKeys - 1) / kBlockKeys;
  }
  float* const lanes = workspace + first_panel.back() * panel;
  pool.items(static_cast<int64_t>(keys.size()), [&](int64_t item, int) {
    auto const [n, i] = keys[item];
    kernels().pack(p, list[n], i, workspace + (first_panel[n] + i) * panel);
  });
  pool.items(static_cast<int64_t>(queries.size()), [&](int64_t item, int lane) {
    auto const [n, i] = queries[item];
    kernels().select(p, list[n], i * kBlockQueries, workspace + first_panel[n] * panel,
                     lanes + lane * select_workspace(p));
  });
}

}  // namespace cpu
}  // namespace lt2::dsa
