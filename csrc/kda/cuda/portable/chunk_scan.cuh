// The chunks of a sequence one after the other:
//   W = V - K_in S      U = T~ W      O = Q_in S + P U      S <- Diag(decay) S + K_out^T U
// and without the delta rule U = V (the strengths are in P and K_out).
// Everything with S is transposed: rows are value columns, so that S stays in the registers as accumulators,
// and packed in pairs it is the first operand of the next product. W, U, T~, P and K_out are pairs of bf16 that
// add up to them: where keys repeat, sums over a chunk cancel.
#pragma once

#include "kda/cuda/portable/chunk_record.cuh"

namespace lt2::kda::portable {

inline constexpr int kWarpValues = 16;  // value columns of a warp
inline constexpr int kTokenTiles = kChunk / 8;

template <class T, int kKeys, int kValues>
struct alignas(128) ScanStage {
  ChunkRecord<T, kKeys> record;
  T v[kChunk][kValues + 8];  // and o, in the place of what has been read
};

// x [16 x 64] as pairs of fragments.
struct SplitRows {
  uint32_t high[kChunkSteps][4], low[kChunkSteps][4];

  __device__ __forceinline__ explicit SplitRows(float const (&x)[kTokenTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Split const s = split(x[n][2 * half], x[n][2 * half + 1]);
        high[n / 2][n % 2 * 2 + half] = s.high;
        low[n / 2][n % 2 * 2 + half] = s.low;
      }
    }
  }
};

// d += a m^T with a lower triangle m, for the tiles of 8 tokens that are wanted(n).
template <class F>
__device__ __forceinline__ void multiply_triangle(float (&d)[kTokenTiles][4], SplitRows const& a,
                                                  uint4 const (&m)[kTriangleBlocks][kWarp], F const& wanted) {
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kChunkSteps; ++k) {
#pragma unroll
    for (int n = 2 * k; n < kTokenTiles; ++n) {
      if (!wanted(n)) continue;
      uint4 const b = m[triangle_block(n, k)][lane];
      mma<__nv_bfloat16>(d[n], a.low[k], b.x, b.y);
      mma<__nv_bfloat16>(d[n], a.high[k], b.z, b.w);
      mma<__nv_bfloat16>(d[n], a.high[k], b.x, b.y);
    }
  }
}

// What the warps of a group hand to each other: of K_in S all tiles of 8 tokens, of Q_in S those of the other.
template <int kParts>
struct GroupSums {
  float4 of_part[kParts][kTokenTiles + kTokenTiles / kParts][kWarp];
};
template <>
struct GroupSums<1> {};

// A group of kParts warps has 16 columns of a state, transposed; a warp of them kKeys / kParts channels. The
// outputs of 64 tokens are divided up as well, so that each warp has as much of P U to do: with two parts the
// first has tiles 0, 1, 6, 7 of 8 tokens, the second 2, 3, 4, 5.
template <class T, int kKeys, int kParts>
struct ScanState {
  static constexpr int kChannels = kKeys / kParts, kTiles = kTokenTiles / kParts;
  float s[kChannels / 8][4] = {};
  int part;

  __device__ __forceinline__ static bool owns(int part, int tile) {
    return kParts == 1 || (tile >= 2 && tile < 6) == (part == 1);
  }
  // The n-th tile of a part.
  __device__ __forceinline__ static int tile_of(int part, int n) {
    if (kParts == 1) return n;
    return part == 1 ? n + 2 : n < 2 ? n : n + 4;
  }

