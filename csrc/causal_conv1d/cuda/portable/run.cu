#include <type_traits>

#include "causal_conv1d/cuda/portable/backward.cuh"
#include "causal_conv1d/cuda/portable/forward.cuh"

namespace lt2::causal_conv1d::portable {
namespace {

constexpr int kGradientVec =
    4;  // channels of a thread in the backward pass, which holds five numbers per tap
constexpr int64_t kMaxGridY = 65535;

// f(element, kVec) with kVec elements per access where `aligned` says so, else 1.
template <class F>
Status with_element(Dtype dtype, F const& f) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return f(Element<Dtype::kBFloat16>{});
    case Dtype::kFloat16:
      return f(Element<Dtype::kFloat16>{});
    default:
      return f(Element<Dtype::kFloat32>{});
  }
}

template <int kValue>
using Int = std::integral_constant<int, kValue>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens of a chunk: fewer where long ones would leave multiprocessors idle. A function of the shape alone,
// because the sums over tokens in the backward pass depend on it.
int chunk_tokens(Inputs const& p) {
  constexpr int kLongest = 64, kShortest = 16;
  constexpr int64_t kBlocks = 4 * 132;
  int64_t const per_token = p.batch * ceil_div(p.channels, kThreads * kGradientVec);
  int size = kLongest;
  while (size > kShortest && p.tokens / size * per_token < kBlocks) size /= 2;
  return size;
}

bool aligned(Tokens const& x, int64_t bytes, int64_t element) {
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && x.batch * element % bytes == 0 &&
         x.token * element % bytes == 0;
}

// f(kVec, kTaps): vectors of kVec channels where all rows allow it.
template <int kVec, class F>
Status with_shape(Inputs const& p, bool vectors, F const& f) {
  if (p.width > kFewTaps) return f(Int<1>{}, Int<kMaxWidth>{});
  if (vectors && p.channels % kVec == 0) return f(Int<kVec>{}, Int<kFewTaps>{});
  return f(Int<1>{}, Int<kFewTaps>{});
}

Status grid(int64_t blocks, int64_t channels, int per_block, dim3& grid) {
  int64_t const across = ceil_div(channels, per_block);
  if (blocks > INT32_MAX || across > kMaxGridY) return "too many tokens or channels for one launch";
  grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(across));
  return kOk;
}

}  // namespace

Status forward(ForwardParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kBytes = 16;
    bool const vectors = aligned(p.x, kBytes, sizeof(T)) && aligned(p.y, kBytes, sizeof(T));
    return with_shape<kBytes / sizeof(T)>(p, vectors, [&](auto vec, auto taps) {
      int const size = chunk_tokens(p);
      dim3 blocks;
      Status const fits = grid(chunk_numbers(p, size), p.channels, kThreads * vec, blocks);
      if (fits != kOk) return fits;
      return launch(forward_kernel<T, vec, taps>, blocks, kThreads, 0, stream, p, size);
    });
  });
}

int64_t backward_workspace(BackwardParams const& p) {
  return chunk_numbers(p, chunk_tokens(p)) * (p.width + 1) * p.channels;
}

Status backward(BackwardParams const& p, float* workspace, void* stream) {
  int const size = chunk_tokens(p);
  int64_t const chunks = chunk_numbers(p, size);
  Status const gradients = with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kBytes = kGradientVec * sizeof(T);
    bool const vectors = aligned(p.x, kBytes, sizeof(T)) && aligned(p.dy, kBytes, sizeof(T)) &&
                         aligned(p.dx, kBytes, sizeof(T));
    return with_shape<kGradientVec>(p, vectors, [&](auto vec, auto taps) {
      dim3 blocks;
      Status const fits = grid(chunks, p.channels, kThreads * vec, blocks);
      if (fits != kOk) return fits;
      return launch(backward_kernel<T, vec, taps>, blocks, kThreads, 0, stream, p, size, workspace);
    });
  });
  if (gradients != kOk) return gradients;
  dim3 const blocks(static_cast<unsigned>(ceil_div(p.channels, kWarp)), p.width + (p.dbias != nullptr));
  return launch(reduce_kernel, blocks, kReduceWarps * kWarp, 0, stream, p,
                static_cast<float const*>(workspace), chunks);
}

Status step(StepParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    dim3 blocks;
    Status const fits = grid(p.batch, p.channels, kThreads, blocks);
    if (fits != kOk) return fits;
    auto const run = [&](auto kernel) {
      return launch_overlapped(kernel, blocks, kThreads, 0, 1, stream, p);
    };
    return packed_windows<T>(p)  ? run(step_kernel<T, kFewTaps, true>)
           : p.width <= kFewTaps ? run(step_kernel<T, kFewTaps, false>)
                                 : run(step_kernel<T, kMaxWidth, false>);
  });
}

}  // namespace lt2::causal_conv1d::portable
