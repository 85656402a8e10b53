#include "dsa/cuda/sm90/attention_launch.cuh"

namespace lt2::dsa::sm90 {
namespace {

constexpr int kUnionThreads = 512, kUnionWarps = kUnionThreads / kWarp;

// A block a tile: marks the keys, ranks them, lists them, then sets each query's bits at the ranks of its
// keys.
__global__ void __launch_bounds__(kUnionThreads)
    union_kernel(AttentionParams const p, Unions const unions, int* redo) {
  extern __shared__ uint32_t marks[];  // [words], then ranks [words]
  __shared__ int warp_sums[kUnionWarps];
  int const words = static_cast<int>(portable::ceil_div(p.keys, kWarp)), thread = threadIdx.x;
  int const lane = thread % kWarp, warp = thread / kWarp;
  uint32_t* const ranks = marks + words;
  int64_t const tile = blockIdx.x, row = tile / unions.tiles, begin = tile % unions.tiles * unions.queries;
  auto const for_selected = [&](auto const& f) {
    for (int q = warp; q < unions.queries && begin + q < p.tokens; q += kUnionWarps) {
      portable::Sight const seen = portable::sight(p, row, begin + q);
      int32_t const* const indices = portable::indices_of(p, row * p.tokens + begin + q);
      for (int64_t i = lane; i < p.topk; i += kWarp) {
        int const key = portable::selected_key(p, indices, seen, i);
        if (key >= 0) f(q, key);
      }
    }
  };
  for (int i = thread; i < words; i += kUnionThreads) marks[i] = 0;
  __syncthreads();
  for_selected([&](int, int key) { atomicOr(marks + key / kWarp, 1u << (key % kWarp)); });
  __syncthreads();

  int const each = (words + kUnionThreads - 1) / kUnionThreads, first = thread * each;
  int const last = min(first + each, words);
  int own = 0;
  for (int i = first; i < last; ++i) own += __popc(marks[i]);
  int sum = own;
  for (int d = 1; d < kWarp; d *= 2) {
    int const before = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += before;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int rank = sum - own, size = 0;
  for (int w = 0; w < kUnionWarps; ++w) {
    if (w < warp) rank += warp_sums[w];
    size += warp_sums[w];
  }
  if (thread == 0) unions.sizes[tile] = size;
  int32_t* const keys = unions.keys + tile * unions.capacity;
  for (int i = first; i < last; ++i) {
    ranks[i] = rank;
    for (uint32_t left = marks[i]; left != 0; left &= left - 1) keys[rank++] = i * kWarp + __ffs(left) - 1;
  }
  uint4* const bits = unions.bits + unions.bits_of(tile, 0);
  for (int i = thread; i < (size + kTile - 1) / kTile * unions.queries; i += kUnionThreads) bits[i] = uint4{};
  __threadfence();
  __syncthreads();
  if (unions.words != nullptr) {
    for (int i = thread; i < words; i += kUnionThreads) unions.words[tile * words + i] = {marks[i], ranks[i]};
  }
  for_selected([&](int q, int key) {
    uint32_t const before = marks[key / kWarp] & ((1u << (key % kWarp)) - 1);
    int const at = static_cast<int>(ranks[key / kWarp]) + __popc(before), c = at % kTile;
    auto* const word = reinterpret_cast<uint32_t*>(bits + at / kTile * unions.queries + q) + c % 8 / 2;
    uint32_t const bit = 1u << (c / 8 * 2 + c % 2);
    if (atomicOr(word, bit) & bit) *redo = 1;
  });
}

}  // namespace

Status make_unions(AttentionParams const& p, Unions const& unions, int* redo, void* stream) {
  int const words = static_cast<int>(portable::ceil_div(p.keys, kWarp));
  return launch(union_kernel, p.batch * unions.tiles, kUnionThreads,
                static_cast<int>(2 * words * sizeof(uint32_t)), stream, p, unions, redo);
}

}  // namespace lt2::dsa::sm90
