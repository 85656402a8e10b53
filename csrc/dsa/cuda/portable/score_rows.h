// Scores in memory: some tiles of queries at a time, so that the workspace does not grow with T.
#pragma once

#include <algorithm>

#include "dsa/dsa.h"

namespace lt2::dsa::portable {

// Query tiles [first_tile, first_tile + tiles), of which each batch row has `row_tiles`. Query i of the n-th
// of them has row n * tile_rows + i of scores [.., stride]; the score of key s is at s - Sight::first.
struct ScoreRows {
  float* scores;
  int64_t stride, first_tile, tiles, row_tiles;
  int tile_rows;
};

inline constexpr int64_t kWorkspaceFloats = 16 << 20;  // stays in the L2 cache, more or less

// All tiles of at most `tile_queries` queries, as the first ScoreRows of as many tiles as the workspace
// holds.
inline ScoreRows score_rows(IndexerParams const& p, int64_t tile_queries, float* workspace) {
  ScoreRows r{workspace, (p.keys + 3) / 4 * 4, 0, 0, 0, 1};
  if (p.batch == 0 || p.tokens == 0) return r;
  r.tile_rows = static_cast<int>(std::min(tile_queries, p.tokens));
  r.row_tiles = (p.tokens + r.tile_rows - 1) / r.tile_rows;
  int64_t const fitting = kWorkspaceFloats / std::max(r.tile_rows * r.stride, int64_t{1});
  r.tiles = std::min(r.row_tiles * p.batch, std::clamp(fitting, int64_t{1}, int64_t{65535}));
  return r;
}
inline int64_t score_workspace(IndexerParams const& p, int64_t tile_queries) {
  ScoreRows const r = score_rows(p, tile_queries, nullptr);
  return r.tiles * r.tile_rows * r.stride;
}

// Writes the selection of all queries of `rows`.
Status select(IndexerParams const& p, ScoreRows const& rows, void* stream);

// For each chunk of all tiles: its scores by `score`, then the selection from them.
template <class Score>
Status score_and_select(IndexerParams const& p, int64_t tile_queries, float* workspace, void* stream,
                        Score const& score) {
  ScoreRows rows = score_rows(p, tile_queries, workspace);
  int64_t const all = rows.row_tiles * p.batch, chunk = rows.tiles;
  for (; rows.first_tile < all; rows.first_tile += chunk) {
    rows.tiles = std::min(chunk, all - rows.first_tile);
    if (Status const scored = score(rows); scored != kOk) return scored;
    if (Status const selected = select(p, rows, stream); selected != kOk) return selected;
  }
  return kOk;
}

}  // namespace lt2::dsa::portable
