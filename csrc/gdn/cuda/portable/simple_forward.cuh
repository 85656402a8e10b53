// The outputs of linear attention with a scalar decay, for operands of 2 bytes, with mma.sync: any GPU since
// sm_80. With G the inclusive sums of the log decays in a chunk of 64 tokens and E_ij = e^(G_i - G_j) for i
// >= j:
//   O = scale (e^G Q S + (E o Q K^T) diag(beta) V)      S <- e^G_last S + K^T diag(e^(G_last - G) beta) V
// No exponent is positive. A block walks the chunks of a segment with its state in registers: a warp has 16
// kTiles value columns of it, transposed, so that it is the first operand of Q S straight from the
// accumulators. The scores of a chunk are made by four warps of 16 rows each, and shared.
#pragma once

#include "gdn/cuda/portable/simple_tile.cuh"

namespace lt2::gdn::portable {

template <class T, int kKeys, int kTiles>
struct OutputsShared {
  static constexpr int kValues = kSimpleWarps * 16 * kTiles;
  struct Stage {
    SimpleTile<T, kChunk, kKeys> q, k;
    SimpleTile<T, kChunk, kValues> v;  // and o, in the place of what has been read
  } stages[2];
  SimpleTile<T, kChunk, kChunk> scores;
  struct alignas(16) Decays {
    float log2_sum[kChunk], beta[kChunk];  // scale beta
    float in[kChunk], out[kChunk];         // scale e^G and e^(G_last - G) beta
    float chunk;
  } decays[2];
  RawGates gates;
};

// E o Q K^T diag(beta), where beta has the scale, rows 16 warp .. of the chunk.
template <class T, int kKeys>
__device__ __forceinline__ void make_scores(SimpleTile<T, kChunk, kChunk>& scores,
                                            SimpleTile<T, kChunk, kKeys> const& q,
                                            SimpleTile<T, kChunk, kKeys> const& k, float const* log2_sum,
                                            float const* beta, int warp, int lane) {
  float products[kChunk / 8][4] = {};
#pragma unroll
  for (int c = 0; c < kKeys / 16; ++c) {
    uint32_t a[4];
    q.first(a, warp, c, lane);
#pragma unroll
    for (int n = 0; n < kChunk / 8; n += 2) {
      if (n > 2 * warp) continue;
      uint32_t b[4];
      k.second_transposed(b, n, c, lane);
      mma<T>(products[n], a, b[0], b[1]);
      mma<T>(products[n + 1], a, b[2], b[3]);
    }
  }
  int const t = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    if (n > 2 * warp + 1) continue;
    int const j = 8 * n + t;
    float2 const from = *reinterpret_cast<float2 const*>(log2_sum + j);
    float2 const b = *reinterpret_cast<float2 const*>(beta + j);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const i = 16 * warp + 8 * half + lane / 4;
      float const to = log2_sum[i];
      float const* const x = &products[n][2 * half];
      *reinterpret_cast<uint32_t*>(scores.at(i, j)) =
          pack<T>(j <= i ? exp2_fast(to - from.x) * b.x * x[0] : 0.f,
                  j + 1 <= i ? exp2_fast(to - from.y) * b.y * x[1] : 0.f);
    }
  }
}

// What a block walks.
template <class T>
struct OutputsUnit {
  T const *q, *k, *v;
  T* o;
  int64_t n, row, begin, length;
  int chunks, head;

  __device__ void set(ForwardParams const& p, SegmentPlan const& plan) {
    head = static_cast<int>(blockIdx.x % p.value_heads);
    int const key_head = head / (p.value_heads / p.heads);
    Segment const s = find_segment(p, plan.size, blockIdx.x / p.value_heads);
    n = s.n, row = s.row, begin = s.begin, length = s.length;
    chunks = static_cast<int>(ceil_div(length, kChunk));
    q = token_row<T const>(p.q, row, begin, key_head);
    k = token_row<T const>(p.k, row, begin, key_head);
    v = token_row<T const>(p.v, row, begin, head);
    o = token_row<T>(p.o, row, begin, head);
  }
};

