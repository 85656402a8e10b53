// The decode step: a state is read once, advanced by 1 to 8 tokens in registers, and written once.
//
// Columns (value indices) of a state never meet, so a block owns a slice of columns and all of their keys. In
// both layouts a thread holds pieces of 4 elements that are adjacent in memory:
//   ValueFirst, state [V, K]: a few columns; kLanes adjacent lanes share each of them;
//   KeyFirst, state [K, V]: 4 adjacent columns; the rest of the block, in steps of kLanes threads, has the
//   other keys.
#pragma once

#include "common/cuda/mma.cuh"
#include "common/cuda/overlap.cuh"
#include "gdn/cuda/portable/problem.cuh"

namespace lt2::gdn::sm90 {

using namespace cuda;
using portable::ceil_div;
using portable::gate;
using portable::kMaxStepTokens;
using portable::kNormEpsilon;
using portable::token_row;

inline constexpr int kStepThreads = 128;
inline constexpr int kStepWarps = kStepThreads / kWarp;
inline constexpr int kPiece = 4;  // floats of a state that move together

// The rule of these kernels that is broken, or kOk.
inline Status check_state(StepParams const& p) {
  constexpr int64_t kMaxGridYZ = 65535;
  int const contiguous = p.state_v_first ? p.key_dim : p.value_dim;
  if (p.key_dim < 1 || p.key_dim > portable::kMaxKeyDim) return "the fast CUDA step takes K in 1..256";
  if (p.batch > kMaxGridYZ || p.value_heads > kMaxGridYZ)
    return "the fast CUDA step takes up to 65535 rows and heads";
  int const bytes = p.state_dtype == Dtype::kBFloat16 ? 2 : 4;
  bool const aligned = reinterpret_cast<uintptr_t>(p.state) % (kPiece * bytes) == 0 &&
                       p.state_slot % kPiece == 0 && p.state_head % kPiece == 0 && p.state_row % kPiece == 0;
  if (contiguous % kPiece != 0 || !aligned) {
    return "the fast CUDA step takes states in aligned pieces of 16 bytes (bfloat16: 8): a last axis and "
           "strides of multiples of 4";
  }
  return kOk;
}

// Of one state in the pool, of floats or bf16.
template <class S>
struct StateRows {
  S* data;
  int64_t stride;  // between rows, a multiple of kPiece
};

// The tokens of a query/key head, fp32: q and k normalised, padded with zeros.
template <int kKeys>
struct StepKeys {
  alignas(16) float q[kMaxStepTokens][kKeys];
  alignas(16) float k[kMaxStepTokens][kKeys];
  float qk[kMaxStepTokens];
};

// What they write to a slice of columns of a value head.
template <int kColumns>
struct StepWrites {
  alignas(16) float v[kMaxStepTokens][kColumns];
  float beta[kMaxStepTokens], decay[kMaxStepTokens], change[kMaxStepTokens];  // e^g and e^g - 1

  __device__ void set_gates(int i, float a, float b, float A_log, float dt_bias, bool neg_eigval) {
    float const g = gate(a, A_log, dt_bias);
    decay[i] = expf(g);
    change[i] = expm1f(g);
    beta[i] = sigmoid(b) * (neg_eigval ? 2.f : 1.f);
  }
};

__device__ inline float4 load_piece(float const* p) { return __ldcg(reinterpret_cast<float4 const*>(p)); }
__device__ inline float4 load_piece(__nv_bfloat16 const* p) {
  uint2 const bits = __ldcg(reinterpret_cast<uint2 const*>(p));
  float2 const x = unpack<__nv_bfloat16>(bits.x), y = unpack<__nv_bfloat16>(bits.y);
  return {x.x, x.y, y.x, y.y};
}
__device__ inline void store_piece(float* p, float4 x) { *reinterpret_cast<float4*>(p) = x; }
__device__ inline void store_piece(__nv_bfloat16* p, float4 x) {
  *reinterpret_cast<uint2*>(p) = {pack<__nv_bfloat16>(x.x, x.y), pack<__nv_bfloat16>(x.z, x.w)};
}

__device__ inline float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
__device__ inline void add(float4& s, float4 x, float4 a) {
  s = {fmaf(x.x, a.x, s.x), fmaf(x.y, a.y, s.y), fmaf(x.z, a.z, s.z), fmaf(x.w, a.w, s.w)};
}
__device__ inline float4 splat(float x) { return {x, x, x, x}; }

// s <- e^g s. Near 1, where thousands of decays add up, e^g itself is not rounded.
__device__ inline void apply_decay(float4& s, float decay, float change) {
  if (change > -0.5f) {
    add(s, splat(change), s);
  } else {
    s = {decay * s.x, decay * s.y, decay * s.z, decay * s.w};
  }
}

template <int kLanes_, int kPieces, int kOwned_, int kThreads_ = kStepThreads>
struct ValueFirst {
  static constexpr int kLanes = kLanes_, kOwned = kOwned_, kThreads = kThreads_;
  static constexpr int kKeys = kPiece * kLanes * kPieces;
  static constexpr int kGroups = kThreads / kLanes, kColumns = kGroups * kOwned;
  using Keys = StepKeys<kKeys>;
  using Writes = StepWrites<kColumns>;
  struct Shared {};

