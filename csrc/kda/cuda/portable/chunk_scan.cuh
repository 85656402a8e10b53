// The chunks of a sequence one after the other. Forward, without the delta rule U = V (the strengths are in P
// and K_out):
//   W = V - K_in S      U = T~ W      O = Q_in S + P U      S <- Diag(decay) S + K_out^T U
// The first scan of the backward pass keeps S before each chunk and R = (I + A diag(b))^-1 W (V), U = diag(b)
// R. The second goes from the last chunk to the first, with dS after a chunk:
//   dU = (I + diag(b) A)^-T (K_out dS + P^T dO)      dV = diag(b) dU
//   dS <- Diag(decay) dS + Q_in^T dO - K_in^T dV
// Everything with S is transposed: rows are value columns, so that S stays in the registers as accumulators,
// and packed in pairs it is the first operand of the next product. W, U, T~, P and K_out are pairs of bf16
// that add up to them: where keys repeat, sums over a chunk cancel.
#pragma once

#include <cstddef>

#include "kda/cuda/portable/chunk_record.cuh"

namespace lt2::kda::portable {

inline constexpr int kWarpValues = 16;  // value columns of a warp
inline constexpr int kTokenTiles = kChunk / 8;

template <class T, class Record, int kValues>
struct alignas(128) ScanStage {
  Record record;
  T v[kChunk][kValues + 8];  // or dO; then O or dV, in the place of what has been read
};

// x [16 x 64] as pairs of fragments.
struct SplitRows {
  uint32_t high[kChunkSteps][4], low[kChunkSteps][4];

  // Of bf16 the low parts are 0 at compile time.
  template <class T>
  __device__ __forceinline__ static SplitRows of(uint32_t const (&x)[kChunkSteps][4]) {
    SplitRows rows;
#pragma unroll
    for (int k = 0; k < kChunkSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, __nv_bfloat16>) {
          rows.high[k][i] = x[k][i];
          rows.low[k][i] = 0;
        } else {
          float2 const pair = unpack<T>(x[k][i]);
          Split const s = split(pair.x, pair.y);
          rows.high[k][i] = s.high;
          rows.low[k][i] = s.low;
        }
      }
    }
    return rows;
  }
  SplitRows() = default;
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

// d += a m^T with a triangle m, for the tiles of 8 tokens that are wanted(n). Four tiles at a time: the three
// products of one depend on each other.
template <bool kLower, class F>
__device__ __forceinline__ void multiply_triangle(float (&d)[kTokenTiles][4], SplitRows const& a,
                                                  Triangle const& m, F const& wanted) {
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < kChunkSteps; ++step) {
    int const k = kLower ? step : kChunkSteps - 1 - step;
#pragma unroll
    for (int first = 2 * step; first < kTokenTiles; first += 4) {
      uint4 b[4];
      auto const each = [&](auto const& f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int const tile = first + i, n = kLower ? tile : kTokenTiles - 1 - tile;
          if (tile < kTokenTiles && wanted(n)) f(i, tile, n);
        }
      };
      each([&](int i, int tile, int) { b[i] = m[triangle_block(tile, step)][lane]; });
      each([&](int i, int, int n) { mma<__nv_bfloat16>(d[n], a.low[k], b[i].x, b[i].y); });
      each([&](int i, int, int n) { mma<__nv_bfloat16>(d[n], a.high[k], b[i].z, b[i].w); });
      each([&](int i, int, int n) { mma<__nv_bfloat16>(d[n], a.high[k], b[i].x, b[i].y); });
    }
  }
}

__device__ __forceinline__ void clear(float (&x)[kTokenTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = 0.f;
  }
}

