#include "common/cuda/overlap.cuh"
#include "dsa/cuda/portable/loss_launch.h"
#include "dsa/cuda/sm90/attention_launch.cuh"
#include "dsa/cuda/sm90/loss_launch.h"

namespace lt2::dsa::sm90 {

extern template Status launch_sums<Dtype::kBFloat16>(PairLaunch const&, void*);
extern template Status launch_sums<Dtype::kFloat16>(PairLaunch const&, void*);
extern template Status launch_gradients<Dtype::kBFloat16>(PairLaunch const&, SlopeLaunch const&, int64_t,
                                                          void*);
extern template Status launch_gradients<Dtype::kFloat16>(PairLaunch const&, SlopeLaunch const&, int64_t,
                                                         void*);

namespace {

constexpr int64_t kSparsest = 32;  // keys per selected one, up to which all tiles are cheaper than a gather

// Tiles in which a query sees a key, without a selection; a block a query tile.
__global__ void __launch_bounds__(kTile)
    mark_visible(__grid_constant__ LossParams const p, Masks const masks) {
  __shared__ Range ranges[kTile];
  int64_t const row = blockIdx.x / masks.query_tiles, tile = blockIdx.x % masks.query_tiles;
  ranges[threadIdx.x] = keys_of(p, row, tile * kTile + threadIdx.x);
  __syncthreads();
  __shared__ Range tiles;
  if (threadIdx.x < kWarp) tiles = tiles_of(ranges);
  __syncthreads();
  for (int i = threadIdx.x; i < masks.key_tiles; i += kTile) {
    masks.used[masks.tile(row, tile, i)] = i >= tiles.first && i < tiles.end;
  }
}

// losses, log_sums and masses out of the sums over spans.
__global__ void __launch_bounds__(portable::kThreads)
    add_spans(__grid_constant__ LossForwardParams const p, int64_t query_tiles, int64_t spans,
              PairSums const* sums) {
  int64_t const query = int64_t{blockIdx.x} * portable::kThreads + threadIdx.x;
  if (query >= p.batch * p.tokens) return;
  int64_t const row = query / p.tokens, token = query % p.tokens;
  PairSums const* const own = sums + (row * query_tiles + token / kTile) * spans * kTile + token % kTile;
  float top = -INFINITY, total = 0.f, mass = 0.f, loss = 0.f;
  bool empty = true;
  for (int64_t i = 0; i < spans; ++i) top = fmaxf(top, own[i * kTile].top);
  for (int64_t i = 0; i < spans; ++i) {
    PairSums const x = own[i * kTile];
    if (x.mass == -1.f) continue;
    empty = false;
    if (top > -INFINITY) total += x.total * expf(x.top - top);
    mass += x.mass;
    loss += x.loss;
  }
  float const log_sum = top + logf(total);
  p.losses[query] = empty ? 0.f : loss + mass * log_sum;
  p.log_sums[query] = empty ? 0.f : log_sum;
  p.masses[query] = empty ? -1.f : mass;
}

// SlopeLaunch::weights, `heads` of a query.
__global__ void __launch_bounds__(portable::kThreads)
    copy_weights(__grid_constant__ LossBackwardParams const p, int64_t heads, int64_t tokens,
                 float* weights) {
  int64_t const i = int64_t{blockIdx.x} * portable::kThreads + threadIdx.x;
  int64_t const head = i / tokens % heads, token = i % tokens, row = i / tokens / heads;
  if (row >= p.batch) return;
  bool const felt = head < p.index_heads && token < p.tokens && p.masses[row * p.tokens + token] != -1.f;
  weights[i] = !felt                       ? 0.f
               : p.weights.data == nullptr ? 1.f
                                           : *portable::row_of<float const>(p.weights, row, token, head);
}

// Masks and spans; the bits are left out where there is no selection.
PairLaunch take_pairs(LossParams const& p, Arena& arena) {
  PairLaunch a{};
  a.p = p;
  int* const redo = take_flags(arena).redo;
  if (p.dense) {
    a.masks = cut_masks(p);
    a.masks.used = arena.take<uint8_t>(p.batch * a.masks.query_tiles * a.masks.key_tiles);
    a.masks.redo = redo;
  } else {
    a.masks = take_masks(p, arena, redo, nullptr);
  }
  a.span = portable::ceil_div(a.masks.key_tiles, kMostSpans);
  a.spans = portable::ceil_div(a.masks.key_tiles, a.span);
  return a;
}

Status make_pairs(PairLaunch const& a, void* stream) {
  if (Status const s = clear({a.masks.redo, nullptr}, stream); s != kOk) return s;
  if (!a.p.dense) return make_masks(a.p, a.masks, stream);
  return launch(mark_visible, a.p.batch * a.masks.query_tiles, kTile, 0, stream, a.p, a.masks);
}

PairSums* take_sums(PairLaunch const& a, Arena& arena) {
  return arena.take<PairSums>(a.p.batch * a.masks.query_tiles * a.spans * kTile);
}

// Query tiles of a band; all that follows from the slopes of a band is done before the next.
int64_t band_of(PairLaunch const& a) {
  constexpr int64_t kBandBytes = int64_t{128} << 20;
  return std::clamp(kBandBytes / (a.masks.key_tiles * kSlopeBytes), int64_t{1},
                    a.p.batch * a.masks.query_tiles);
}

int64_t heads_together(LossParams const& p) { return 128 / p.index_dim; }

SlopeLaunch take_slopes(LossBackwardParams const& p, PairLaunch& pairs, Arena& arena) {
  SlopeLaunch a{};
  a.p = p;
  a.masks = pairs.masks;
  int64_t const together = heads_together(p);
  a.groups = portable::ceil_div(p.index_heads, together);
  a.weights = arena.take<float>(p.batch * a.groups * together * a.masks.query_tiles * kTile);
  a.dk = arena.take<float>(p.batch * a.groups * p.keys * p.index_dim);
  pairs.slopes = arena.take<uint4>(band_of(pairs) * a.masks.key_tiles * (kSlopeBytes / sizeof(uint4)));
  a.slopes = pairs.slopes;
  return a;
}

}  // namespace

Status loss_supports(LossParams const& p) {
  auto const is_dim = [](int64_t dim) { return dim == 64 || dim == 128; };
  if (p.dtype == Dtype::kFloat32) return "the Hopper kernels take bfloat16 and float16";
  if (!is_dim(p.dim) || !is_dim(p.index_dim)) return "the Hopper kernels take D and DI = 64 or 128";
  if (!(p.index_scale > 0.f)) return "the Hopper kernels take a positive scale of the index";
  if (p.batch == 0 || p.keys == 0) return "the Hopper kernels take at least one key";
  if (!runs_sm90_code()) return "the Hopper kernels need compute capability 9.0";
  if (is_step(p)) return "the Hopper kernels of the loss take T from 64";
  if (p.tokens > kMaxTiles * kTile || p.keys > kMaxTiles * kTile)
    return "the Hopper kernels take T and S up to 2^17";
  if (!p.dense && p.keys > kSparsest * p.topk) return "the Hopper kernels of the loss take S up to 32 topk";
  for (TokenMajor const& x :
       {queries(p, p.q, p.dim), keys(p, p.k, p.dim), index_queries(p, p.index_q), index_keys(p)}) {
    if (!tma_compatible(x)) return "the Hopper kernels take rows with strides of multiples of 8 elements";
  }
  return kOk;
}

int64_t loss_workspace(LossForwardParams const& p) {
  Arena arena{nullptr};
  take_sums(take_pairs(p, arena), arena);
  return arena.floats;
}

Status indexer_loss(LossForwardParams const& p, float* workspace, void* stream) {
  Arena arena{workspace};
  PairLaunch a = take_pairs(p, arena);
  a.sums = take_sums(a, arena);
  if (Status const s = make_pairs(a, stream); s != kOk) return s;
  Status const paired = p.dtype == Dtype::kFloat16 ? launch_sums<Dtype::kFloat16>(a, stream)
                                                   : launch_sums<Dtype::kBFloat16>(a, stream);
  if (paired != kOk) return paired;
  Status const added = launch(add_spans, portable::ceil_div(p.batch * p.tokens, portable::kThreads),
                              portable::kThreads, 0, stream, p, a.masks.query_tiles, a.spans, a.sums);
  if (added != kOk) return added;
  if (!p.dense) {
    Status const s = portable::loss_rows_if(p, stream, a.masks.redo);
    if (s != kOk) return s;
  }
  return portable::loss_mean(p, stream);
}

int64_t loss_backward_workspace(LossBackwardParams const& p) {
  Arena arena{nullptr};
  PairLaunch pairs = take_pairs(p, arena);
  int64_t const flags = arena.floats;
  take_slopes(p, pairs, arena);
  return std::max(arena.floats, flags + portable::loss_backward_workspace(p));
}

Status indexer_loss_backward(LossBackwardParams const& p, float* workspace, void* stream) {
  Arena arena{workspace};
  PairLaunch pairs = take_pairs(p, arena);
  float* const rest = workspace + arena.floats;
  SlopeLaunch const slopes = take_slopes(p, pairs, arena);
  if (Status const s = make_pairs(pairs, stream); s != kOk) return s;
  int64_t const heads = slopes.groups * heads_together(p), tokens = pairs.masks.query_tiles * kTile;
  Status const copied =
      launch(copy_weights, portable::ceil_div(p.batch * heads * tokens, portable::kThreads),
             portable::kThreads, 0, stream, p, heads, tokens, const_cast<float*>(slopes.weights));
  if (copied != kOk) return copied;
  int64_t const band = band_of(pairs);
  Status const done = p.dtype == Dtype::kFloat16
                          ? launch_gradients<Dtype::kFloat16>(pairs, slopes, band, stream)
                          : launch_gradients<Dtype::kBFloat16>(pairs, slopes, band, stream);
  return done != kOk ? done : portable::loss_backward_if(p, rest, stream, pairs.masks.redo);
}

}  // namespace lt2::dsa::sm90
