// What one instruction set provides: the work of one item, for dispatch.cpp to spread over threads.
#pragma once

#include "dsa/dsa.h"

namespace lt2::dsa {

// A sequence: its first query and key in batch row `row`, how many there are, the position of its first
// query.
struct Document {
  int64_t row, query, queries, key, keys, position;
};

// static: these are compiled for every instruction set, and the linker must not merge them.
// Keys that query t of the document sees.
static inline int64_t visible(Document const& d, int64_t t) {
  int64_t const seen = d.position + t + 1;
  return seen < 0 ? 0 : seen < d.keys ? seen : d.keys;
}

constexpr int kBlockQueries = 32;  // queries [first, first + kBlockQueries) of a document are one item
constexpr int kBlockKeys = 32;     // a panel of packed keys, [DI][kBlockKeys]

// Scores are met in the order of keys, so a query keeps those above the topk-th best so far; when the list is
// full, it is cut down to the topk best again.
static inline int64_t kept(IndexerParams const& p) { return p.topk < p.keys ? p.topk : p.keys; }
static inline int64_t candidates(IndexerParams const& p) {
  int64_t const k = kept(p);
  return (k + (k < 128 ? 128 : k) + 2 * kBlockKeys) / kBlockKeys * kBlockKeys;
}
// Floats of one thread: candidates (scores and indices), packed queries, weights.
static inline int64_t select_workspace(IndexerParams const& p) {
  return kBlockQueries * (2 * candidates(p) + p.heads * p.dim + p.heads);
}

struct Kernels {
  // Keys [panel * kBlockKeys, ..) of the document, transposed, zeros after the last.
  void (*pack)(IndexerParams const& p, Document const& document, int64_t panel, float* packed);
  void (*select)(IndexerParams const& p, Document const& document, int64_t first, float const* packed,
                 float* workspace);
};

}  // namespace lt2::dsa