// What the warps of a group hand to each other: of K_in S all tiles of 8 tokens, of Q_in S those of the
// other.
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

  __device__ __forceinline__ static constexpr bool owns(int part, int tile) {
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

  __device__ void load(Inputs const& p, State const& state, int column) {
    each(p, state, column, [](float& x, float const* at) { x = *at; });
  }
  __device__ void store(Inputs const& p, State const& state, int column) {
    each(p, state, column, [](float x, float* at) { *at = x; });
  }

  // 16 columns of the rows of v, as fragments of their transpose.
  __device__ __forceinline__ static void load_values(uint32_t (&v)[kTokenTiles][2], T const* rows,
                                                     int pitch) {
    int const lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kTokenTiles; n += 2) {
      uint32_t pair[4];
      load_matrices_transposed(
          pair, shared_address(rows + (8 * n + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8));
#pragma unroll
      for (int i = 0; i < 4; ++i) v[n + i / 2][i % 2] = pair[i];
    }
  }

  // f(k, high, low): s of 16 channels as fragments, for each step k over this warp's channels.
  template <class R, class F>
  __device__ __forceinline__ void each_step(F const& f) const {
#pragma unroll
    for (int k = 0; k < kChannels / 16; ++k) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const* const pair = &s[2 * k + i / 2][i % 2 * 2];
        Split const x = split_as<R>(pair[0], pair[1]);
        high[i] = x.high;
        low[i] = x.low;
      }
      f(k, high, low);
    }
  }

  // x += a rows^T for the 16 channels of step k.
  template <class R>
  __device__ __forceinline__ void multiply(float (&x)[kTokenTiles][4], uint32_t const (&a)[4], R const* rows,
                                           int k) const {
    int const lane = threadIdx.x % kWarp, channel = part * kChannels + 16 * k + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < kTokenTiles; n += 2) {
      uint32_t b[4];
      load_matrices(b, shared_address(rows + element_at<kKeys>(8 * n + lane / 16 * 8 + lane % 8, channel)));
      mma<R>(x[n], a, b[0], b[1]);
      mma<R>(x[n + 1], a, b[2], b[3]);
    }
  }

  // Sums of the parts: all of x, and those tiles of o that this warp has.
  template <bool kOutput>
  __device__ __forceinline__ void add_parts(float (&x)[kTokenTiles][4], float (&o)[kTokenTiles][4],
                                            GroupSums<kParts>& sums, int barrier) const {
    if constexpr (kParts == 2) {
      int const lane = threadIdx.x % kWarp;
      auto const slot = [&](int owner, int n) {
        return kTokenTiles + (owner == 1 ? n - 2 : n < 2 ? n : n - 4);
      };
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        sums.of_part[part][n][lane] = {x[n][0], x[n][1], x[n][2], x[n][3]};
        if (kOutput && !owns(part, n)) {
          sums.of_part[part][slot(1 - part, n)][lane] = {o[n][0], o[n][1], o[n][2], o[n][3]};
        }
      }
      asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
      auto const gather = [&](float (&to)[4], int from) {
        float4 const other = sums.of_part[1 - part][from][lane];
        to[0] += other.x, to[1] += other.y, to[2] += other.z, to[3] += other.w;
      };
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        gather(x[n], n);
        if (kOutput && owns(part, n)) gather(o[n], slot(part, n));
      }
    }
  }

  __device__ __forceinline__ void decay_by(float const* decay) {
    int const first = part * kChannels + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
      float2 const d = *reinterpret_cast<float2 const*>(decay + first + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= i % 2 == 0 ? d.x : d.y;
    }
  }

  // s += a rows; a is [16 x 64] as fragments. Null: no low parts.
  template <class R, bool kLow, bool kLowRows>
  __device__ __forceinline__ void gain(uint32_t const (&a)[kChunkSteps][4],
                                       uint32_t const (&low)[kChunkSteps][4], R const* rows,
                                       R const* low_rows) {
    int const lane = threadIdx.x % kWarp, channel = part * kChannels + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kChunkSteps; ++k) {
#pragma unroll
      for (int n = 0; n < kChannels / 8; n += 4) {
        uint32_t b[2][4];
        auto const load = [&](R const* from) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            load_matrices_transposed(
                b[i],
                shared_address(from + element_at<kKeys>(16 * k + lane % 16, 8 * (n + 2 * i) + channel)));
          }
        };
        auto const add = [&](uint32_t const(&x)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) mma<R>(s[n + i], x, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
        };
        if constexpr (kLowRows) {
          load(low_rows);
          add(a[k]);
        }
        load(rows);
        if constexpr (kLow) add(low[k]);
        add(a[k]);
      }
    }
  }
};

// What a block scans.
template <class T, int kKeys, int kGroups, int kParts>
struct Scan {
  static constexpr int kThreads = kGroups * kParts * kWarp, kValues = kGroups * kWarpValues;
  static constexpr int kPieces = kValues / 8;  // of 16 bytes in a row of values
  Sequence sequence;
  int64_t n, first_record;
  int head, first, column;  // value columns from first on, the warp's from column on in the slice

