// Row-wise kernels: a row of channels lies in the registers of a group of adjacent threads, and sums over
// rows are partial sums over fixed ranges of them, then one sum in order.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cuda/element.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/row.cuh"

namespace lt2::cuda {

inline constexpr int64_t kMaxRowChannels = 8192;

// Piece j of a thread is kVec channels of its group's row.
template <class T, int kVec_, int kGroup_, int kPer_>
struct RowGroup {
  static constexpr int kVec = kVec_, kGroup = kGroup_, kPer = kPer_;
  static constexpr int kThreads = kGroup < 128 ? 128 : kGroup, kGroups = kThreads / kGroup;
  using Row = RowOf<T, kVec>;

  __device__ static int channel(int j) {
    return (static_cast<int>(threadIdx.x % kGroup) + j * kGroup) * kVec;
  }
  // Number of this group, of all groups of the grid.
  __device__ static int64_t index() {
    return static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kGroup;
  }
  // Over the group; all threads of the block must call. `scratch` holds kThreads / 32 floats.
  __device__ static float sum(float x, float* scratch) {
    if constexpr (kGroup <= kWarp) return lane_sum<kGroup>(x);
    return block_sum<kThreads>(x, scratch);
  }
};

// kVec parameters of type float; 16-byte aligned if kVec > 1.
template <int kVec>
__device__ __forceinline__ void load_floats(float (&x)[kVec], float const* p) {
  if constexpr (kVec == 1) {
    x[0] = *p;
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      float4 const four = *reinterpret_cast<float4 const*>(p + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }
}

// A vector of parameters for all rows of a group: in registers, if there are few channels per thread.
template <class G>
struct GroupParameters {
  static constexpr bool kKept = G::kPer * G::kVec <= 8;
  float kept[kKept ? G::kPer : 1][G::kVec];
  float const* data;

  __device__ GroupParameters(float const* data, int64_t channels) : data(data) {
    if constexpr (kKept) {
#pragma unroll
      for (int j = 0; j < G::kPer; ++j) {
        if (data != nullptr && G::channel(j) < channels) load_floats(kept[j], data + G::channel(j));
      }
    }
  }
  __device__ void get(float (&x)[G::kVec], int j) const {
    if constexpr (kKept) {
#pragma unroll
      for (int e = 0; e < G::kVec; ++e) x[e] = kept[j][e];
    } else {
      load_floats(x, data + G::channel(j));
    }
  }
};

// f(RowGroup) for rows of up to kMaxRowChannels channels; `aligned`: all rows are, to 16 bytes.
template <class T, class F>
Status with_row_group(int64_t channels, bool aligned, F const& f) {
  constexpr int kVec = 16 / sizeof(T);
  if (!aligned || channels % kVec != 0) {
    if (channels <= 128) return f(RowGroup<T, 1, 128, 1>{});
    if (channels <= 2048) return f(RowGroup<T, 1, 512, 4>{});
    return f(RowGroup<T, 1, 512, 16>{});
  }
  int64_t const pieces = channels / kVec;
  if (pieces <= 16) return f(RowGroup<T, kVec, 16, 1>{});
  if (pieces <= 32) return f(RowGroup<T, kVec, 32, 1>{});
  if (pieces <= 128) return f(RowGroup<T, kVec, 128, 1>{});
  if (pieces <= 256) return f(RowGroup<T, kVec, 256, 1>{});
  if (pieces <= 512) return f(RowGroup<T, kVec, 512, 1>{});
  return f(RowGroup<T, kVec, 512, kMaxRowChannels / kVec / 512>{});
}

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

// Ranges of rows, one for each group of threads; a function of the shape alone.
struct GroupRanges {
  int64_t rows, per_range, count;

  GroupRanges(int64_t rows, int64_t channels) : rows(rows) {
    constexpr int64_t kThreads = 1 << 17, kFewestRows = 4, kChannelsOfThread = 8;
    int64_t const most =
        std::max<int64_t>(1, kThreads * kChannelsOfThread / std::max<int64_t>(channels, 128));
    per_range = std::max(kFewestRows, (rows + most - 1) / most);
    count = (rows + per_range - 1) / per_range;
  }
};

// out(c) = the sum of partials [count, width] over the first axis, in order, for columns c of kWarp per
// block.
template <int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp)
    sum_partials(float const* partials, int64_t count, int64_t width, float* first, float* second,
                 int64_t channels) {
  __shared__ float sums[kWarps][kWarp];
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t const c = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.f;
  if (c < width) {
#pragma unroll 4
    for (int64_t i = warp; i < count; i += kWarps) sum += partials[i * width + c];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= width) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  (c < channels ? first[c] : second[c - channels]) = sum;
}

// first [channels], then second, out of partials [count, width].
inline Status launch_sum_partials(float const* partials, int64_t count, int64_t width, float* first,
                                  float* second, int64_t channels, void* stream) {
  constexpr int kWarps = 16;
  return launch(sum_partials<kWarps>, (width + kWarp - 1) / kWarp, kWarps * kWarp, 0, stream, partials, count,
                width, first, second, channels);
}

}  // namespace lt2::cuda