  float4 s[kOwned][kPieces];

  __device__ static int column(int j) { return j * kGroups + threadIdx.x / kLanes; }
  __device__ static bool leads() { return threadIdx.x % kLanes == 0; }  // of the threads with its columns
  __device__ static int key(int c) { return (c * kLanes + threadIdx.x % kLanes) * kPiece; }

  template <class S, class F>
  __device__ static void each(StateRows<S> const& state, int first, int key_dim, int value_dim, F const& f) {
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      int const row = first + column(j);
      S* const data = state.data + row * state.stride;
#pragma unroll
      for (int c = 0; c < kPieces; ++c) f(j, c, data + key(c), row < value_dim && key(c) < key_dim);
    }
  }
  template <class S>
  __device__ void load(StateRows<S> const& state, int first, int key_dim, int value_dim) {
    each(state, first, key_dim, value_dim,
         [&](int j, int c, S const* p, bool inside) { s[j][c] = inside ? load_piece(p) : float4{}; });
  }
  template <class S>
  __device__ void store(StateRows<S> const& state, int first, int key_dim, int value_dim) const {
    each(state, first, key_dim, value_dim, [&](int j, int c, S* p, bool inside) {
      if (inside) store_piece(p, s[j][c]);
    });
  }

  __device__ static float4 read(float const* keys, int c) {
    return *reinterpret_cast<float4 const*>(keys + key(c));
  }
  // k^T s and q^T s of the owned columns.
  __device__ void dots(Keys const& t, Shared&, int i, float (&ks)[kOwned], float (&qs)[kOwned]) const {
#pragma unroll
    for (int j = 0; j < kOwned; ++j) ks[j] = qs[j] = 0.f;
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      float4 const k = read(t.k[i], c), q = read(t.q[i], c);
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        ks[j] = dot(k, s[j][c], ks[j]);
        qs[j] = dot(q, s[j][c], qs[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      ks[j] = lane_sum<kLanes>(ks[j]);
      qs[j] = lane_sum<kLanes>(qs[j]);
    }
  }
  // s <- e^g s + k write^T
  __device__ void update(Keys const& t, Writes const& w, int i, float const (&write)[kOwned]) {
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      float4 const k = read(t.k[i], c);
#pragma unroll
      for (int j = 0; j < kOwned; ++j) {
        apply_decay(s[j][c], w.decay[i], w.change[i]);
        add(s[j][c], k, splat(write[j]));
      }
    }
  }
};

template <int kLanes_, int kRows, int kThreads_ = kStepThreads>
struct KeyFirst {
  static constexpr int kLanes = kLanes_, kOwned = kPiece, kThreads = kThreads_, kWarps = kThreads / kWarp;
  static constexpr int kGroups = kThreads / kLanes, kKeys = kGroups * kRows;
  static constexpr int kColumns = kPiece * kLanes;
  static_assert(kWarp % kLanes == 0);
  using Keys = StepKeys<kKeys>;
  using Writes = StepWrites<kColumns>;
  struct Shared {
    alignas(16) float sums[2][kWarps][2][kColumns];  // of token i % 2: k^T s and q^T s over a warp's keys
  };

  float4 s[kRows];

  __device__ static int column(int j) { return threadIdx.x % kLanes * kPiece + j; }
  __device__ static bool leads() { return threadIdx.x < kLanes; }
  __device__ static int key(int r) { return r * kGroups + threadIdx.x / kLanes; }

