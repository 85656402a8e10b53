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
static inline int64_t kept_blocks(IndexerParams const& p) {
  int64_t const all = p.pool == 0 ? 0 : p.keys / p.pool;
  return p.blocks < all ? p.blocks : all;
}
static inline int64_t candidates(int64_t kept) {
  return (kept + (kept < 128 ? 128 : kept) + 2 * kBlockKeys) / kBlockKeys * kBlockKeys;
}
// Floats of one thread: candidates (scores and indices), packed queries, weights; with a pool also candidate
// blocks and the queries in rows.
static inline int64_t select_workspace(IndexerParams const& p) {
  int64_t const pooled = p.pool == 0 ? 0 : 2 * candidates(kept_blocks(p)) + p.heads * p.dim;
  return kBlockQueries * (2 * candidates(kept(p)) + p.heads * p.dim + p.heads + pooled);
}

constexpr int kRowMultiple = 16;   // rows of keys and values are padded to it in fp32
constexpr int kReducedKeys = 128;  // keys [first, first + kReducedKeys) are one item of reduce()

static inline int64_t padded(int64_t n) { return (n + kRowMultiple - 1) / kRowMultiple * kRowMultiple; }
constexpr int kAttendQueries = 128;  // of attention and loss: so many read a key while it is in the cache
constexpr int kUnitedQueries = 64;   // of these in turn the keys are brought together (attention_union_amx.h)
constexpr int kSparsest = 6;         // where a query selects one at least of so many of them

// Floats behind what a block selects, for unions: what each query selects in them, the place of each key,
// their keys, marks.
static inline int64_t union_workspace(AttentionParams const& p) {
  int64_t const most = kSparsest * p.topk < p.keys ? kSparsest * p.topk : p.keys;
  return (kAttendQueries + 1) * padded(p.topk) + padded(p.keys) +
         kAttendQueries / kUnitedQueries * padded(most);
}

// Floats of one thread, forward or backward: for each query q dq, o or dout, two [G, topk], indices.
static inline int64_t attend_workspace(AttentionParams const& p) {
  int64_t const G = p.query_heads / p.key_heads, D = padded(p.dim), DV = padded(p.value_dim);
  return kAttendQueries * (G * (2 * D + DV) + (2 * G + 1) * padded(p.topk)) + union_workspace(p);
}

// Of a query in the loss: floats of its operands of one key head or of the index, and rows of products with
// keys.
static inline int64_t loss_row(LossParams const& p) {
  int64_t const q = p.query_heads / p.key_heads * padded(p.dim),
                index_q = p.index_heads * padded(p.index_dim);
  return q > index_q ? q : index_q;
}
static inline int64_t loss_heads(LossParams const& p) {
  int64_t const heads = p.query_heads / p.key_heads;
  return heads > p.index_heads ? heads : p.index_heads;
}
// Floats of one thread: for each query operands, products, target and score of each key, indices.
static inline int64_t loss_lane(LossParams const& p) {
  return kAttendQueries * (loss_row(p) + (loss_heads(p) + 3) * padded(p.topk)) + union_workspace(p);
}

struct Kernels {
  // Keys [panel * kBlockKeys, ..) of the document, transposed, zeros after the last; pack_means: so many
  // means of `pool` keys.
  void (*pack)(IndexerParams const& p, Document const& document, int64_t panel, float* packed);
  void (*pack_means)(IndexerParams const& p, Document const& document, int64_t panel, float* packed);
  // `means` is not read without a pool.
  void (*select)(IndexerParams const& p, Document const& document, int64_t first, float const* packed,
                 float const* means, float* workspace);

  // Query heads of one key head, queries [first, first + kAttendQueries) of the document.
  void (*attend)(AttentionForwardParams const& p, Document const& document, int64_t first, int64_t head,
                 float* workspace);
  // Also adds the dk and dv of these queries to partial [S, padded(D) + padded(DV)].
  void (*attend_backward)(AttentionBackwardParams const& p, Document const& document, int64_t first,
                          int64_t head, float* partial, float* workspace);
  // dk and dv out of the partials [splits, S, ..] of one key head, added in order.
  void (*reduce)(AttentionBackwardParams const& p, int64_t row, int64_t head, int64_t first, float* partials);

  // Queries [first, first + kAttendQueries); backward adds their dk to partial [S, padded(DI)].
  void (*loss)(LossForwardParams const& p, Document const& document, int64_t first, float* workspace);
  void (*loss_backward)(LossBackwardParams const& p, Document const& document, int64_t first, float* partial,
                        float* workspace);
};

}  // namespace lt2::dsa
