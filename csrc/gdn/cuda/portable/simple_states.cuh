// The states of linear attention with a scalar decay, S <- e^g S + beta k v^T, and in reverse those of their
// gradients, dS <- e^g (dS + scale q dO^T): what a segment of the sequence leaves of nothing, the states that
// segments start from, and the states at the edges of chunks.
#pragma once

#include "gdn/cuda/portable/simple_tile.cuh"

namespace lt2::gdn::portable {

// One direction. A chunk gains the sum of weight x y^T over its tokens: with G the inclusive sums of the log
// decays, e^(G_last - G) beta k v^T, or in reverse scale e^G q dO^T. The decay of a chunk's first token,
// which all of the latter have, comes last: at e^-30 a weight of fp16 would be nothing.
struct StateScan {
  Strided x, y;  // [.., K], [.., V]
  bool reverse;
  float const* initial;  // of sequences, or null
  float* final;          // of sequences, or null
  SegmentPlan plan;
  void* edges;  // [chunk numbers, HV, kValues, kKeys] in T: the state before each chunk, in reverse after it
};

template <class T, int kKeys, int kTiles>
struct StatesShared {
  static constexpr int kValues = kSimpleWarps * 16 * kTiles;
  struct Stage {
    SimpleTile<T, kChunk, kKeys> x;
    SimpleTile<T, kChunk, kValues> y;
  } stages[2];
  SimpleTile<T, kValues, kKeys> edge;
  alignas(16) float weights[2][kChunk];
  float decays[2], first_decays[2];
  RawGates gates;
};

// What a block walks.
template <class T>
struct StatesUnit {
  T const *x, *y;
  int64_t n, row, begin, length, edge;
  int chunks, head;
  bool last;  // in the direction of the scan

  __device__ void set(Inputs const& p, StateScan const& scan) {
    head = static_cast<int>(blockIdx.x % p.value_heads);
    Segment const s = find_segment(p, scan.plan.size, blockIdx.x / p.value_heads);
    n = s.n, row = s.row, begin = s.begin, length = s.length;
    chunks = static_cast<int>(ceil_div(length, kChunk));
    last = scan.reverse ? s.offset == 0 : s.last;
    edge = first_chunk(p, n) + s.offset / kChunk;
    x = token_row<T const>(scan.x, row, begin, head / (p.value_heads / p.heads));
    y = token_row<T const>(scan.y, row, begin, head);
  }
};

// Block (segment, value head; direction). With edges null only what the segment leaves of nothing.
template <class T, int kKeys, int kTiles>
__global__ void __launch_bounds__(kSimpleThreads, 2)
    scan_states(__grid_constant__ Inputs const p, __grid_constant__ StateScan const forward,
                __grid_constant__ StateScan const backward, bool whole_rows) {
  using Shared = StatesShared<T, kKeys, kTiles>;
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  StateScan const& scan = blockIdx.y == 0 ? forward : backward;
  bool const reverse = scan.reverse, only_ends = scan.edges == nullptr;
  __shared__ StatesUnit<T> unit;  // and not in registers, of which there are none to spare
  if (threadIdx.x == 0) unit.set(p, scan);
  __syncthreads();
  bool const whole = scan.plan.states == nullptr;
  if ((!whole && unit.chunks == 0) || (only_ends && unit.last && scan.final == nullptr)) return;
  auto const index = [&](int step) { return reverse ? unit.chunks - 1 - step : step; };
  auto const count = [&](int c) {
    return static_cast<int>(min(unit.length - int64_t{c} * kChunk, int64_t{kChunk}));
  };
  auto const load = [&](int step) {
    int const c = index(step);
    int64_t const token = int64_t{c} * kChunk;
    typename Shared::Stage& stage = shared.stages[step % 2];
    stage.x.copy(unit.x + token * scan.x.token, scan.x.token, count(c), p.key_dim, whole_rows);
    stage.y.copy(unit.y + token * scan.y.token, scan.y.token, count(c), p.value_dim, whole_rows);
    if (threadIdx.x < kWarp) shared.gates.copy(p, unit.row, unit.begin + token, count(c), unit.head);
  };
  auto const prepare = [&](int step) {
    wait_copies();
    int const lane = threadIdx.x;
    ChunkDecays const d(p, shared.gates, count(index(step)), unit.head, lane);
    float const first = reverse ? __shfl_sync(0xffffffffu, d.log2_sum[0], 0) : 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      shared.weights[step % 2][lane + h * kWarp] = reverse
                                                       ? p.scale * exp2_fast(d.log2_sum[h] - first)
                                                       : d.beta[h] * exp2_fast(d.log2_last - d.log2_sum[h]);
    }
    if (lane == 0) {
      shared.decays[step % 2] = exp2_fast(d.log2_last - first);
      shared.first_decays[step % 2] = exp2_fast(first);
    }
  };