// Block (segment, value head).
template <class T, int kKeys, int kTiles>
__global__ void __launch_bounds__(kSimpleThreads, 2)
    scan_outputs(__grid_constant__ ForwardParams const p, __grid_constant__ SegmentPlan const plan,
                 bool whole_rows) {
  using Shared = OutputsShared<T, kKeys, kTiles>;
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  __shared__ OutputsUnit<T> unit;  // and not in registers, of which there are none to spare
  if (threadIdx.x == 0) unit.set(p, plan);
  __syncthreads();
  bool const whole = plan.states == nullptr;
  if (!whole && unit.chunks == 0) return;
  auto const count = [&](int c) {
    return static_cast<int>(min(unit.length - int64_t{c} * kChunk, int64_t{kChunk}));
  };
  auto const load = [&](int c) {
    int64_t const token = int64_t{c} * kChunk;
    typename Shared::Stage& stage = shared.stages[c % 2];
    stage.q.copy(unit.q + token * p.q.token, p.q.token, count(c), p.key_dim, whole_rows);
    stage.k.copy(unit.k + token * p.k.token, p.k.token, count(c), p.key_dim, whole_rows);
    stage.v.copy(unit.v + token * p.v.token, p.v.token, count(c), p.value_dim, whole_rows);
    if (threadIdx.x < kWarp) shared.gates.copy(p, unit.row, unit.begin + token, count(c), unit.head);
  };
  auto const prepare = [&](int c) {
    wait_copies();
    int const lane = threadIdx.x;
    ChunkDecays const d(p, shared.gates, count(c), unit.head, lane);
    typename Shared::Decays& decays = shared.decays[c % 2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int const i = lane + h * kWarp;
      decays.log2_sum[i] = d.log2_sum[h];
      decays.beta[i] = p.scale * d.beta[h];
      decays.in[i] = p.scale * exp2_fast(d.log2_sum[h]);
      decays.out[i] = exp2_fast(d.log2_last - d.log2_sum[h]) * d.beta[h];
    }
    if (lane == 0) decays.chunk = exp2_fast(d.log2_last);
  };

  SimpleState<T, kKeys, kTiles> state;
  int const lane = threadIdx.x % kWarp, first_column = threadIdx.x / kWarp * 16 * kTiles;
  auto const of_sequence = [&](float* data) {
    return dense_state(data, unit.n * p.value_heads + unit.head, p.key_dim, p.value_dim, p.state_v_first);
  };
  if (!whole) {
    state.load(p, dense_state(plan.states, blockIdx.x, p.key_dim, p.value_dim, true), first_column, lane);
  } else if (p.initial_state != nullptr) {
    state.load(p, of_sequence(const_cast<float*>(p.initial_state)), first_column, lane);
  }
  if (unit.chunks > 0) {
    load(0);
    if (threadIdx.x < kWarp) prepare(0);
  }
  for (int c = 0; c < unit.chunks; ++c) {
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(c), "+r"(thread));  // what follows is cheaper to compute again than to keep
    int const warp = thread / kWarp, lane = thread % kWarp, column = warp * 16 * kTiles;
    wait_copies();
    __syncthreads();  // chunk c is here, and nobody reads the other stage or the scores any more
    if (c + 1 < unit.chunks) load(c + 1);
    typename Shared::Stage& stage = shared.stages[c % 2];
    typename Shared::Decays const& decays = shared.decays[c % 2];
    make_scores(shared.scores, stage.q, stage.k, decays.log2_sum, decays.beta, warp, lane);
    __syncthreads();

    float o[kTiles][kChunk / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t a[kTiles][4];
      state.pack_first(a, k);
#pragma unroll
      for (int n = 0; n < kChunk / 8; n += 2) {
        uint32_t b[4];
        stage.q.second_transposed(b, n, k, lane);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma<T>(o[m][n], a[m], b[0], b[1]);
          mma<T>(o[m][n + 1], a[m], b[2], b[3]);
        }
      }
      if (kTiles > 1) __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
      float2 const in = *reinterpret_cast<float2 const*>(decays.in + 8 * n + 2 * (lane % 4));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] *= i % 2 == 0 ? in.x : in.y;
      }
    }
    state.decay(decays.chunk);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      uint32_t v[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) stage.v.first_transposed(v[m], warp * kTiles + m, k, lane);
#pragma unroll
      for (int n = 2 * k; n < kChunk / 8; n += 2) {
        uint32_t b[4];
        shared.scores.second_transposed(b, n, k, lane);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma<T>(o[m][n], v[m], b[0], b[1]);
          mma<T>(o[m][n + 1], v[m], b[2], b[3]);
        }
      }
      state.gain(stage.k, v, decays.out, k, lane);
      if (kTiles > 1) __syncwarp();
    }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float const* const pair = &o[m][n][2 * half];
          *reinterpret_cast<uint32_t*>(
              stage.v.at(8 * n + lane / 4, column + 16 * m + 8 * half + 2 * (lane % 4))) =
              transposed(pack<T>(pair[0], pair[1]));
        }
      }
    }
    __syncwarp();
    constexpr int kPieces = 2 * kTiles;
    T* const rows = unit.o + int64_t{c} * kChunk * p.o.token;
#pragma unroll
    for (int i = 0; i < kChunk; i += kWarp / kPieces) {
      int const row = i + lane / kPieces, value = column + lane % kPieces * 8;
      if (row < count(c) && value < p.value_dim) {
        *reinterpret_cast<uint4*>(rows + row * p.o.token + value) =
            *reinterpret_cast<uint4 const*>(stage.v.at(row, value));
      }
    }
    if (thread < kWarp && c + 1 < unit.chunks) prepare(c + 1);
  }
  if (whole && p.final_state != nullptr) state.store(p, of_sequence(p.final_state), first_column, lane);
}

}  // namespace lt2::gdn::portable
