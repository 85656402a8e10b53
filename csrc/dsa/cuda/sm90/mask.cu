#include "common/cuda/overlap.cuh"
#include "dsa/cuda/sm90/attention_launch.cuh"

namespace lt2::dsa::sm90 {
namespace {

// A block a query, also for those that fill up the last tile.
__global__ void __launch_bounds__(portable::kThreads)
    mask_kernel(AttentionParams const p, Masks const masks) {
  extern __shared__ uint4 bits[];  // [key tiles]
  if (portable::skipped(masks.condition)) return;
  auto* const words = reinterpret_cast<uint32_t*>(bits);
  int64_t const rows = masks.query_tiles * kTile, row = blockIdx.x / rows, token = blockIdx.x % rows;
  for (int i = threadIdx.x; i < masks.key_tiles; i += portable::kThreads) bits[i] = uint4{};
  __syncthreads();
  if (token < p.tokens) {
    portable::Sight const seen = portable::sight(p, row, token);
    int32_t const* const indices = portable::indices_of(p, row * p.tokens + token);
    for (int64_t i = threadIdx.x; i < p.topk; i += portable::kThreads) {
      int const key = portable::selected_key(p, indices, seen, i);
      if (key < 0) continue;
      uint32_t const bit = 1u << (key % kTile / 8 * 2 + key % 2);
      if (atomicOr(words + key / kTile * 4 + key % 8 / 2, bit) & bit) *masks.redo = 1;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < masks.key_tiles; i += portable::kThreads) {
    uint4 const x = bits[i];
    int64_t const tile = masks.tile(row, token / kTile, i);
    masks.bits[tile * kTile + token % kTile] = x;
    if ((x.x | x.y | x.z | x.w) != 0) masks.used[tile] = 1;
  }
}

}  // namespace

Status attention_supports(AttentionParams const& p) {
  if (p.dtype == Dtype::kFloat32) return "the Hopper kernels take bfloat16 and float16";
  if (p.dim != p.value_dim || (p.dim != 64 && p.dim != 128))
    return "the Hopper kernels take D = DV = 64 or 128";
  if (!(p.scale > 0.f)) return "the Hopper kernels take a positive scale";
  if (p.batch == 0 || p.keys == 0) return "the Hopper kernels take at least one key";
  if (!runs_sm90_code()) return "the Hopper kernels need compute capability 9.0";
  if (is_step(p)) return kOk;
  if (p.tokens > INT32_MAX - kTile || p.keys > INT32_MAX - kTile)
    return "the Hopper kernels take T and S up to 2^31 - 129";
  if (!p.dense && (p.tokens > kMaxTiles * kTile || p.keys > kMaxTiles * kTile))
    return "the Hopper kernels take T and S up to 2^17";
  if (!p.dense && !gathers(p) && !fits_masks(p)) return "the Hopper kernels take S up to 64 topk";
  for (TokenMajor const& x : {queries(p, p.q, p.dim), keys(p, p.k, p.dim), keys(p, p.v, p.dim)}) {
    if (!tma_compatible(x)) return "the Hopper kernels take q, k, v with strides of multiples of 8 elements";
  }
  return kOk;
}

Status clear(Flags const& flags, void* stream) {
  return status(cudaMemsetAsync(flags.redo, 0, 2 * sizeof(int), static_cast<cudaStream_t>(stream)));
}

Status make_masks(AttentionParams const& p, Masks const& masks, void* stream) {
  int64_t const tiles = p.batch * masks.query_tiles * masks.key_tiles;
  Status const cleared = status(cudaMemsetAsync(masks.used, 0, tiles, static_cast<cudaStream_t>(stream)));
  if (cleared != kOk) return cleared;
  return launch(mask_kernel, p.batch * masks.query_tiles * kTile, portable::kThreads,
                static_cast<int>(masks.key_tiles * sizeof(uint4)), stream, p, masks);
}

}  // namespace lt2::dsa::sm90