  template <class S, class F>
  __device__ static void each(StateRows<S> const& state, int first, int key_dim, int value_dim, F const& f) {
    int const at = first + column(0);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      f(r, state.data + key(r) * state.stride + at, key(r) < key_dim && at < value_dim);
    }
  }
  template <class S>
  __device__ void load(StateRows<S> const& state, int first, int key_dim, int value_dim) {
    each(state, first, key_dim, value_dim,
         [&](int r, S const* p, bool inside) { s[r] = inside ? load_piece(p) : float4{}; });
  }
  template <class S>
  __device__ void store(StateRows<S> const& state, int first, int key_dim, int value_dim) const {
    each(state, first, key_dim, value_dim, [&](int r, S* p, bool inside) {
      if (inside) store_piece(p, s[r]);
    });
  }

  __device__ static float4 warp_sum(float4 x) {
#pragma unroll
    for (int distance = kLanes; distance < kWarp; distance *= 2) {
      x.x += __shfl_xor_sync(0xffffffffu, x.x, distance);
      x.y += __shfl_xor_sync(0xffffffffu, x.y, distance);
      x.z += __shfl_xor_sync(0xffffffffu, x.z, distance);
      x.w += __shfl_xor_sync(0xffffffffu, x.w, distance);
    }
    return x;
  }
  __device__ void dots(Keys const& t, Shared& shared, int i, float (&ks)[kOwned], float (&qs)[kOwned]) const {
    float4 sums[2] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      add(sums[0], s[r], splat(t.k[i][key(r)]));
      add(sums[1], s[r], splat(t.q[i][key(r)]));
    }
    auto& all = shared.sums[i % 2];
    int const warp = threadIdx.x / kWarp;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      sums[x] = warp_sum(sums[x]);
      if (threadIdx.x % kWarp < kLanes) store_piece(&all[warp][x][column(0)], sums[x]);
    }
    __syncthreads();
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      float4 total = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        add(total, *reinterpret_cast<float4 const*>(&all[w][x][column(0)]), splat(1.f));
      }
      float (&to)[kOwned] = x == 0 ? ks : qs;
      to[0] = total.x, to[1] = total.y, to[2] = total.z, to[3] = total.w;
    }
  }
  __device__ void update(Keys const& t, Writes const& w, int i, float const (&write)[kOwned]) {
    float4 const u = {write[0], write[1], write[2], write[3]};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      apply_decay(s[r], w.decay[i], w.change[i]);
      add(s[r], u, splat(t.k[i][key(r)]));
    }
  }
};

// Token i; emit(j, q^T S after it) for each owned column: q^T S' = e^g q^T S + (q . k) u takes no second
// pass.
template <class Tile, class Emit>
__device__ void advance(Tile& tile, typename Tile::Keys const& t, typename Tile::Writes const& w,
                        typename Tile::Shared& shared, int i, Emit const& emit) {
  float ks[Tile::kOwned], qs[Tile::kOwned];
  tile.dots(t, shared, i, ks, qs);
#pragma unroll
  for (int j = 0; j < Tile::kOwned; ++j) {
    ks[j] = w.beta[i] * (w.v[i][Tile::column(j)] - w.decay[i] * ks[j]);
    emit(j, w.decay[i] * qs[j] + t.qk[i] * ks[j]);
  }
  tile.update(t, w, i, ks);
}

// A row of q and of k in the registers of a warp, normalised if asked for.
template <int kKeys>
__device__ void store_keys(StepKeys<kKeys>& t, int token, bool normalise, float const (&q)[kKeys / kWarp],
                           float const (&k)[kKeys / kWarp]) {
  float qq = 0.f, kk = 0.f, qk = 0.f;
#pragma unroll
  for (int e = 0; e < kKeys / kWarp; ++e) {
    qq = fmaf(q[e], q[e], qq);
    kk = fmaf(k[e], k[e], kk);
    qk = fmaf(q[e], k[e], qk);
  }
  qq = normalise ? rsqrtf(lane_sum(qq) + kNormEpsilon) : 1.f;
  kk = normalise ? rsqrtf(lane_sum(kk) + kNormEpsilon) : 1.f;
  qk = lane_sum(qk) * qq * kk;
#pragma unroll
  for (int e = 0; e < kKeys / kWarp; ++e) {
    int const c = e * kWarp + threadIdx.x % kWarp;
    t.q[token][c] = q[e] * qq;
    t.k[token][c] = k[e] * kk;
  }
  if (threadIdx.x % kWarp == 0) t.qk[token] = qk;
}

// The same in the dtype of q and k.
template <class T, int kKeys>
struct KeyRow {
  static constexpr int kPerLane = kKeys / kWarp;
  static_assert(kKeys % kWarp == 0);
  T q[kPerLane], k[kPerLane];

  __device__ void load(StepParams const& p, int64_t row, int token, int head) {
    T const* const q_row = token_row<T const>(p.q, row, token, head);
    T const* const k_row = token_row<T const>(p.k, row, token, head);
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      int const c = e * kWarp + threadIdx.x % kWarp;
      q[e] = c < p.key_dim ? q_row[c] : T(0.f);
      k[e] = c < p.key_dim ? k_row[c] : T(0.f);
    }
  }

  __device__ void store(StepKeys<kKeys>& t, int token, bool normalise) const {
    float x[kPerLane], y[kPerLane];
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      x[e] = to_float(q[e]);
      y[e] = to_float(k[e]);
    }
    store_keys(t, token, normalise, x, y);
  }
};

