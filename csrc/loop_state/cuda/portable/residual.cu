// out = h + rho h_in and RMSNorm of it: a block per row. Gradients of rho and weight: partial sums over fixed
// ranges of rows, then one sum in order, so they do not depend on scheduling.
#include <algorithm>

#include "common/cuda/element.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "loop_state/loop_state.h"

namespace lt2::loop_state::portable {
namespace {

using namespace ::lt2::cuda;

constexpr int kThreads = 256;
constexpr int64_t kMaxRanges = 512, kMinRangeRows = 8;

__host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t range_rows(Shape const& p) { return std::max(kMinRangeRows, ceil_div(p.rows, kMaxRanges)); }
int64_t range_count(Shape const& p) { return ceil_div(p.rows, range_rows(p)); }

template <class T>
__device__ float at(void const* x, int64_t i) {
  return to_float(static_cast<T const*>(x)[i]);
}
template <class T>
__device__ void put(void* x, int64_t i, float value) {
  static_cast<T*>(x)[i] = from_float<T>(value);
}

template <class T>
__global__ void __launch_bounds__(kThreads) residual_rows(ResidualParams const p) {
  for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
    int64_t const i = blockIdx.x * p.channels + c;
    put<T>(p.out, i, at<T>(p.h, i) + p.rho[c] * at<T>(p.h_in, i));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) residual_norm_rows(ResidualNormParams const p) {
  __shared__ float scratch[kThreads / kWarp];
  float squares = 0.f;
  for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
    int64_t const i = blockIdx.x * p.channels + c;
    put<T>(p.out, i, at<T>(p.h, i) + p.rho[c] * at<T>(p.h_in, i));
    float const rounded = at<T>(p.out, i);
    squares += rounded * rounded;
  }
  float const rstd = rsqrtf(block_sum<kThreads>(squares, scratch) / static_cast<float>(p.channels) + p.eps);
  if (threadIdx.x == 0) p.rstd[blockIdx.x] = rstd;
  for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
    int64_t const i = blockIdx.x * p.channels + c;
    put<T>(p.normed, i, at<T>(p.out, i) * rstd * p.weight[c]);
  }
}

// x^ = h_out rstd:  dh = dh_out + rstd (w dnormed - x^ mean), mean = mean(x^ w dnormed).
template <class T>
__device__ float norm_gradient(ResidualNormBackwardParams const& p, int64_t i, int64_t c, float rstd,
                               float mean) {
  float const unit = at<T>(p.h_out, i) * rstd;
  return at<T>(p.dh_out, i) + (at<T>(p.dnormed, i) * p.weight[c] - unit * mean) * rstd;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    residual_norm_backward_rows(ResidualNormBackwardParams const p, float* means) {
  __shared__ float scratch[kThreads / kWarp];
  float const rstd = p.rstd[blockIdx.x];
  float dots = 0.f;
  for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
    int64_t const i = blockIdx.x * p.channels + c;
    dots += at<T>(p.dnormed, i) * p.weight[c] * at<T>(p.h_out, i);
  }
  float const mean = block_sum<kThreads>(dots, scratch) * rstd / static_cast<float>(p.channels);
  if (threadIdx.x == 0) means[blockIdx.x] = mean;
  for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
    int64_t const i = blockIdx.x * p.channels + c;
    float const d = norm_gradient<T>(p, i, c, rstd, mean);
    put<T>(p.dh, i, d);
    put<T>(p.dh_in, i, d * p.rho[c]);
  }
}