  __device__ explicit Scan(Inputs const& p) {
    int const slices = static_cast<int>(gdn::portable::ceil_div(p.value_dim, kValues));
    n = blockIdx.x / slices / p.value_heads;
    head = static_cast<int>(blockIdx.x / slices % p.value_heads);
    first = static_cast<int>(blockIdx.x % slices) * kValues;
    column = static_cast<int>(threadIdx.x) / kWarp / kParts * kWarpValues;
    sequence = gdn::portable::sequence(p, n);
    first_record = first_chunk(p, n) * p.value_heads + head;
  }
  __device__ int chunks() const { return static_cast<int>(gdn::portable::ceil_div(sequence.length, kChunk)); }
  __device__ int count(int c) const {
    return static_cast<int>(min(sequence.length - int64_t{c} * kChunk, int64_t{kChunk}));
  }
  // Of chunk c, in arrays of chunk numbers times value heads.
  __device__ int64_t index(Inputs const& p, int c) const {
    return first_record + static_cast<int64_t>(c) * p.value_heads;
  }
  __device__ State state(Inputs const& p, float* data) const {
    return gdn::portable::dense_state(data, n * p.value_heads + head, p.key_dim, p.value_dim,
                                      p.state_v_first);
  }
  template <class E>
  __device__ E* rows(Strided const& x, int c) const {
    return token_row<E>(x, sequence.row, sequence.begin + int64_t{c} * kChunk, head) + first;
  }

  // Starts to copy bytes begin .. end - 1 of a record and the rows of values of chunk c. `whole`: rows are
  // made of aligned pieces of 16 bytes.
  template <class Stage, class Record>
  __device__ __forceinline__ void load(Stage& stage, Record const* records, int begin, int end,
                                       Inputs const& p, Strided const& values, int c, bool whole) const {
    char* const to = reinterpret_cast<char*>(&stage.record);
    char const* const from = reinterpret_cast<char const*>(records + index(p, c));
#pragma unroll 8
    for (int e = begin + static_cast<int>(threadIdx.x) * 16; e < end; e += kThreads * 16) {
      copy_16(to + e, from + e, true);
    }
    T const* const v_rows = rows<T const>(values, c);
    int const tokens = count(c);
    if (whole) {
#pragma unroll
      for (int e = threadIdx.x; e < kChunk * kPieces; e += kThreads) {
        int const i = e / kPieces, value = e % kPieces * 8;
        bool const present = i < tokens && first + value < p.value_dim;
        copy_16(&stage.v[i][value], present ? v_rows + i * values.token + value : v_rows, present);
      }
    } else {
#pragma unroll 1
      for (int e = threadIdx.x; e < kChunk * kValues; e += kThreads) {
        int const i = e / kValues, value = e % kValues;
        bool const present = i < tokens && first + value < p.value_dim;
        stage.v[i][value] = present ? v_rows[i * values.token + value] : from_float<T>(0.f);
      }
    }
  }

  // This warp's tokens and columns of x, in the place of stage.v and on to memory.
  template <class Stage>
  __device__ __forceinline__ void store(Stage& stage, float const (&x)[kTokenTiles][4], int part,
                                        Inputs const& p, Strided const& to, int c) const {
    using Warp = ScanState<T, kKeys, kParts>;
    int const lane = threadIdx.x % kWarp, tokens = count(c);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (!Warp::owns(part, n)) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<uint32_t*>(&stage.v[8 * n + lane / 4][column + 8 * half + 2 * (lane % 4)]) =
            transposed(pack<T>(x[n][2 * half], x[n][2 * half + 1]));
      }
    }
    __syncwarp();
    T* const to_rows = rows<T>(to, c);
#pragma unroll
    for (int e = 0; e < Warp::kTiles / 2; ++e) {
      int const i = 8 * Warp::tile_of(part, 2 * e + lane / 16) + lane / 2 % 8, value = column + lane % 2 * 8;
      if (i < tokens && first + value < p.value_dim) {
        *reinterpret_cast<uint4*>(to_rows + i * to.token + value) =
            *reinterpret_cast<uint4 const*>(&stage.v[i][value]);
      }
    }
  }

  // The same of fp32 rows [B, T, HV, V].
  __device__ __forceinline__ void keep(float const (&x)[kTokenTiles][4], int part, Inputs const& p, float* to,
                                       int c) const {
    int const lane = threadIdx.x % kWarp, tokens = count(c), value = first + column + lane / 4;
    int64_t const stride = static_cast<int64_t>(p.value_heads) * p.value_dim;
    int64_t const token = sequence.row * p.tokens + sequence.begin + int64_t{c} * kChunk;
    float* const to_rows = to + token * stride + head * p.value_dim + value;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      if (!ScanState<T, kKeys, kParts>::owns(part, n)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const row = 8 * n + 2 * (lane % 4) + i % 2;
        if (row < tokens && value + i / 2 * 8 < p.value_dim) to_rows[row * stride + i / 2 * 8] = x[n][i];
      }
    }
  }
};