// Columns [first, first + kColumns) of v, dealt to the threads of a block.
template <class T, int kColumns>
struct Values {
  static constexpr int kPerThread = ceil_div(kMaxStepTokens * kColumns, kStepThreads);
  T v[kPerThread];

  template <class F>
  __device__ static void each(int tokens, F const& f) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      int const n = e * kStepThreads + threadIdx.x, i = n / kColumns;
      if (i < tokens) f(e, i, n % kColumns);
    }
  }
  __device__ void load(StepParams const& p, int64_t row, int head, int first) {
    each(p.tokens, [&](int e, int i, int c) {
      v[e] = first + c < p.value_dim ? token_row<T const>(p.v, row, i, head)[first + c] : T(0.f);
    });
  }
  __device__ void store(StepWrites<kColumns>& w, int tokens) const {
    each(tokens, [&](int e, int i, int c) { w.v[i][c] = to_float(v[e]); });
  }
};

// The scalars of a token.
struct Gates {
  uint32_t a, b;
  float A_log, dt_bias;

  __device__ void load(StepParams const& p, int64_t row, int token, int head) {
    a = load_bits(p.gate_dtype, p.a.data, row * p.a.batch + token * p.a.token + head * p.a.head);
    b = load_bits(p.gate_dtype, p.b.data, row * p.b.batch + token * p.b.token + head * p.b.head);
    A_log = p.A_log[head];
    dt_bias = p.dt_bias[head];
  }
  template <class Writes>
  __device__ void store(StepParams const& p, Writes& w, int token) const {
    w.set_gates(token, bits_to_float(p.gate_dtype, a), bits_to_float(p.gate_dtype, b), A_log, dt_bias,
                p.neg_eigval);
  }
};

template <class S>
__device__ StateRows<S> state_rows(StepParams const& p, int64_t slot, int head) {
  return {static_cast<S*>(p.state) + slot * p.state_slot + head * p.state_head, p.state_row};
}

// Blocks per multiprocessor that the register budget is for; at least 64 KB of state are then in flight.
template <class Tile>
constexpr int min_blocks() {
  constexpr int kFloats = sizeof(Tile) / sizeof(float);
  return kFloats <= 16 ? 6 : kFloats <= 32 ? 5 : 3;
}

// Block (slice of columns, value head, row). The state is asked for first; where a slot leads to it, while
// the slot is on its way, everything else. All of that is prepared before the state arrives.
template <class T, class S, class Tile>
__global__ void __launch_bounds__(kStepThreads, min_blocks<Tile>())
    decode_kernel(__grid_constant__ StepParams const p) {
  __shared__ typename Tile::Keys key_rows;
  __shared__ typename Tile::Writes writes;
  __shared__ typename Tile::Shared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  int const first = blockIdx.x * Tile::kColumns, head = blockIdx.y;
  int const key_head = head * p.heads / p.value_heads;
  int64_t const row = blockIdx.z;
  int const warp = threadIdx.x / kWarp, gates_of = kStepThreads - 1 - static_cast<int>(threadIdx.x);

  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
  bool const live = slot >= 0 && slot < p.slots;
  StateRows<S> const state = state_rows<S>(p, live ? slot : 0, head);
  Tile tile;
  if (p.slot_ids == nullptr) tile.load(state, first, p.key_dim, p.value_dim);
  KeyRow<T, Tile::kKeys> keys;
  Values<T, Tile::kColumns> values;
  Gates gates;
  if (warp < p.tokens) keys.load(p, row, warp, key_head);
  values.load(p, row, head, first);
  if (gates_of < p.tokens) gates.load(p, row, gates_of, head);
  if (p.slot_ids != nullptr && live) tile.load(state, first, p.key_dim, p.value_dim);

  values.store(writes, p.tokens);
  if (gates_of < p.tokens) gates.store(p, writes, gates_of);
  for (int i = warp; i < p.tokens; i += kStepWarps) {
    if (i != warp) keys.load(p, row, i, key_head);
    keys.store(key_rows, i, p.qk_l2norm);
  }
  __syncthreads();

  auto const store_output = [&](int i, int j, float x) {
    int const c = first + Tile::column(j);
    if (Tile::leads() && c < p.value_dim) token_row<T>(p.o, row, i, head)[c] = from_float<T>(x);
  };
  if (!live) {
    for (int i = 0; i < p.tokens; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kOwned; ++j) store_output(i, j, 0.f);
    }
    return;
  }
  for (int i = 0; i < p.tokens; ++i) {
    advance(tile, key_rows, writes, shared, i, [&](int j, float x) { store_output(i, j, p.scale * x); });
  }
  tile.store(state, first, p.key_dim, p.value_dim);
}

}  // namespace lt2::gdn::sm90
