// Attention of new tokens to cached keys: a block per query, online softmax over tiles of kThreads keys.
#include "common/cuda/element.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "loop_state/cuda/portable/decode.h"
#include "loop_state/cuda/portable/sight.cuh"

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

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads) decode_query(DecodeParams const p) {
  __shared__ float q[kMaxKeyDim], weights[kThreads], scratch[kWarps];
  __shared__ int64_t keys[kThreads];  // of the tile, -1 for none
  int const query_head = static_cast<int>(blockIdx.x % p.query_heads),
            head = query_head / (p.query_heads / p.heads);
  int64_t const query = blockIdx.x, position = query / p.query_heads;  // of q [B, t, HQ, D], o [B, t, HQ, DV]
  int64_t const tokens = unit_tokens(p);
  Sight const sight(p, position / tokens);
  int64_t const visible = sight.keys - tokens + position % tokens + 1;
  int64_t const entries = visible <= 0 ? 0 : p.indices == nullptr ? visible : p.topk;

  float acc[kColumns] = {};
  float max = -INFINITY, total = 0.f;
  if (entries > 0) {
    T const* const k = cached<T>(p.k, sight, head);
    T const* const v = cached<T>(p.v, sight, head);
    for (int c = threadIdx.x; c < p.key_dim; c += kThreads) {
      q[c] = to_float(static_cast<T const*>(p.q)[query * p.key_dim + c]) * p.scale;
    }
    int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int64_t first = 0; first < entries; first += kThreads) {
      int const count = static_cast<int>(entries - first < kThreads ? entries - first : kThreads);
      __syncthreads();
      int64_t mine = first + threadIdx.x;
      if (p.indices != nullptr) mine = threadIdx.x < count ? p.indices[position * p.topk + mine] : -1;
      keys[threadIdx.x] = mine < visible ? mine : -1;
      __syncthreads();
      for (int j = warp; j < count; j += kWarps) {
        if (keys[j] < 0) continue;
        T const* const key = k + keys[j] * p.k.token;
        float dot = 0.f;
        for (int c = lane; c < p.key_dim; c += kWarp) dot += q[c] * to_float(key[c]);
        dot = lane_sum(dot);
        if (lane == 0) weights[j] = dot;
      }
      __syncthreads();
      float const score = keys[threadIdx.x] >= 0 ? weights[threadIdx.x] : -INFINITY;
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
        for (int j = 0; j < count; ++j) {
          if (keys[j] >= 0) sum += weights[j] * to_float(v[keys[j] * p.v.token + c]);
        }
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

int64_t decode_workspace(DecodeParams const& p) { return split_supports(p) ? split_workspace(p) : 0; }

Status decode(DecodeParams const& p, float* workspace, void* stream) {
  if (split_supports(p)) return split_decode(p, workspace, stream);
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return launch_decode<Element<Dtype::kBFloat16>>(p, stream);
    case Dtype::kFloat16:
      return launch_decode<Element<Dtype::kFloat16>>(p, stream);
    default:
      return launch_decode<Element<Dtype::kFloat32>>(p, stream);
  }
}

}  // namespace lt2::loop_state::portable