// x[.., token] *= factor[token].
__device__ __forceinline__ void scale_tokens(float (&x)[kTokenTiles][4], float const* factor) {
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    float2 const f = *reinterpret_cast<float2 const*>(factor + 8 * n + 2 * (threadIdx.x % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] *= i % 2 == 0 ? f.x : f.y;
  }
}

template <class T, class Record, int kGroups, int kParts>
struct ScanShared {
  ScanStage<T, Record, kGroups * kWarpValues> stages[2];
  GroupSums<kParts> sums[kParts == 1 ? 1 : kGroups];
};

// Block (slice of values, value head, sequence). With a BackwardRecord it keeps residuals and the state
// before each chunk instead of o and the final state.
template <class T, int kKeys, class Record, int kGroups, int kParts>
__global__ void __launch_bounds__(kGroups * kParts * kWarp, 1)
    scan_chunks(__grid_constant__ Inputs const p, Strided const o, float* final_state, Workspace const w,
                Record const* records, bool whole) {
  extern __shared__ __align__(128) char shared_bytes[];
  constexpr bool kBackward = Record::kBackward;
  using Warp = ScanState<T, kKeys, kParts>;
  auto& shared = *reinterpret_cast<ScanShared<T, Record, kGroups, kParts>*>(shared_bytes);
  Scan<T, kKeys, kGroups, kParts> const scan(p);
  int const chunks = scan.chunks(), group = scan.column / kWarpValues;
  auto const load = [&](int c) {
    scan.load(shared.stages[c % 2], records, Record::begin(p.delta), Record::end(), p, p.v, c, whole);
  };
  if (chunks > 0) load(0);
  Warp state;
  int const part = state.part = static_cast<int>(threadIdx.x) / kWarp % kParts;
  if (p.initial_state != nullptr) {
    state.load(p, scan.state(p, const_cast<float*>(p.initial_state)), scan.first + scan.column);
  }
  for (int c = 0; c < chunks; ++c) {
    wait_copies();
    __syncthreads();  // chunk c is here, and nobody reads the other stage any more
    if (c + 1 < chunks) load(c + 1);
    if (scan.first + scan.column >= p.value_dim) continue;
    auto& stage = shared.stages[c % 2];
    Record const& record = stage.record;
    if constexpr (kBackward) {
      state.store(p, gdn::portable::dense_state(w.states, scan.index(p, c), p.key_dim, p.value_dim, false),
                  scan.first + scan.column);
    }
    uint32_t v[kTokenTiles][2];
    state.load_values(v, &stage.v[0][scan.column], kGroups * kWarpValues + 8);
    float x[kTokenTiles][4] = {}, out[kTokenTiles][4] = {};
    // What long keys erase is as large as what is there: the state as pairs.
    state.template each_step<T>([&](int k, uint32_t const(&a)[4], uint32_t const(&low)[4]) {
      if (p.delta) {
        state.multiply(x, low, record.k_in, k);
        state.multiply(x, a, record.k_in, k);
      }
      if constexpr (!kBackward) state.multiply(out, a, record.q_in, k);
    });
    state.template add_parts<!kBackward>(x, out, shared.sums[kParts == 1 ? 0 : group], 1 + group);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 const value = unpack<T>(v[n][half]);
        x[n][2 * half] = value.x - x[n][2 * half];
        x[n][2 * half + 1] = value.y - x[n][2 * half + 1];
      }
    }
    if (p.delta) {
      SplitRows const rows(x);
      clear(x);
      multiply_triangle<true>(x, rows, record.inverse, [](int) { return true; });
    }
    if constexpr (kBackward) {
      scan.keep(x, part, p, w.residuals, c);
      scale_tokens(x, record.strength);
    }
    SplitRows const writes(x);
    state.decay_by(record.decay);
    state.template gain<__nv_bfloat16, true, true>(writes.high, writes.low, record.k_out_high,
                                                   record.k_out_low);
    if constexpr (!kBackward) {
      if (part == 0) {  // tiles known at compile time leave no branches between products
        multiply_triangle<true>(out, writes, record.scores, [](int n) { return Warp::owns(0, n); });
      } else {
        multiply_triangle<true>(out, writes, record.scores, [](int n) { return Warp::owns(1, n); });
      }
      scan.store(stage, out, part, p, o, c);
    }
  }
  if (kBackward || final_state == nullptr) return;
  state.store(p, scan.state(p, final_state), scan.first + scan.column);
}