  SimpleState<T, kKeys, kTiles> state;
  int const lane = threadIdx.x % kWarp, first_column = threadIdx.x / kWarp * 16 * kTiles;
  auto const of_sequence = [&](float* data) {
    return dense_state(data, unit.n * p.value_heads + unit.head, p.key_dim, p.value_dim, p.state_v_first);
  };
  State const shared_with_join = dense_state(scan.plan.states, blockIdx.x, p.key_dim, p.value_dim, true);
  if (!only_ends && !whole) {
    state.load(p, shared_with_join, first_column, lane);
  } else if (!only_ends && scan.initial != nullptr) {
    state.load(p, of_sequence(const_cast<float*>(scan.initial)), first_column, lane);
  }
  if (unit.chunks > 0) {
    load(0);
    if (threadIdx.x < kWarp) prepare(0);
  }
  float through = 1.f;
  for (int step = 0; step < unit.chunks; ++step) {
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(step), "+r"(thread));  // what follows is cheaper to compute again than to keep
    int const warp = thread / kWarp, lane = thread % kWarp, column = warp * 16 * kTiles;
    wait_copies();
    __syncthreads();  // this chunk is here, and nobody reads the other stage any more
    if (step + 1 < unit.chunks) load(step + 1);
    typename Shared::Stage const& stage = shared.stages[step % 2];
    if (!only_ends) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            *reinterpret_cast<uint32_t*>(
                shared.edge.at(column + 16 * m + 8 * half + lane / 4, 8 * n + 2 * (lane % 4))) =
                pack<T>(state.s[m][n][2 * half], state.s[m][n][2 * half + 1]);
          }
        }
      }
      __syncwarp();
      constexpr int kPieces = kKeys / 8;
      T* const edge = static_cast<T*>(scan.edges) +
                      ((unit.edge + index(step)) * p.value_heads + unit.head) * Shared::kValues * kKeys;
#pragma unroll
      for (int i = 0; i < 16 * kTiles; i += kWarp / kPieces) {
        int const row = column + i + lane / kPieces, key = lane % kPieces * 8;
        *reinterpret_cast<uint4*>(edge + row * kKeys + key) =
            *reinterpret_cast<uint4 const*>(shared.edge.at(row, key));
      }
    }
    through *= shared.decays[step % 2] * shared.first_decays[step % 2];
    state.decay(shared.decays[step % 2]);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      uint32_t y[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) stage.y.first_transposed(y[m], warp * kTiles + m, k, lane);
      state.gain(stage.x, y, shared.weights[step % 2], k, lane);
    }
    if (reverse) state.decay(shared.first_decays[step % 2]);
    if (threadIdx.x < kWarp && step + 1 < unit.chunks) prepare(step + 1);
  }
  if (only_ends) {
    state.store(p, shared_with_join, first_column, lane);
    if (threadIdx.x == 0) scan.plan.decays[blockIdx.x] = through;
  } else if (whole && scan.final != nullptr) {
    state.store(p, of_sequence(scan.final), first_column, lane);
  }
}

inline constexpr int kJoinThreads = 128, kJoinPiece = 4, kJoinAhead = 8;

// Replaces what segments leave by what they start from. Block (sequence, value head; 128 pieces of a state;
// direction). What segments leave is read some segments ahead.
static __global__ void __launch_bounds__(kJoinThreads)
    join_segments(__grid_constant__ Inputs const p, __grid_constant__ StateScan const forward,
                  __grid_constant__ StateScan const backward) {
  StateScan const& scan = blockIdx.z == 0 ? forward : backward;
  int const size = p.key_dim * p.value_dim;
  int const e = (blockIdx.y * kJoinThreads + threadIdx.x) * kJoinPiece;
  if (e >= size) return;
  int64_t const n = blockIdx.x / p.value_heads, head = blockIdx.x % p.value_heads;
  int const segments = static_cast<int>(ceil_div(sequence(p, n).length, scan.plan.size));
  int const known = scan.final == nullptr ? segments - 1 : segments;
  int64_t const first = first_segment(p, scan.plan.size, n);
  auto const index = [&](int i) {
    return (first + (scan.reverse ? segments - 1 - i : i)) * p.value_heads + head;
  };
  auto const each_given = [&](float* data, auto const& f) {
    State const given = dense_state(data, blockIdx.x, p.key_dim, p.value_dim, p.state_v_first);
    float* const at = given.data + e / p.key_dim * given.value_stride + e % p.key_dim * given.key_stride;
#pragma unroll
    for (int c = 0; c < kJoinPiece; ++c) f(c, at + c * given.key_stride);
  };
  float state[kJoinPiece] = {};
  if (scan.initial != nullptr) {
    each_given(const_cast<float*>(scan.initial), [&](int c, float const* at) { state[c] = *at; });
  }
  for (int begin = 0; begin < segments; begin += kJoinAhead) {
    float4 left[kJoinAhead];
    float decay[kJoinAhead];
#pragma unroll
    for (int a = 0; a < kJoinAhead; ++a) {
      bool const present = begin + a < known;
      int64_t const at = present ? index(begin + a) : 0;
      left[a] =
          present ? *reinterpret_cast<float4 const*>(scan.plan.states + at * size + e) : float4{0, 0, 0, 0};
      decay[a] = present ? scan.plan.decays[at] : 0.f;
    }
#pragma unroll
    for (int a = 0; a < kJoinAhead; ++a) {
      if (begin + a >= segments) break;
      *reinterpret_cast<float4*>(scan.plan.states + index(begin + a) * size + e) =
          float4{state[0], state[1], state[2], state[3]};
      float const add[] = {left[a].x, left[a].y, left[a].z, left[a].w};
#pragma unroll
      for (int c = 0; c < kJoinPiece; ++c) state[c] = decay[a] * state[c] + add[c];
    }
  }
  if (scan.final != nullptr) {
    each_given(scan.final, [&](int c, float* at) { *at = state[c]; });
  }
}

}  // namespace lt2::gdn::portable
