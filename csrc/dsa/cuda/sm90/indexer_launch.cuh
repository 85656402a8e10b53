#pragma once

#include <algorithm>

#include "common/cuda/launch.cuh"
#include "dsa/cuda/sm90/indexer_launch.h"
#include "dsa/cuda/sm90/indexer_select.cuh"
#include "dsa/cuda/sm90/indexer_step.cuh"

namespace lt2::dsa::sm90::indexer {

inline constexpr int64_t kMostKept = 4096;
inline constexpr int kMultiprocessors = 132, kSharedBytes = 227 << 10;

inline TokenMajor keys_of(IndexerParams const& p) {
  return {p.k.data, p.k.batch, p.k.token, 0, p.batch, p.keys, 1, p.dim};
}

// Many queries: a block selects from its scores as they come. Few: scores go to memory, so that many blocks
// share the keys of a query. Also if lists of candidates would be long: they are in memory, for every block.
inline bool streams(IndexerParams const& p, int tile_queries) {
  int64_t const tiles = p.batch * portable::ceil_div(p.tokens, tile_queries);
  return p.tokens >= tile_queries / 2 && tiles >= kMultiprocessors / 2 &&
         std::min(p.topk, p.keys) <= kMostKept;
}

// Lists have room for as many again as are kept.
template <class Traits>
SelectLaunch plan(IndexerParams const& p, float* workspace, int64_t* floats, int* shared_bytes) {
  SelectLaunch a{};
  a.p = p;
  a.kept = static_cast<int>(std::min(p.topk, p.keys));
  a.capacity = static_cast<int>(portable::ceil_div(a.kept + std::max(a.kept, 256), kKeys) + 1) * kKeys;
  a.most = a.kept + (a.capacity - a.kept) / 4;
  int64_t const lists = Traits::kQueries * (a.capacity + kBeyond) * static_cast<int64_t>(sizeof(Candidate));
  bool const shared = static_cast<int64_t>(sizeof(typename Traits::Shared)) + lists <= kSharedBytes;
  a.rows.tile_rows = Traits::kQueries;
  a.rows.row_tiles = portable::ceil_div(p.tokens, Traits::kQueries);
  a.rows.tiles = a.rows.row_tiles * p.batch;
  int64_t const blocks = std::min<int64_t>(a.rows.tiles, kMultiprocessors);
  *floats = shared ? 0 : blocks * lists / 4;
  *shared_bytes = static_cast<int>(sizeof(typename Traits::Shared) + (shared ? lists : 0));
  a.lists = shared ? nullptr : reinterpret_cast<Candidate*>(workspace);
  constexpr int kClosest = 16;
  a.stride = kClosest;
  while (p.keys > int64_t{a.stride} * (1 << (kStrides - 1)) * (a.capacity - kKeys)) a.stride *= 2;
  return a;
}

template <class Traits>
Status launch_select(SelectLaunch const& a, int shared_bytes, Dtype dtype, void* stream) {
  KeyMaps maps;
  TokenMajor keys = keys_of(a.p);
  if (Status const made = make_tensor_map(&maps.all, keys, dtype, kTileSide); made != kOk) return made;
  for (int i = 0; i < kStrides; ++i) {
    int64_t const stride = int64_t{a.stride} << i;
    TokenMajor const sampled{keys.data, keys.batch,   stride * keys.token,
                             0,         keys.batches, portable::ceil_div(keys.tokens, stride),
                             1,         keys.dim};
    if (Status const s = make_tensor_map(&maps.sampled[i], sampled, dtype, kTileSide); s != kOk) return s;
  }
  int64_t const blocks = std::min<int64_t>(a.rows.tiles, kMultiprocessors);
  return launch(select_kernel<Traits>, blocks, Traits::kThreads, shared_bytes, stream, a, maps);
}

template <class Traits>
Status launch_scores(ScoreLaunch const& a, Dtype dtype, void* stream) {
  CUtensorMap map;
  if (Status const made = make_tensor_map(&map, keys_of(a.p), dtype, kTileSide); made != kOk) return made;
  int64_t const blocks = std::min<int64_t>(a.rows.tiles * a.spans, kMultiprocessors);
  return launch(score_kernel<Traits>, blocks, Traits::kThreads, sizeof(typename Traits::Shared), stream, a,
                map);
}

// So few queries that each may read its keys alone, if a cluster's shared memory holds its scores.
struct StepPlan {
  int blocks, stages, shared_bytes;  // of a query; of a warpgroup; of a block
};
template <class Traits>
StepPlan plan_step(IndexerParams const& p) {
  constexpr int64_t kWorthABlock = 2048;
  int blocks = 1;
  while (blocks < kMostStepBlocks && p.keys > blocks * kWorthABlock) blocks *= 2;
  int64_t const slice = portable::ceil_div(p.keys, kStepKeys * blocks) * kStepKeys;
  int64_t const fixed = sizeof(typename Traits::Shared) + slice * sizeof(uint32_t);
  // One block on a multiprocessor, or more.
  bool const alone = p.batch * p.tokens * blocks <= kMultiprocessors;
  int stages = std::max(Traits::kMostStages / (alone ? 1 : 2) / Traits::kHalves, 1);
  int64_t const stage = Traits::kGroups * Traits::kKeyBytes;
  while (stages > 1 && fixed + stages * stage > kSharedBytes) stages /= 2;
  return {blocks, stages, static_cast<int>(fixed + stages * stage)};
}
template <class Traits>
bool is_step(IndexerParams const& p) {
  constexpr int64_t kFew = 4;
  bool const alone = p.cu_seqlens.data != nullptr && p.sequences >= p.tokens;
  return (p.tokens <= kFew || alone) && plan_step<Traits>(p).shared_bytes <= kSharedBytes;
}
template <class Traits>
Status launch_step(IndexerParams const& p, Dtype dtype, void* stream) {
  CUtensorMap map;
  if (Status const made = make_tensor_map(&map, keys_of(p), dtype, kTileSide); made != kOk) return made;
  StepPlan const plan = plan_step<Traits>(p);
  int64_t const blocks = p.batch * p.tokens * plan.blocks;
  if (blocks > INT32_MAX) return "too many queries for one launch (2^31 - 1 blocks)";
  return launch_overlapped(step_kernel<Traits, IndexerParams>, dim3(static_cast<unsigned>(blocks)),
                           Traits::kThreads, plan.shared_bytes, plan.blocks, stream, p, map, plan.blocks,
                           plan.stages);
}

template <class T, Dtype kDtype, int kDim, int kHeads>
struct Indexer {
  using Step = StepTraits<T, kDim, kHeads == 16 ? 16 : 8, kDim == 64 ? 4 : 2>;
  using Select = SelectTraits<T, kDim, kHeads>;
  using Scores = ScoreTraits<T, kDim, kHeads>;