// The second scan of the backward pass.
template <class T, int kKeys, int kGroups, int kParts>
__global__ void __launch_bounds__(kGroups * kParts * kWarp, 1)
    scan_chunks_back(__grid_constant__ BackwardParams const p, Workspace const w,
                     BackwardRecord<T, kKeys> const* records, bool whole) {
  extern __shared__ __align__(128) char shared_bytes[];
  using Record = BackwardRecord<T, kKeys>;
  auto& shared = *reinterpret_cast<ScanShared<T, Record, kGroups, kParts>*>(shared_bytes);
  Scan<T, kKeys, kGroups, kParts> const scan(p);
  int const chunks = scan.chunks(), group = scan.column / kWarpValues;
  auto const load = [&](int c) {
    scan.load(shared.stages[c % 2], records, Record::second_begin(p.delta), Record::second_end(p.delta), p,
              p.dout, c, whole);
  };
  if (chunks > 0) load(chunks - 1);
  ScanState<T, kKeys, kParts> state;  // dS
  int const part = state.part = static_cast<int>(threadIdx.x) / kWarp % kParts;
  if (p.dfinal_state != nullptr) {
    state.load(p, scan.state(p, const_cast<float*>(p.dfinal_state)), scan.first + scan.column);
  }
  for (int c = chunks - 1; c >= 0; --c) {
    wait_copies();
    __syncthreads();  // chunk c is here, and nobody reads the other stage any more
    if (c > 0) load(c - 1);
    if (scan.first + scan.column >= p.value_dim) continue;
    auto& stage = shared.stages[c % 2];
    Record const& record = stage.record;
    state.store(p, gdn::portable::dense_state(w.dstates, scan.index(p, c), p.key_dim, p.value_dim, false),
                scan.first + scan.column);
    uint32_t dout[kTokenTiles][2];
    state.load_values(dout, &stage.v[0][scan.column], kGroups * kWarpValues + 8);
    float x[kTokenTiles][4] = {};
    // Erased directions of dS are small beside the others: pairs.
    state.template each_step<__nv_bfloat16>([&](int k, uint32_t const(&a)[4], uint32_t const(&low)[4]) {
      state.multiply(x, low, record.k_out_high, k);
      state.multiply(x, a, record.k_out_low, k);
      state.multiply(x, a, record.k_out_high, k);
    });
    state.template add_parts<false>(x, x, shared.sums[kParts == 1 ? 0 : group], 1 + group);
    uint32_t douts[kChunkSteps][4];
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) douts[n / 2][n % 2 * 2 + half] = dout[n][half];
    }
    multiply_triangle<false>(x, SplitRows::of<T>(douts), record.scores, [](int) { return true; });
    if (p.delta) {
      SplitRows const rows(x);
      clear(x);
      multiply_triangle<false>(x, rows, record.transposed_inverse, [](int) { return true; });
    }
    scan.keep(x, part, p, w.dwrites, c);
    scale_tokens(x, record.strength);
    state.decay_by(record.decay);
    state.template gain<T, false, false>(douts, douts, record.q_in, record.q_in);
    if (p.delta) {
      uint32_t high[kChunkSteps][4], low[kChunkSteps][4];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Split const s = split_as<T>(-x[n][2 * half], -x[n][2 * half + 1]);
          high[n / 2][n % 2 * 2 + half] = s.high;
          low[n / 2][n % 2 * 2 + half] = s.low;
        }
      }
      state.template gain<T, true, false>(high, low, record.k_in, record.k_in);
    }
    scan.store(stage, x, part, p, p.dv, c);
  }
  if (p.dinitial_state == nullptr) return;
  state.store(p, scan.state(p, p.dinitial_state), scan.first + scan.column);
}

}  // namespace lt2::kda::portable