// A block is one range of rows and kThreads channels.
struct Range {
  int64_t index, channel, begin, end;
};
__device__ Range range_of_block(Shape const& p, int64_t rows) {
  int64_t const columns = ceil_div(p.channels, kThreads), index = blockIdx.x / columns;
  int64_t const end = (index + 1) * rows;
  return {index, blockIdx.x % columns * kThreads + threadIdx.x, index * rows, end < p.rows ? end : p.rows};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    residual_backward_range(ResidualBackwardParams const p, int64_t rows, float* partials) {
  Range const range = range_of_block(p, rows);
  if (range.channel >= p.channels) return;
  float const rho = p.rho[range.channel];
  float drho = 0.f;
  for (int64_t r = range.begin; r < range.end; ++r) {
    int64_t const i = r * p.channels + range.channel;
    float const d = at<T>(p.dout, i);
    put<T>(p.dh_in, i, d * rho);
    drho += d * at<T>(p.h_in, i);
  }
  partials[range.index * p.channels + range.channel] = drho;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    residual_norm_backward_range(ResidualNormBackwardParams const p, int64_t rows, float const* means,
                                 float* partials) {
  Range const range = range_of_block(p, rows);
  if (range.channel >= p.channels) return;
  float drho = 0.f, dweight = 0.f;
  for (int64_t r = range.begin; r < range.end; ++r) {
    int64_t const i = r * p.channels + range.channel;
    float const rstd = p.rstd[r];
    drho += norm_gradient<T>(p, i, range.channel, rstd, means[r]) * at<T>(p.h_in, i);
    dweight += at<T>(p.dnormed, i) * (at<T>(p.h_out, i) * rstd);
  }
  float* const partial = partials + range.index * 2 * p.channels + range.channel;
  partial[0] = drho;
  partial[p.channels] = dweight;
}

// first, second [channels] = the sum of partials [count, channels or 2 channels].
__global__ void __launch_bounds__(kThreads)
    add_partials(float const* partials, int64_t count, int64_t channels, float* first, float* second) {
  int64_t const width = second == nullptr ? channels : 2 * channels;
  int64_t const c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= width) return;
  float sum = 0.f;
  for (int64_t i = 0; i < count; ++i) sum += partials[i * width + c];
  (c < channels ? first[c] : second[c - channels]) = sum;
}

template <class F>
Status with_element(Dtype dtype, F const& f) {
  return dtype == Dtype::kBFloat16 ? f(Element<Dtype::kBFloat16>{}) : f(Element<Dtype::kFloat32>{});
}

int64_t range_blocks(Shape const& p) { return range_count(p) * ceil_div(p.channels, kThreads); }

}  // namespace

int64_t residual_backward_workspace(ResidualBackwardParams const& p) { return range_count(p) * p.channels; }

int64_t residual_norm_backward_workspace(ResidualNormBackwardParams const& p) {
  return p.rows + range_count(p) * 2 * p.channels;
}

Status residual(ResidualParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    return launch(residual_rows<decltype(element)>, p.rows, kThreads, 0, stream, p);
  });
}

Status residual_norm(ResidualNormParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    return launch(residual_norm_rows<decltype(element)>, p.rows, kThreads, 0, stream, p);
  });
}

Status residual_backward(ResidualBackwardParams const& p, float* workspace, void* stream) {
  Status const ranges = with_element(p.dtype, [&](auto element) {
    return launch(residual_backward_range<decltype(element)>, range_blocks(p), kThreads, 0, stream, p,
                  range_rows(p), workspace);
  });
  if (ranges != kOk) return ranges;
  return launch(add_partials, ceil_div(p.channels, kThreads), kThreads, 0, stream, workspace, range_count(p),
                p.channels, p.drho, static_cast<float*>(nullptr));
}

Status residual_norm_backward(ResidualNormBackwardParams const& p, float* workspace, void* stream) {
  float *const means = workspace, *const partials = workspace + p.rows;
  Status const rows = with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    Status const gradients = launch(residual_norm_backward_rows<T>, p.rows, kThreads, 0, stream, p, means);
    if (gradients != kOk) return gradients;
    return launch(residual_norm_backward_range<T>, range_blocks(p), kThreads, 0, stream, p, range_rows(p),
                  means, partials);
  });
  if (rows != kOk) return rows;
  return launch(add_partials, ceil_div(2 * p.channels, kThreads), kThreads, 0, stream, partials,
                range_count(p), p.channels, p.drho, p.dweight);
}

}  // namespace lt2::loop_state::portable
