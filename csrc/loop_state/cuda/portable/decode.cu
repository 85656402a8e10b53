// Attention of new tokens to cached keys: a block per query, online softmax over tiles of kThreads keys.
#include "common/cuda/element.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "loop_state/loop_state.h"

namespace lt2::loop_state::portable {
namespace {

using namespace ::lt2::cuda;

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kMaxColumns = 4;  // value columns of one thread
constexpr int kMaxKeyDim = 1024;

// The larger one; NaN if either is.
__device__ float larger(float x, float y) { return y > x || isnan(y) ? y : x; }

__device__ float block_max(float x, float* scratch) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x = larger(x, __shfl_xor_sync(0xffffffffu, x, distance));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = larger(x, scratch[w]);
  return x;
}

// Keys of a row, 0 where there is nothing to read. Any value of lengths, slot_ids and loop_map is safe.
__device__ int64_t key_count(DecodeParams const& p, int64_t row, int64_t slot, int64_t loop) {
  if (slot < 0 || slot >= p.slots || loop < 0 || loop >= p.loops) return 0;
  int64_t const length = p.lengths_int64 ? static_cast<int64_t const*>(p.lengths)[row]
                                         : static_cast<int32_t const*>(p.lengths)[row];
  return length < 0 ? 0 : length < p.capacity ? length : p.capacity;
}

template <class T>
__device__ T const* cached(Cache const& cache, int64_t loop, int64_t slot, int head) {
  return static_cast<T const*>(cache.data) + loop * cache.loop + slot * cache.slot + head * cache.head;
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads) decode_query(DecodeParams const p) {
  __shared__ float q[kMaxKeyDim], weights[kThreads], scratch[kWarps];
  int const query_head = static_cast<int>(blockIdx.x % p.query_heads),
            head = query_head / (p.query_heads / p.heads);
  int64_t const token = blockIdx.x / p.query_heads % p.tokens, row = blockIdx.x / p.query_heads / p.tokens;
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
  int64_t const loop = p.loop_map == nullptr ? 0 : p.loop_map[row];
  int64_t const visible = key_count(p, row, slot, loop) - p.tokens + token + 1;
  int64_t const query = blockIdx.x;  // of q [B, t, HQ, D] and o [B, t, HQ, DV]

  float acc[kColumns] = {};
  float max = -INFINITY, total = 0.f;
  if (visible > 0) {
    T const* const k = cached<T>(p.k, loop, slot, head);
    T const* const v = cached<T>(p.v, loop, slot, head);
    for (int c = threadIdx.x; c < p.key_dim; c += kThreads) {
      q[c] = to_float(static_cast<T const*>(p.q)[query * p.key_dim + c]) * p.scale;
    }
    int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int64_t first = 0; first < visible; first += kThreads) {
      int const count = static_cast<int>(visible - first < kThreads ? visible - first : kThreads);
      __syncthreads();
      for (int j = warp; j < count; j += kWarps) {
        T const* const key = k + (first + j) * p.k.token;
        float dot = 0.f;
        for (int c = lane; c < p.key_dim; c += kWarp) dot += q[c] * to_float(key[c]);
        dot = lane_sum(dot);
        if (lane == 0) weights[j] = dot;
      }
      __syncthreads();
      float const score = threadIdx.x < count ? weights[threadIdx.x] : -INFINITY;
      float const tile_max = block_max(score, scratch);
      float const new_max = larger(max, tile_max);
      if (new_max == -INFINITY) continue;  // uniform: every thread has the same maximum
      float const decay = expf(max - new_max), weight = expf(score - new_max);
      weights[threadIdx.x] = weight;
      total = total * decay + block_sum<kThreads>(weight, scratch);
      max = new_max;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        int const c = i * kThreads + threadIdx.x;
        if (c >= p.value_dim) break;
        float sum = acc[i] * decay;
        for (int j = 0; j < count; ++j) sum += weights[j] * to_float(v[(first + j) * p.v.token + c]);
        acc[i] = sum;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    int const c = i * kThreads + threadIdx.x;
    if (c >= p.value_dim) break;
    static_cast<T*>(p.o)[query * p.value_dim + c] = from_float<T>(max == -INFINITY ? 0.f : acc[i] / total);
  }
}

template <class T>
Status launch_decode(DecodeParams const& p, void* stream) {
  int64_t const blocks = p.batch * p.tokens * p.query_heads;
  auto* const kernel = p.value_dim <= kThreads       ? decode_query<T, 1>
                       : p.value_dim <= 2 * kThreads ? decode_query<T, 2>
                                                     : decode_query<T, kMaxColumns>;
  return launch(kernel, blocks, kThreads, 0, stream, p);
}

}  // namespace

Status supports(DecodeParams const& p) {
  if (p.key_dim > kMaxKeyDim) return "q must have D <= 1024 on CUDA";
  if (p.value_dim > kMaxColumns * kThreads) return "v_cache must have DV <= 512 on CUDA";
  return kOk;
}

Status decode(DecodeParams const& p, void* stream) {
  return p.dtype == Dtype::kBFloat16 ? launch_decode<Element<Dtype::kBFloat16>>(p, stream)
                                     : launch_decode<Element<Dtype::kFloat32>>(p, stream);
}

}  // namespace lt2::loop_state::portable