  // f(element, where it is) for each of this lane's elements that a state of p has.
  template <class F>
  __device__ void each(Inputs const& p, State const& state, int column, F const& f) {
    int const lane = threadIdx.x % kWarp, value = column + lane / 4, key = part * kChannels + 2 * (lane % 4);
    float* at = state.data + value * state.value_stride + key * state.key_stride;
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * n + key + i % 2 < p.key_dim && value + i / 2 * 8 < p.value_dim) {
          f(s[n][i], at + i % 2 * state.key_stride + i / 2 * 8 * state.value_stride);
        }
      }
      at += 8 * state.key_stride;
      asm volatile("" : "+l"(at));
    }
  }

  // One chunk; its output replaces the warp's tokens and columns, from `column` on, of stage.v. `barrier` is
  // this group's.
  template <int kValues>
  __device__ __forceinline__ void advance(ScanStage<T, kKeys, kValues>& stage, int column, bool delta,
                                          GroupSums<kParts>& sums, int barrier) {
    ChunkRecord<T, kKeys> const& record = stage.record;
    int const lane = threadIdx.x % kWarp, t = 2 * (lane % 4);
    uint32_t v[kTokenTiles][2];
#pragma unroll
    for (int n = 0; n < kTokenTiles; n += 2) {
      uint32_t pair[4];
      load_matrices_transposed(
          pair, shared_address(&stage.v[8 * n + lane / 16 * 8 + lane % 8][column + lane / 8 % 2 * 8]));
#pragma unroll
      for (int i = 0; i < 4; ++i) v[n + i / 2][i % 2] = pair[i];
    }
    float x[kTokenTiles][4] = {}, o[kTokenTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kChannels / 16; ++k) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = pack<T>(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
      }
      if (delta) multiply(x, a, record.k_in, k);
      multiply(o, a, record.q_in, k);
    }
    if constexpr (kParts == 2) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        sums.of_part[part][n][lane] = {x[n][0], x[n][1], x[n][2], x[n][3]};
        if (!owns(part, n)) {
          int const slot = kTokenTiles + (part == 0 || n < 2 ? n - (part == 0 ? 2 : 0) : n - 4);
          sums.of_part[part][slot][lane] = {o[n][0], o[n][1], o[n][2], o[n][3]};
        }
      }
      asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
      auto const gather = [&](float (&to)[4], int slot) {
        float4 const other = sums.of_part[1 - part][slot][lane];
        to[0] += other.x, to[1] += other.y, to[2] += other.z, to[3] += other.w;
      };
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) gather(x[n], n);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        if (owns(part, n)) gather(o[n], kTokenTiles + (part == 1 ? n - 2 : n < 2 ? n : n - 4));
      }
    }

#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 const value = unpack<T>(v[n][half]);
        x[n][2 * half] = value.x - x[n][2 * half];
        x[n][2 * half + 1] = value.y - x[n][2 * half + 1];
      }
    }
    float u[kTokenTiles][4] = {};
    if (delta) {
      multiply_triangle(u, SplitRows(x), record.inverse, [](int) { return true; });
    } else {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) u[n][i] = x[n][i];
      }
    }
    SplitRows const writes(u);
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
      float2 const decay = *reinterpret_cast<float2 const*>(record.decay + part * kChannels + 8 * n + t);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= i % 2 == 0 ? decay.x : decay.y;
    }
    gain(record, writes);
    multiply_triangle(o, writes, record.scores, [&](int n) { return owns(part, n); });