  static int64_t workspace(IndexerParams const& p) {
    if (is_step<Step>(p)) return 0;
    if (!streams(p, Select::kQueries)) return portable::score_workspace(p, Scores::kQueries);
    int64_t floats;
    int shared_bytes;
    plan<Select>(p, nullptr, &floats, &shared_bytes);
    return floats;
  }

  static Status run(IndexerParams const& p, float* workspace, void* stream) {
    if (is_step<Step>(p)) return launch_step<Step>(p, kDtype, stream);
    if (streams(p, Select::kQueries)) {
      int64_t floats;
      int shared_bytes;
      SelectLaunch const a = plan<Select>(p, workspace, &floats, &shared_bytes);
      if constexpr (kDim == 64 && kHeads >= 8) {
        using Here = SelectTraits<T, kDim, kHeads, true>;
        if (floats == 0) return launch_select<Here>(a, shared_bytes, kDtype, stream);
      }
      return launch_select<Select>(a, shared_bytes, kDtype, stream);
    }
    return portable::score_and_select(p, Scores::kQueries, workspace, stream, [&](ScoreRows const& rows) {
      // A few items per block, for an even load.
      int64_t const spans = portable::ceil_div(4 * kMultiprocessors, rows.tiles);
      int64_t const span =
          std::max(portable::ceil_div(portable::ceil_div(p.keys, spans), kKeys) * kKeys, int64_t{8 * kKeys});
      ScoreLaunch const a{p, rows, portable::ceil_div(p.keys, span), span};
      return launch_scores<Scores>(a, kDtype, stream);
    });
  }
};

// f with the Indexer of p.
template <Dtype kDtype, class F>
auto with_indexer(IndexerParams const& p, F const& f) {
  using T = Element<kDtype>;
  auto const with_heads = [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if (p.heads <= 2) return f(Indexer<T, kDtype, kDim, 2>{});
    if (p.heads <= 4) return f(Indexer<T, kDtype, kDim, 4>{});
    if (p.heads <= 8) return f(Indexer<T, kDtype, kDim, 8>{});
    return f(Indexer<T, kDtype, kDim, 16>{});
  };
  return p.dim == 64 ? with_heads(std::integral_constant<int, 64>{})
                     : with_heads(std::integral_constant<int, 128>{});
}

template <Dtype kDtype>
int64_t workspace(IndexerParams const& p) {
  return with_indexer<kDtype>(p, [&](auto indexer) { return indexer.workspace(p); });
}
template <Dtype kDtype>
Status run(IndexerParams const& p, float* workspace, void* stream) {
  return with_indexer<kDtype>(p, [&](auto indexer) { return indexer.run(p, workspace, stream); });
}

}  // namespace lt2::dsa::sm90::indexer
