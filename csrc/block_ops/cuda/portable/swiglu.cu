// out = silu(gate) up and its gradients: a thread has some channels of one row.
#include "block_ops/cuda/portable/rows.cuh"

namespace lt2::block_ops::portable {
namespace {

constexpr int kMostThreads = 256;

template <class T, int kVec>
__global__ void __launch_bounds__(kMostThreads) swiglu_rows(SwigluParams const p) {
  int64_t const c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  if (c >= p.channels) return;
  using Row = RowOf<T, kVec>;
  int64_t const row = blockIdx.x;
  Row const gate = Row::load(row_of<T>(p.gate, row) + c), up = Row::load(row_of<T>(p.up, row) + c);
  Row out;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    float const g = gate.at(e);
    out[e] = from_float<T>(g * fast_sigmoid(g) * up.at(e));
  }
  out.store(row_of<T>(p.out, row, p.channels) + c);
}

// silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x).
template <class T, int kVec>
__global__ void __launch_bounds__(kMostThreads) swiglu_backward_rows(SwigluBackwardParams const p) {
  int64_t const c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  if (c >= p.channels) return;
  using Row = RowOf<T, kVec>;
  int64_t const row = blockIdx.x;
  Row const dout = Row::load(row_of<T>(p.dout, row) + c), gate = Row::load(row_of<T>(p.gate, row) + c),
            up = Row::load(row_of<T>(p.up, row) + c);
  Row dgate, dup;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    float const g = gate.at(e), s = fast_sigmoid(g), d = dout.at(e);
    dgate[e] = from_float<T>(d * up.at(e) * s * (1.f + g * (1.f - s)));
    dup[e] = from_float<T>(d * g * s);
  }
  dgate.store(row_of<T>(p.dgate, row, p.channels) + c);
  dup.store(row_of<T>(p.dup, row, p.channels) + c);
}

// kernel(vectors of 16 bytes or single channels), with a grid of rows and pieces of them.
template <class Params>
Status launch_rows(void (*vectors)(Params), void (*single)(Params), int vec, bool whole, Params const& p,
                   void* stream) {
  if (!whole || p.channels % vec != 0) vec = 1;
  int64_t const pieces = (p.channels + vec - 1) / vec;
  int const threads = static_cast<int>(std::min<int64_t>(kMostThreads, (pieces + kWarp - 1) / kWarp * kWarp));
  int64_t const across = threads == 0 ? 0 : (pieces + threads - 1) / threads;
  if (p.rows > INT32_MAX || across > 65535) return "too many rows or channels for one launch";
  dim3 const grid(static_cast<unsigned>(p.rows), static_cast<unsigned>(across));
  return launch(vec == 1 ? single : vectors, grid, threads, 0, stream, p);
}

}  // namespace

Status swiglu(SwigluParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVec = 16 / sizeof(T);
    bool const whole = aligned(p.dtype, p.gate) && aligned(p.dtype, p.up) && aligned(p.out);
    return launch_rows<SwigluParams>(swiglu_rows<T, kVec>, swiglu_rows<T, 1>, kVec, whole, p, stream);
  });
}

Status swiglu_backward(SwigluBackwardParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVec = 16 / sizeof(T);
    bool const whole = aligned(p.dtype, p.dout) && aligned(p.dtype, p.gate) && aligned(p.dtype, p.up) &&
                       aligned(p.dgate) && aligned(p.dup);
    return launch_rows<SwigluBackwardParams>(swiglu_backward_rows<T, kVec>, swiglu_backward_rows<T, 1>, kVec,
                                             whole, p, stream);
  });
}

}  // namespace lt2::block_ops::portable