#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (!owns(part, n)) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<uint32_t*>(&stage.v[8 * n + lane / 4][column + 8 * half + t]) =
            transposed(pack<T>(o[n][2 * half], o[n][2 * half + 1]));
      }
    }
    __syncwarp();
  }

 private:
  // x += a rows^T for the 16 channels of step k.
  __device__ __forceinline__ void multiply(float (&x)[kTokenTiles][4], uint32_t const (&a)[4], T const* rows,
                                           int k) const {
    int const lane = threadIdx.x % kWarp, channel = part * kChannels + 16 * k + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < kTokenTiles; n += 2) {
      uint32_t b[4];
      load_matrices(
          b, shared_address(rows + element_at<kKeys>(8 * n + lane / 16 * 8 + lane % 8, channel)));
      mma<T>(x[n], a, b[0], b[1]);
      mma<T>(x[n + 1], a, b[2], b[3]);
    }
  }

  // s += u K_out
  __device__ __forceinline__ void gain(ChunkRecord<T, kKeys> const& record, SplitRows const& u) {
    int const lane = threadIdx.x % kWarp, channel = part * kChannels + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kChunkSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kChannels / 8; n += 4) {
        uint32_t high[2][4], low[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int const at = element_at<kKeys>(16 * k + lane % 16, 8 * (n + 2 * i) + channel);
          load_matrices_transposed(high[i], shared_address(record.k_out[0] + at));
          load_matrices_transposed(low[i], shared_address(record.k_out[1] + at));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma<__nv_bfloat16>(s[n + i], u.low[k], high[i / 2][i % 2 * 2], high[i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma<__nv_bfloat16>(s[n + i], u.high[k], low[i / 2][i % 2 * 2], low[i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma<__nv_bfloat16>(s[n + i], u.high[k], high[i / 2][i % 2 * 2], high[i / 2][i % 2 * 2 + 1]);
      }
    }
  }
};

template <class T, int kKeys, int kGroups, int kParts>
struct ScanShared {
  static constexpr int kValues = kGroups * kWarpValues;
  ScanStage<T, kKeys, kValues> stages[2];
  GroupSums<kParts> sums[kParts == 1 ? 1 : kGroups];
};

// Block (slice of values, value head, sequence): kGroups groups of warps.
template <class T, int kKeys, int kGroups, int kParts>
__global__ void __launch_bounds__(kGroups* kParts* kWarp, 1)
    scan_chunks(__grid_constant__ ForwardParams const p, ChunkRecord<T, kKeys> const* records) {
  extern __shared__ __align__(128) char shared_bytes[];
  using Shared = ScanShared<T, kKeys, kGroups, kParts>;
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  constexpr int kThreads = kGroups * kParts * kWarp, kValues = Shared::kValues, kPieces = kValues / 8;
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = warp / kParts;
  int const slices = static_cast<int>(gdn::portable::ceil_div(p.value_dim, kValues));
  int64_t const n = blockIdx.x / slices / p.value_heads;
  int const head = static_cast<int>(blockIdx.x / slices % p.value_heads);
  int const first = static_cast<int>(blockIdx.x % slices) * kValues, column = group * kWarpValues;
  Sequence const sequence = gdn::portable::sequence(p, n);
  int const chunks = static_cast<int>(gdn::portable::ceil_div(sequence.length, kChunk));
  T const* v_rows = token_row<T const>(p.v, sequence.row, sequence.begin, head) + first;
  T* o_rows = token_row<T>(p.o, sequence.row, sequence.begin, head) + first;
  ChunkRecord<T, kKeys> const* record = records + first_chunk(p, n) * p.value_heads + head;
  int const values = p.value_dim - first;  // from here on
  auto const load = [&](int c) {
    auto& stage = shared.stages[c % 2];
    auto const* const from = reinterpret_cast<char const*>(record);
    auto* const to = reinterpret_cast<char*>(&stage.record);
    constexpr int kBytes = sizeof(ChunkRecord<T, kKeys>);
#pragma unroll 8
    for (int e = threadIdx.x * 16; e < kBytes; e += kThreads * 16) copy_16(to + e, from + e, true);
    int const count = static_cast<int>(min(sequence.length - int64_t{c} * kChunk, int64_t{kChunk}));
#pragma unroll
    for (int e = threadIdx.x; e < kChunk * kPieces; e += kThreads) {
      int const i = e / kPieces, value = e % kPieces * 8;
      bool const present = i < count && value < values;
      copy_16(&stage.v[i][value], present ? v_rows + i * p.v.token + value : v_rows, present);
    }
    record += p.value_heads;
    v_rows += kChunk * p.v.token;
  };

  if (chunks > 0) load(0);
  ScanState<T, kKeys, kParts> scan;
  scan.part = warp % kParts;
  auto const of_state = [&](float* data) {
    return gdn::portable::dense_state(data, n * p.value_heads + head, p.key_dim, p.value_dim,
                                      p.state_v_first);
  };
  if (p.initial_state != nullptr) {
    scan.each(p, of_state(const_cast<float*>(p.initial_state)), first + column,
              [](float& s, float const* at) { s = *at; });
  }
  for (int c = 0; c < chunks; ++c) {
    wait_copies();
    __syncthreads();  // chunk c is here, and nobody reads the other stage any more
    if (c + 1 < chunks) load(c + 1);
    if (column < values) {
      auto& stage = shared.stages[c % 2];
      scan.advance(stage, column, p.delta, shared.sums[kParts == 1 ? 0 : group], 1 + group);
      int const count = static_cast<int>(min(sequence.length - int64_t{c} * kChunk, int64_t{kChunk}));
#pragma unroll
      for (int e = 0; e < scan.kTiles / 2; ++e) {
        int const i = 8 * scan.tile_of(scan.part, 2 * e + lane / 16) + lane / 2 % 8;
        int const value = column + lane % 2 * 8;
        if (i < count && value < values) {
          *reinterpret_cast<uint4*>(o_rows + i * p.o.token + value) =
              *reinterpret_cast<uint4 const*>(&stage.v[i][value]);
        }
      }
    }
    o_rows += kChunk * p.o.token;
  }
  if (p.final_state == nullptr) return;
  scan.each(p, of_state(p.final_state), first + column, [](float s, float* at) { *at = s; });
}

}  // namespace lt2::kda::portable
