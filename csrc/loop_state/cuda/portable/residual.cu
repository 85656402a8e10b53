// out = h + rho h_in and RMSNorm of it; see row_groups.cuh for who has which channels.
#include "common/cuda/row_groups.cuh"
#include "loop_state/loop_state.h"

namespace lt2::loop_state::portable {
namespace {

using namespace ::lt2::cuda;

template <class T>
__device__ T const* at(void const* x, int64_t i) {
  return static_cast<T const*>(x) + i;
}
template <class T>
__device__ T* at(void* x, int64_t i) {
  return static_cast<T*>(x) + i;
}

template <class T, class G, bool kGated, bool kNorm>
__global__ void __launch_bounds__(G::kThreads) residual_rows(ResidualNormParams const p) {
  __shared__ float scratch[G::kThreads / kWarp];
  int64_t const row = G::index();
  bool const live = row < p.rows;
  float x[G::kPer][G::kVec], squares = 0.f;
#pragma unroll
  for (int j = 0; j < G::kPer; ++j) {
    int const c = G::channel(j);
    if (!live || c >= p.channels) continue;
    int64_t const i = row * p.channels + c;
    auto const h = G::Row::load(at<T>(p.h, i)), h_in = G::Row::load(at<T>(p.h_in, i));
    float rho[G::kVec];
    if constexpr (kGated) load_floats(rho, p.rho + c);
    typename G::Row out;
#pragma unroll
    for (int e = 0; e < G::kVec; ++e) {
      out[e] = from_float<T>(h.at(e) + (kGated ? rho[e] * h_in.at(e) : h_in.at(e)));
      x[j][e] = out.at(e);
      squares = fmaf(x[j][e], x[j][e], squares);
    }
    out.store(at<T>(p.out, i));
  }
  if constexpr (kNorm) {
    float const rstd = rsqrtf(G::sum(squares, scratch) / static_cast<float>(p.channels) + p.eps);
    if (live && threadIdx.x % G::kGroup == 0) p.rstd[row] = rstd;
#pragma unroll
    for (int j = 0; j < G::kPer; ++j) {
      int const c = G::channel(j);
      if (!live || c >= p.channels) continue;
      float weight[G::kVec];
      load_floats(weight, p.weight + c);
      typename G::Row normed;
#pragma unroll
      for (int e = 0; e < G::kVec; ++e) normed[e] = from_float<T>(x[j][e] * rstd * weight[e]);
      normed.store(at<T>(p.normed, row * p.channels + c));
    }
  }
}

// x^ = h_out rstd:  dh = dh_out + rstd (w dnormed - x^ mean(x^ w dnormed)); without a norm dh = dh_out. A
// group goes through a range of rows; partials [ranges, dweight and drho].
template <class T, class G, bool kGated, bool kNorm>
__global__ void __launch_bounds__(G::kThreads)
    residual_backward_range(ResidualNormBackwardParams const p, int64_t per_range, int64_t ranges,
                            float* partials) {
  __shared__ float scratch[G::kThreads / kWarp];
  int64_t const range = G::index();
  GroupParameters<G> const rhos(kGated ? p.rho : nullptr, p.channels),
      weights(kNorm ? p.weight : nullptr, p.channels);
  float drho[G::kPer][G::kVec] = {}, dweight[G::kPer][G::kVec] = {};
  for (int64_t i = 0; i < per_range; ++i) {
    int64_t const row = range * per_range + i;
    bool const live = row < p.rows;
    typename G::Row dh_out[G::kPer], dnormed[G::kPer], h_out[G::kPer];
    float const rstd = kNorm && live ? p.rstd[row] : 0.f;
    float dots = 0.f;
#pragma unroll
    for (int j = 0; j < G::kPer; ++j) {
      int const c = G::channel(j);
      if (!live || c >= p.channels) continue;
      int64_t const at_row = row * p.channels + c;
      dh_out[j] = G::Row::load(at<T>(p.dh_out, at_row));
      if constexpr (kNorm) {
        dnormed[j] = G::Row::load(at<T>(p.dnormed, at_row));
        h_out[j] = G::Row::load(at<T>(p.h_out, at_row));
        float weight[G::kVec];
        weights.get(weight, j);
#pragma unroll
        for (int e = 0; e < G::kVec; ++e) dots += dnormed[j].at(e) * weight[e] * h_out[j].at(e);
      }
    }
    float mean = 0.f;
    if constexpr (kNorm) mean = G::sum(dots, scratch) * rstd / static_cast<float>(p.channels);
#pragma unroll
    for (int j = 0; j < G::kPer; ++j) {
      int const c = G::channel(j);
      if (!live || c >= p.channels) continue;
      typename G::Row dh, dh_in, h_in;
      if constexpr (kGated) h_in = G::Row::load(at<T>(p.h_in, row * p.channels + c));
      float rho[G::kVec], weight[G::kVec];
      if constexpr (kGated) rhos.get(rho, j);
      if constexpr (kNorm) weights.get(weight, j);
#pragma unroll
      for (int e = 0; e < G::kVec; ++e) {
        float d = dh_out[j].at(e);
        if constexpr (kNorm) {
          float const unit = h_out[j].at(e) * rstd;
          d += (dnormed[j].at(e) * weight[e] - unit * mean) * rstd;
          dweight[j][e] += dnormed[j].at(e) * unit;
          dh[e] = from_float<T>(d);
        }
        if constexpr (kGated) {
          dh_in[e] = from_float<T>(d * rho[e]);
          drho[j][e] += d * h_in.at(e);
        }
      }
      if constexpr (kNorm) dh.store(at<T>(p.dh, row * p.channels + c));
      if constexpr (kGated) dh_in.store(at<T>(p.dh_in, row * p.channels + c));
    }
  }
  if (range >= ranges) return;
  float* const partial = partials + range * (kGated + kNorm) * p.channels;
#pragma unroll
  for (int j = 0; j < G::kPer; ++j) {
#pragma unroll
    for (int e = 0; e < G::kVec; ++e) {
      int const c = G::channel(j) + e;
      if (c >= p.channels) continue;
      if constexpr (kNorm) partial[c] = dweight[j][e];
      if constexpr (kGated) partial[kNorm * p.channels + c] = drho[j][e];
    }
  }
}

// Contiguous rows begin at multiples of 16 bytes if the first one does and the channels fill whole pieces.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <bool kGated, bool kNorm>
Status forward(ResidualNormParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    bool const vectors = aligned(p.h, p.h_in, p.out, p.normed, p.rho, p.weight);
    return with_row_group<T>(p.channels, vectors, [&](auto group) {
      using G = decltype(group);
      int64_t const blocks = (p.rows + G::kGroups - 1) / G::kGroups;
      return launch(residual_rows<T, G, kGated, kNorm>, blocks, G::kThreads, 0, stream, p);
    });
  });
}

