#include "common/cuda/launch.cuh"
#include "dsa/cuda/portable/scores.cuh"
#include "dsa/cuda/portable/select.cuh"

namespace lt2::dsa::portable {
namespace {

constexpr int kFull = 132, kWorthABlock = 2048;

bool vectors(Heads const& x, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(x.data) % (4 * element_bytes) == 0 && x.batch % 4 == 0 &&
         x.token % 4 == 0;
}

template <class T>
Status launch_scores(IndexerParams const& p, ScoreRows const& rows, void* stream) {
  int head_rows = 1;
  while (head_rows < p.heads && head_rows < kRows) head_rows *= 2;
  dim3 const grid(static_cast<unsigned>(ceil_div(p.keys, kTileKeys)), static_cast<unsigned>(rows.tiles));
  return launch(score_tile<T>, grid, kScoreThreads, sizeof(ScoreShared), stream, p, rows, head_rows,
                vectors(p.k, sizeof(T)));
}

}  // namespace

Status select(IndexerParams const& p, ScoreRows const& rows, void* stream) {
  int64_t const queries = rows.tiles * rows.tile_rows;
  // Few rows: several blocks for each, while the machine is not full and they have enough to do.
  unsigned blocks = 1;
  if (runs_sm90_code()) {
    while (blocks < kMostBlocks && queries * blocks < kFull && p.keys > int64_t{blocks} * kWorthABlock)
      blocks *= 2;
  }
  if (queries * blocks > INT32_MAX) return "too many queries for one launch (2^31 - 1)";
  return launch_overlapped(select_row, dim3(static_cast<unsigned>(queries * blocks)), kSelectThreads, 0,
                           blocks, stream, p, rows, static_cast<int>(blocks));
}

Status indexer_supports(IndexerParams const&) { return kOk; }

int64_t indexer_workspace(IndexerParams const& p) { return score_workspace(p, kTileQueries); }

Status lightning_indexer(IndexerParams const& p, float* workspace, void* stream) {
  return score_and_select(p, kTileQueries, workspace, stream, [&](ScoreRows const& rows) {
    switch (p.dtype) {
      case Dtype::kBFloat16:
        return launch_scores<__nv_bfloat16>(p, rows, stream);
      case Dtype::kFloat16:
        return launch_scores<__half>(p, rows, stream);
      default:
        return launch_scores<float>(p, rows, stream);
    }
  });
}

}  // namespace lt2::dsa::portable
