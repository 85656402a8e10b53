#include "dsa/cuda/portable/pooled.cuh"

#include "common/cuda/launch.cuh"

namespace lt2::dsa::portable {
namespace {

constexpr int64_t kMostShared = 96 << 10;  // bytes of a block, on any GPU since sm_80
constexpr int64_t kMostQuery = 8192;       // floats of a query in shared memory

PooledRows pooled_rows(IndexerParams const& p) {
  PooledRows r{};
  r.slots = ceil_div(p.keys, p.pool);
  int64_t const blocks = std::min(p.blocks, r.slots) + 1;
  r.count = ceil_div(std::max(r.slots, std::min(blocks, r.slots) * p.pool), 4) * 4;
  r.stride = ceil_div(r.count + blocks, 4) * 4;
  return r;
}
bool in_shared(PooledRows const& r) {
  return int64_t{sizeof(BestShared)} + (r.stride + kMostQuery) * 4 <= kMostShared;
}

int64_t mean_floats(IndexerParams const& p, PooledRows const& r) { return p.batch * r.slots * p.dim; }
int64_t queries_at_once(IndexerParams const& p, PooledRows const& r) {
  int64_t const most = in_shared(r) ? INT32_MAX : std::max(kWorkspaceFloats / r.stride, int64_t{1});
  return std::min(p.batch * p.tokens, most);
}

bool aligned(Heads const& x, int64_t bytes, int64_t elements) {
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && x.batch % elements == 0 &&
         x.token % elements == 0 && x.head % elements == 0;
}

template <class T, int kDim = 0, int kHeadTiles = 0>
Status search(IndexerParams const& p, PooledRows rows, float* workspace, void* stream) {
  auto* const means = reinterpret_cast<T*>(workspace);
  int64_t const at_once = queries_at_once(p, rows), all = p.batch * p.tokens;
  if (!in_shared(rows)) rows.scores = workspace + ceil_div(mean_floats(p, rows), 4) * 4;
  int64_t const floats = Scorer<T, kDim, kHeadTiles>::floats(p) + (in_shared(rows) ? rows.stride : 0);
  bool const vectors = aligned(p.k, 4 * sizeof(T), 4);
  Status done = launch(pool_keys<T>, p.batch * rows.slots, kMeanThreads, 0, stream, p, means, rows.slots);
  for (; rows.first < all && done == kOk; rows.first += at_once) {
    done = launch(search_query<T, kDim, kHeadTiles>, std::min(at_once, all - rows.first), kPooledThreads,
                  static_cast<int>(sizeof(BestShared) + floats * sizeof(float)), stream, p, rows,
                  static_cast<T const*>(means), vectors);
  }
  return done;
}

template <class T>
Status search_2_byte(IndexerParams const& p, PooledRows const& rows, float* workspace, void* stream) {
  bool const fits = p.heads <= 16 && aligned(p.q, 16, 8) && aligned(p.k, 16, 8);
  bool const wide = p.heads > 8;
  if (fits && p.dim == 64) return (wide ? search<T, 64, 2> : search<T, 64, 1>)(p, rows, workspace, stream);
  if (fits && p.dim == 128) return (wide ? search<T, 128, 2> : search<T, 128, 1>)(p, rows, workspace, stream);
  return search<T>(p, rows, workspace, stream);
}

}  // namespace

Status pooled_indexer_supports(IndexerParams const& p) {
  return p.heads * (p.dim + 1) <= kMostQuery - 4 ? kOk : "HI * (DI + 1) must be at most 8188 with a pool";
}

int64_t pooled_indexer_workspace(IndexerParams const& p) {
  PooledRows const r = pooled_rows(p);
  int64_t const scores = in_shared(r) ? 0 : queries_at_once(p, r) * r.stride;
  return ceil_div(mean_floats(p, r), 4) * 4 + scores;
}

Status pooled_indexer(IndexerParams const& p, float* workspace, void* stream) {
  if (p.batch == 0 || p.tokens == 0) return kOk;
  PooledRows const rows = pooled_rows(p);
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return search_2_byte<__nv_bfloat16>(p, rows, workspace, stream);
    case Dtype::kFloat16:
      return search_2_byte<__half>(p, rows, workspace, stream);
    default:
      return search<float>(p, rows, workspace, stream);
  }
}

}  // namespace lt2::dsa::portable