template <bool kGated, bool kNorm>
Status backward(ResidualNormBackwardParams const& p, float* workspace, void* stream) {
  GroupRanges const ranges(p.rows, p.channels);
  Status const rows = with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    bool const vectors = aligned(p.dh_out, p.dnormed, p.h_out, p.h_in, p.rho, p.weight, p.dh, p.dh_in);
    return with_row_group<T>(p.channels, vectors, [&](auto group) {
      using G = decltype(group);
      int64_t const blocks = (ranges.count + G::kGroups - 1) / G::kGroups;
      return launch(residual_backward_range<T, G, kGated, kNorm>, blocks, G::kThreads, 0, stream, p,
                    ranges.per_range, ranges.count, workspace);
    });
  });
  if (rows != kOk) return rows;
  return launch_sum_partials(workspace, ranges.count, (kGated + kNorm) * p.channels,
                             kNorm ? p.dweight : p.drho, p.drho, p.channels, stream);
}

}  // namespace

Status supports(Shape const& p) {
  return p.channels <= kMaxRowChannels ? kOk : "h must have D <= 8192 on CUDA";
}

int64_t residual_backward_workspace(ResidualBackwardParams const& p) {
  return GroupRanges(p.rows, p.channels).count * p.channels;
}

int64_t residual_norm_backward_workspace(ResidualNormBackwardParams const& p) {
  return GroupRanges(p.rows, p.channels).count * (p.rho == nullptr ? 1 : 2) * p.channels;
}

Status residual(ResidualParams const& p, void* stream) {
  ResidualNormParams all{};
  static_cast<ResidualParams&>(all) = p;
  return forward<true, false>(all, stream);
}

Status residual_norm(ResidualNormParams const& p, void* stream) {
  return p.rho == nullptr ? forward<false, true>(p, stream) : forward<true, true>(p, stream);
}

Status residual_backward(ResidualBackwardParams const& p, float* workspace, void* stream) {
  ResidualNormBackwardParams all{};
  static_cast<Shape&>(all) = p;
  all.dh_out = p.dout;
  all.h_in = p.h_in;
  all.rho = p.rho;
  all.dh_in = p.dh_in;
  all.drho = p.drho;
  return backward<true, false>(all, workspace, stream);
}

Status residual_norm_backward(ResidualNormBackwardParams const& p, float* workspace, void* stream) {
  return p.rho == nullptr ? backward<false, true>(p, workspace, stream)
                          : backward<true, true>(p, workspace, stream);
}

}  // namespace lt2::loop_state::portable
