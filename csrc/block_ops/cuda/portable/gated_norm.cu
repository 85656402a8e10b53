// out = o rstd weight silu(z) and its gradients; see row_groups.cuh for who has which channels.
#include "block_ops/cuda/portable/rows.cuh"

namespace lt2::block_ops::portable {
namespace {

template <class T, class G>
__global__ void __launch_bounds__(G::kThreads) gated_norm_rows(GatedNormParams const p) {
  __shared__ float scratch[G::kThreads / kWarp];
  int64_t const row = G::index();
  bool const live = row < p.rows;
  typename G::Row o[G::kPer], z[G::kPer];
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < G::kPer; ++j) {
    int const c = G::channel(j);
    if (!live || c >= p.channels) continue;
    o[j] = G::Row::load(row_of<T>(p.o, row) + c);
    z[j] = G::Row::load(row_of<T>(p.z, row) + c);
#pragma unroll
    for (int e = 0; e < G::kVec; ++e) squares = fmaf(o[j].at(e), o[j].at(e), squares);
  }
  float const rstd = rsqrtf(G::sum(squares, scratch) / static_cast<float>(p.channels) + p.eps);
  if (live && threadIdx.x % G::kGroup == 0) p.rstd[row] = rstd;
#pragma unroll
  for (int j = 0; j < G::kPer; ++j) {
    int const c = G::channel(j);
    if (!live || c >= p.channels) continue;
    float weight[G::kVec];
    load_floats(weight, p.weight + c);
    typename G::Row out;
#pragma unroll
    for (int e = 0; e < G::kVec; ++e) {
      float const gate = z[j].at(e);
      out[e] = from_float<T>(o[j].at(e) * rstd * weight[e] * (gate * fast_sigmoid(gate)));
    }
    out.store(row_of<T>(p.out, row, p.channels) + c);
  }
}

// With n = dout silu(z) and o^ = o rstd:  do = rstd (w n - o^ mean(o^ w n)), dz = dout o^ w silu'(z). A group
// goes through a range of rows; partials [ranges, dweight].
template <class T, class G>
__global__ void __launch_bounds__(G::kThreads)
    gated_norm_backward_range(GatedNormBackwardParams const p, int64_t per_range, int64_t ranges,
                              float* partials) {
  __shared__ float scratch[G::kThreads / kWarp];
  int64_t const range = G::index();
  GroupParameters<G> const weights(p.weight, p.channels);
  float dweight[G::kPer][G::kVec] = {};
  for (int64_t i = 0; i < per_range; ++i) {
    int64_t const row = range * per_range + i;
    bool const live = row < p.rows;
    typename G::Row o[G::kPer], dz[G::kPer];
    float dnormed[G::kPer][G::kVec];
    float const rstd = live ? p.rstd[row] : 0.f;
    float dots = 0.f;
#pragma unroll
    for (int j = 0; j < G::kPer; ++j) {
      int const c = G::channel(j);
      if (!live || c >= p.channels) continue;
      o[j] = G::Row::load(row_of<T>(p.o, row) + c);
      typename G::Row const z = G::Row::load(row_of<T>(p.z, row) + c),
                            dout = G::Row::load(row_of<T>(p.dout, row) + c);
      float weight[G::kVec];
      weights.get(weight, j);
#pragma unroll
      for (int e = 0; e < G::kVec; ++e) {
        float const gate = z.at(e), s = fast_sigmoid(gate), weighted = o[j].at(e) * weight[e];
        dnormed[j][e] = dout.at(e) * gate * s;
        dz[j][e] = from_float<T>(dout.at(e) * weighted * rstd * s * (1.f + gate * (1.f - s)));
        dots += dnormed[j][e] * weighted;
      }
    }
    float const mean = G::sum(dots, scratch) * rstd / static_cast<float>(p.channels);
#pragma unroll
    for (int j = 0; j < G::kPer; ++j) {
      int const c = G::channel(j);
      if (!live || c >= p.channels) continue;
      typename G::Row d_o;
      float weight[G::kVec];
      weights.get(weight, j);
#pragma unroll
      for (int e = 0; e < G::kVec; ++e) {
        float const unit = o[j].at(e) * rstd;
        d_o[e] = from_float<T>((dnormed[j][e] * weight[e] - unit * mean) * rstd);
        dweight[j][e] += dnormed[j][e] * unit;
      }
      d_o.store(row_of<T>(p.d_o, row, p.channels) + c);
      dz[j].store(row_of<T>(p.dz, row, p.channels) + c);
    }
  }
  if (range >= ranges) return;
#pragma unroll
  for (int j = 0; j < G::kPer; ++j) {
#pragma unroll
    for (int e = 0; e < G::kVec; ++e) {
      int const c = G::channel(j) + e;
      if (c < p.channels) partials[range * p.channels + c] = dweight[j][e];
    }
  }
}

}  // namespace

Status gated_norm_supports(Shape const& p) {
  return p.channels <= kMaxRowChannels ? kOk : "o must have D <= 8192 on CUDA";
}

Status gated_norm(GatedNormParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    bool const whole = aligned(p.dtype, p.o) && aligned(p.dtype, p.z) && aligned(p.out) && aligned(p.weight);
    return with_row_group<T>(p.channels, whole, [&](auto group) {
      using G = decltype(group);
      int64_t const blocks = (p.rows + G::kGroups - 1) / G::kGroups;
      return launch(gated_norm_rows<T, G>, blocks, G::kThreads, 0, stream, p);
    });
  });
}

int64_t gated_norm_backward_workspace(GatedNormBackwardParams const& p) {
  return GroupRanges(p.rows, p.channels).count * p.channels;
}

Status gated_norm_backward(GatedNormBackwardParams const& p, float* workspace, void* stream) {
  GroupRanges const ranges(p.rows, p.channels);
  Status const rows = with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    bool const whole = aligned(p.dtype, p.dout) && aligned(p.dtype, p.o) && aligned(p.dtype, p.z) &&
                       aligned(p.d_o) && aligned(p.dz) && aligned(p.weight);
    return with_row_group<T>(p.channels, whole, [&](auto group) {
      using G = decltype(group);
      int64_t const blocks = (ranges.count + G::kGroups - 1) / G::kGroups;
      return launch(gated_norm_backward_range<T, G>, blocks, G::kThreads, 0, stream, p, ranges.per_range,
                    ranges.count, workspace);
    });
  });
  if (rows != kOk) return rows;
  return launch_sum_partials(workspace, ranges.count, p.channels, p.dweight, nullptr, p.channels, stream);
}

}  // namespace lt2::block_ops::portable
