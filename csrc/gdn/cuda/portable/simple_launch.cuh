#pragma once

#include "common/cuda/launch.cuh"
#include "gdn/cuda/portable/gradients.cuh"
#include "gdn/cuda/portable/simple_forward.cuh"
#include "gdn/cuda/portable/simple_gradients.cuh"
#include "gdn/cuda/portable/simple_launch.h"
#include "gdn/cuda/portable/simple_states.cuh"
#include "gdn/cuda/portable/sizes.cuh"

namespace lt2::gdn::portable {

// f<kKeys, kTiles> with the smallest kernels that hold the keys and the values.
template <class F>
Status with_simple_sizes(int key_dim, int value_dim, F const& f) {
  using std::integral_constant;
  auto const with_tiles = [&](auto keys) {
    if (value_dim <= 64) return f(keys, integral_constant<int, 1>{});
    return f(keys, integral_constant<int, 2>{});
  };
  if (key_dim <= 64) return with_tiles(integral_constant<int, 64>{});
  return with_tiles(integral_constant<int, 128>{});
}

// Scans in one or both directions; of segments first, where sequences are cut. Without edges only that.
template <class T, int kKeys, int kTiles>
Status launch_states(Inputs const& p, StateScan const& forward, StateScan const* backward, bool whole_rows,
                     void* stream) {
  StateScan const& other = backward == nullptr ? forward : *backward;
  unsigned const directions = backward == nullptr ? 1 : 2;
  int64_t const blocks = segment_numbers(p, forward.plan.size) * p.value_heads;
  if (blocks > INT32_MAX) return "too many sequences, heads and segments for one launch (2^31 - 1 blocks)";
  auto const scan = [&](StateScan const& a, StateScan const& b) {
    return launch(scan_states<T, kKeys, kTiles>, dim3(static_cast<unsigned>(blocks), directions),
                  kSimpleThreads, static_cast<int>(sizeof(StatesShared<T, kKeys, kTiles>)), stream, p, a, b,
                  whole_rows);
  };
  if (forward.plan.states != nullptr) {
    StateScan a = forward, b = other;
    a.edges = b.edges = nullptr;
    if (Status const ends = scan(a, b); ends != kOk) return ends;
    int64_t const size = int64_t{p.key_dim} * p.value_dim;
    Status const join =
        launch(join_segments,
               dim3(static_cast<unsigned>(p.sequences * p.value_heads),
                    static_cast<unsigned>(ceil_div(size, kJoinThreads * kJoinPiece)), directions),
               kJoinThreads, 0, stream, p, a, b);
    if (join != kOk) return join;
  }
  return forward.edges == nullptr ? kOk : scan(forward, other);
}

template <Dtype kDtype>
Status launch_simple_forward(ForwardParams const& p, float* workspace, void* stream) {
  using T = Element<kDtype>;
  SegmentPlan const plan = simple_plan(p, 1, workspace);
  bool const whole_rows = whole_pieces(p, p.o);
  return with_simple_sizes(p.key_dim, p.value_dim, [&](auto keys, auto tiles) {
    constexpr int kKeys = decltype(keys)::value, kTiles = decltype(tiles)::value;
    if (plan.states != nullptr) {
      StateScan const scan{p.k, p.v, false, p.initial_state, p.final_state, plan, nullptr};
      Status const states = launch_states<T, kKeys, kTiles>(p, scan, nullptr, whole_rows, stream);
      if (states != kOk) return states;
    }
    using Shared = OutputsShared<T, kKeys, kTiles>;
    return launch(scan_outputs<T, kKeys, kTiles>, segment_numbers(p, plan.size) * p.value_heads,
                  kSimpleThreads, static_cast<int>(sizeof(Shared)), stream, p, plan, whole_rows);
  });
}

template <Dtype kDtype>
Status launch_simple_backward(BackwardParams const& p, float* workspace, void* stream) {
  using T = Element<kDtype>;
  bool const whole_rows = whole_pieces(p, p.dout);
  int64_t const chunks = chunk_numbers(p), edges = simple_edge_floats(p);
  int64_t const rows = p.batch * p.tokens * p.value_heads * p.key_dim;
  auto const take = [&](int64_t floats) {
    float* const piece = workspace;
    workspace += floats;
    return piece;
  };
  GradientsWorkspace w{};
  void *const before = take(edges), *const after = take(edges);
  w.edges = before;
  w.dedges = after;
  bool const shared_keys = p.heads != p.value_heads;
  if (shared_keys) w.dq = take(rows), w.dk = take(rows);
  int64_t const plan_floats = simple_plan_floats(p, 2);
  StateScan const forward{p.k,   p.v, false, p.initial_state, nullptr, simple_plan(p, 2, take(plan_floats)),
                          before};
  StateScan const backward{
      p.q, p.dout, true, p.dfinal_state, p.dinitial_state, simple_plan(p, 2, take(plan_floats)), after};
  Status const gradients = with_simple_sizes(p.key_dim, p.value_dim, [&](auto keys, auto tiles) {
    constexpr int kKeys = decltype(keys)::value, kTiles = decltype(tiles)::value;
    Status const states = launch_states<T, kKeys, kTiles>(p, forward, &backward, whole_rows, stream);
    if (states != kOk) return states;
    return launch(simple_gradients<T, kKeys, kTiles>, chunks * p.value_heads, kSimpleThreads,
                  static_cast<int>(sizeof(GradientsShared<T, kKeys, kTiles>)), stream, p, w, whole_rows);
  });
  if (gradients != kOk) return gradients;
  if (shared_keys) {
    Workspace heads{};
    heads.dq = w.dq;
    heads.dk = w.dk;
    Status const sums = launch(gather_heads<T>, chunks * p.heads, kGradientThreads, 0, stream, p, heads);
    if (sums != kOk) return sums;
  }
  if (p.A_log == nullptr) return kOk;
  return launch(gate_gradients, p.sequences * p.value_heads, kGradientThreads, 0, stream, p);
}

}  // namespace lt2::gdn::portable
