// The queries that select a key, in ascending order, for all keys: a counting sort of the selected pairs by
// key. Queries are taken in blocks: counts say how often the queries of a block select a key, a scan turns
// them into the places of the block's first entry in the key's list, and each block fills in its queries one
// after the other. Entries of one query and key say the same, so it does not matter which of its threads
// writes which.
#pragma once

#include <algorithm>

#include "common/cuda/launch.cuh"
#include "dsa/cuda/portable/rows.cuh"

namespace lt2::dsa::portable {

struct Lists {
  int64_t block, blocks;  // queries of a block, blocks of a batch row
  int32_t* counts;        // [B, blocks, S]
  int64_t* starts;        // [B, S + 1]
  int32_t* queries;       // [B, T topk]
  bool slots;             // entries are topk query + slot, else queries
};

// As many counts as selected pairs at most.
inline Lists cut_lists(AttentionParams const& p) {
  constexpr int64_t kSmallest = 32;
  int64_t const per_query = ceil_div(p.keys, p.topk > 0 ? p.topk : 1);
  int64_t const block = per_query > kSmallest ? per_query : kSmallest;
  return {block, ceil_div(p.tokens, block), nullptr, nullptr, nullptr, false};
}

// Fills `lists`.
Status list_queries(AttentionParams const& p, Lists const& lists, void* stream, int const* condition);

}  // namespace lt2::dsa::portable
