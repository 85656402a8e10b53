// Gradients in one pass over x and dy, and the sums over tokens in a fixed order.
//
// With dz_t = dy_t silu'(z_t), z recomputed:
//   dx_u = sum_w weight[w] dz_{u + W - 1 - w},   dweight[w] = sum_t dz_t x_{t - W + 1 + w},   dbias = sum_t
//   dz_t.
// A thread has kVec channels of one chunk, plus the W - 1 tokens after it that see its inputs. Right-aligned
// taps make dx_u = sum_j weight[j] dz_{u + kTaps - 1 - j}: at token t it finishes dx of u = t - kTaps + 1.
// Before the first token of a sequence, u is an input in the initial state.
#pragma once

#include "causal_conv1d/cuda/portable/rows.cuh"

namespace lt2::causal_conv1d::portable {

template <class T, int kVec, int kTaps>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(__grid_constant__ BackwardParams const p, int size, float* partials) {
  constexpr int kTile = sizeof(T) == 2 ? 8 : 4, kPast = kTaps - 1;
  using Row = RowOf<T, kVec>;
  int64_t const channel = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kVec;
  if (channel >= p.channels) return;
  float* const partial = partials + int64_t{blockIdx.x} * (p.width + 1) * p.channels + channel;
  Chunk chunk;
  bool const exists = find_chunk(p, size, blockIdx.x, chunk);
  if (!exists || chunk.sequence < 0) {
    for (int w = 0; w <= p.width; ++w) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) partial[w * p.channels + c] = 0.f;
    }
    if (exists) zero_rows<T, kVec>(p.dx, chunk, channel);
    return;
  }

  Taps<kVec, kTaps> const taps(p.weight, p.bias, p.width, channel);
  Row x[kPast + kTile];
  float dz[kPast + kTile][kVec];
  float dweight[kTaps][kVec] = {}, dbias[kVec] = {};
#pragma unroll
  for (int j = 0; j < kPast; ++j) {
    bool const needed = j >= taps.first && chunk.begin < chunk.end;
    x[j] = needed ? input_row<T, kVec>(p, chunk, chunk.begin - kPast + j, channel) : Row::zero();
#pragma unroll
    for (int c = 0; c < kVec; ++c) dz[j][c] = 0.f;
  }
  bool const with_state = p.dinitial_state.data != nullptr && chunk.begin == chunk.first;
  // What dfinal_state adds to the gradient of input u.
  auto const from_final = [&](int64_t u, float (&sum)[kVec]) {
    int64_t const tap = u - (chunk.last - p.width);
    if (p.dfinal_state.data == nullptr || tap < 0) return;
    Row const more = load_tap<T, kVec>(p.dfinal_state, chunk.sequence, channel, tap);
#pragma unroll
    for (int c = 0; c < kVec; ++c) sum[c] += more.at(c);
  };
  auto const rounded = [](float const(&sum)[kVec]) {
    Row row;
#pragma unroll
    for (int c = 0; c < kVec; ++c) row[c] = from_float<T>(sum[c]);
    return row;
  };
  if (with_state) {  // the oldest input of the state is in no sum
    float sum[kVec] = {};
    from_final(chunk.first - p.width, sum);
    store_tap(p.dinitial_state, chunk.sequence, channel, 0, rounded(sum));
  }

  int64_t const seen_by = min(chunk.end + p.width - 1, chunk.last), end = chunk.end + kPast;
  for (int64_t t = chunk.begin; t < end; t += kTile) {
    Row dy[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      bool const inside = t + i < seen_by;
      x[kPast + i] = inside ? Row::load(token_row<T const>(p.x, chunk.row, t + i, channel)) : Row::zero();
      dy[i] = inside ? Row::load(token_row<T const>(p.dy, chunk.row, t + i, channel)) : Row::zero();
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      bool const inside = t + i < seen_by, own = t + i < chunk.end;
#pragma unroll
      for (int c = 0; c < kVec; ++c) {
        float d = dy[i].at(c);
        if (p.silu) {
          float const z = taps.convolve(x + i, c), s = fast_sigmoid(z);
          d *= s * fmaf(z, 1.f - s, 1.f);
        }
        dz[kPast + i][c] = inside ? d : 0.f;
        if (!own) continue;
        dbias[c] += d;
#pragma unroll
        for (int j = 0; j < kTaps; ++j) {
          if (j >= taps.first) dweight[j][c] = fmaf(d, x[i + j].at(c), dweight[j][c]);
        }
      }
      int64_t const u = t + i - kPast;
      bool const to_state = u < chunk.first;
      if (t + i >= end || (to_state ? !with_state || u <= chunk.first - p.width : u < chunk.begin)) continue;
      float sum[kVec] = {};
#pragma unroll
      for (int j = kTaps - 1; j >= 0; --j) {
#pragma unroll
        for (int c = 0; c < kVec; ++c) {
          if (j >= taps.first) sum[c] = fmaf(taps.weight[j][c], dz[kPast + i - j][c], sum[c]);
        }
      }
      from_final(u, sum);
      Row const row = rounded(sum);
      if (to_state) {
        store_tap(p.dinitial_state, chunk.sequence, channel, u - chunk.first + p.width, row);
      } else {
        row.store(token_row<T>(p.dx, chunk.row, u, channel));
      }
    }
#pragma unroll
    for (int j = 0; j < kPast; ++j) {
      x[j] = x[kTile + j];
#pragma unroll
      for (int c = 0; c < kVec; ++c) dz[j][c] = dz[kTile + j][c];
    }
  }
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      if (j >= taps.first) partial[(j - taps.first) * p.channels + c] = dweight[j][c];
    }
  }
#pragma unroll
  for (int c = 0; c < kVec; ++c) partial[p.width * p.channels + c] = dbias[c];
}

inline constexpr int kReduceWarps = 8;

// dweight[.., w] (dbias for w = W) of kWarp channels out of partials [chunks, W + 1, D]: a warp adds up every
// kReduceWarps-th of them in order, then the warps in order.
static __global__ void __launch_bounds__(kReduceWarps* kWarp)
    reduce_kernel(__grid_constant__ BackwardParams const p, float const* partials, int64_t chunks) {
  __shared__ float sums[kReduceWarps][kWarp];
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, w = blockIdx.y;
  int64_t const channel = int64_t{blockIdx.x} * kWarp + lane;
  float sum = 0.f;
  if (channel < p.channels) {
#pragma unroll 8
    for (int64_t i = warp; i < chunks; i += kReduceWarps) {
      sum += partials[(i * (p.width + 1) + w) * p.channels + channel];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || channel >= p.channels) return;
  for (int i = 1; i < kReduceWarps; ++i) sum += sums[i][lane];
  *(w == p.width ? p.dbias + channel : p.dweight + channel * p.width + w) = sum;
}

}  // namespace lt2::causal_conv1d::portable
