#include "dsa/cuda/portable/lists.cuh"

namespace lt2::dsa::portable {
namespace {

constexpr int kScanThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    clear_counts(AttentionParams const p, Lists const lists, int const* condition) {
  if (skipped(condition)) return;
  int64_t const size = p.batch * lists.blocks * p.keys;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += int64_t{gridDim.x} * kThreads)
    lists.counts[i] = 0;
}

// Calls f(count, key, slot) for each key that the query selects, with the query's block's count of the key.
template <class F>
__device__ void for_selected(AttentionParams const& p, Lists const& lists, int64_t query, F const& f) {
  int64_t const row = query / p.tokens, token = query % p.tokens;
  Sight const seen = sight(p, row, token);
  int32_t const* const indices = indices_of(p, query);
  int32_t* const counts = lists.counts + (row * lists.blocks + token / lists.block) * p.keys;
  for (int64_t i = threadIdx.x; i < p.topk; i += kThreads) {
    int const key = selected_key(p, indices, seen, i);
    if (key >= 0) f(counts + key, key, i);
  }
}

__global__ void __launch_bounds__(kThreads)
    count_selected(AttentionParams const p, Lists const lists, int const* condition) {
  if (skipped(condition)) return;
  for (int64_t query = blockIdx.x; query < p.batch * p.tokens; query += gridDim.x) {
    for_selected(p, lists, query, [](int32_t* count, int, int64_t) { atomicAdd(count, 1); });
  }
}

// counts[block] <- the sum over the blocks before; starts[key + 1] <- the length of the key's list.
__global__ void __launch_bounds__(kThreads)
    scan_blocks(AttentionParams const p, Lists const lists, int const* condition) {
  if (skipped(condition)) return;
  int64_t const keys = p.batch * p.keys;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < keys;
       i += int64_t{gridDim.x} * kThreads) {
    int64_t const row = i / p.keys, key = i % p.keys;
    int32_t* count = lists.counts + row * lists.blocks * p.keys + key;
    int32_t sum = 0;
    for (int64_t b = 0; b < lists.blocks; ++b, count += p.keys) {
      int32_t const own = *count;
      *count = sum;
      sum += own;
    }
    lists.starts[row * (p.keys + 1) + key + 1] = sum;
  }
}

// starts <- their sums; a block a batch row.
__global__ void __launch_bounds__(kScanThreads)
    scan_keys(AttentionParams const p, Lists const lists, int const* condition) {
  __shared__ int64_t sums[kScanThreads / kWarp];
  if (skipped(condition)) return;
  int64_t* const starts = lists.starts + int64_t{blockIdx.x} * (p.keys + 1);
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t carry = 0;
  if (threadIdx.x == 0) starts[0] = 0;
  for (int64_t first = 0; first < p.keys; first += kScanThreads) {
    int64_t const key = first + threadIdx.x;
    int64_t x = key < p.keys ? starts[key + 1] : 0;
    for (int d = 1; d < kWarp; d *= 2) {
      int64_t const before = __shfl_up_sync(0xffffffffu, x, d);
      if (lane >= d) x += before;
    }
    if (lane == kWarp - 1) sums[warp] = x;
    __syncthreads();
    int64_t all = 0;
    for (int w = 0; w < kScanThreads / kWarp; ++w) {
      if (w == warp) x += carry + all;
      all += sums[w];
    }
    if (key < p.keys) starts[key + 1] = x;
    carry += all;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    fill_lists(AttentionParams const p, Lists const lists, int const* condition) {
  if (skipped(condition)) return;
  for (int64_t u = blockIdx.x; u < p.batch * lists.blocks; u += gridDim.x) {
    int64_t const row = u / lists.blocks, begin = u % lists.blocks * lists.block;
    int64_t const end = min(begin + lists.block, p.tokens);
    int64_t const* const starts = lists.starts + row * (p.keys + 1);
    int32_t* const queries = lists.queries + row * p.tokens * p.topk;
    for (int64_t token = begin; token < end; ++token) {
      for_selected(p, lists, row * p.tokens + token, [&](int32_t* count, int key, int64_t slot) {
        int64_t const entry = lists.slots ? token * p.topk + slot : token;
        queries[starts[key] + atomicAdd(count, 1)] = static_cast<int32_t>(entry);
      });
      __syncthreads();
    }
  }
}

}  // namespace

Status list_queries(AttentionParams const& p, Lists const& lists, void* stream, int const* condition) {
  int64_t const queries = p.batch * p.tokens, counts = p.batch * lists.blocks * p.keys;
  auto const run = [&](auto kernel, int64_t blocks) {
    return launch(kernel, grid(blocks, condition), kThreads, 0, stream, p, lists, condition);
  };
  if (Status const s = run(clear_counts, std::min(ceil_div(counts, kThreads), kBlocks)); s != kOk) return s;
  if (Status const s = run(count_selected, queries); s != kOk) return s;
  if (Status const s = run(scan_blocks, ceil_div(p.batch * p.keys, kThreads)); s != kOk) return s;
  Status const keys = launch(scan_keys, p.batch, kScanThreads, 0, stream, p, lists, condition);
  return keys != kOk ? keys : run(fill_lists, p.batch * lists.blocks);
}

}  // namespace lt2::dsa::portable
