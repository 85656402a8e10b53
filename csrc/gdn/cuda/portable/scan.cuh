// The recurrence, token by token: forward, in reverse for the gradient of the state, and the decode step. The
// kernels are those of kda as well, whose columns decay otherwise.
//
// Columns of a state [K, V] never meet, so a block owns a slice of columns and all K rows of it, in
// registers: kLanes adjacent lanes share a column, kRows rows each. Tokens are staged in shared memory,
// kTokens at a time.
#pragma once

#include "gdn/cuda/portable/problem.cuh"

namespace lt2::gdn::portable {

inline constexpr int kScanThreads = 128;
inline constexpr int kScanBlocks = 3;  // per multiprocessor: up to 168 registers
inline constexpr int kTokens = 16;
static_assert(kChunk % kTokens == 0 && kTokens >= kMaxStepTokens);

template <int kLanes_, int kRows_>
struct Tile {
  static constexpr int kLanes = kLanes_, kRows = kRows_;
  static constexpr int kKeys = kLanes * kRows;            // K, padded with zeros
  static constexpr int kColumns = kScanThreads / kLanes;  // per block
  static_assert(kRows % 4 == 0 && kKeys % kWarp == 0);
};

template <class Tile, int kCount = kTokens>
struct Tokens {
  static constexpr int kStaged = kCount;
  alignas(16) float q[kCount][Tile::kKeys];
  alignas(16) float k[kCount][Tile::kKeys];
  float v[kCount][Tile::kColumns];  // or dO
  float qk[kCount], beta[kCount];
  float decay[kCount], change[kCount];  // e^g and e^g - 1
  float erase[kCount];                  // e^g for the delta rule, else 0

  // `count` rows of q and k, normalised if asked for; a warp per token.
  template <class T>
  __device__ void load_keys(T const* q_rows, int64_t q_stride, T const* k_rows, int64_t k_stride, int count,
                            int key_dim, bool normalise) {
    constexpr int kPerLane = Tile::kKeys / kWarp;
    int const lane = threadIdx.x % kWarp;
    for (int i = threadIdx.x / kWarp; i < count; i += kScanThreads / kWarp) {
      float x[kPerLane], y[kPerLane], xx = 0.f, yy = 0.f, xy = 0.f;
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        int const c = e * kWarp + lane;
        x[e] = c < key_dim ? to_float(q_rows[i * q_stride + c]) : 0.f;
        y[e] = c < key_dim ? to_float(k_rows[i * k_stride + c]) : 0.f;
      }
      if (normalise) {
#pragma unroll
        for (int e = 0; e < kPerLane; ++e) {
          xx += x[e] * x[e];
          yy += y[e] * y[e];
        }
        xx = rsqrtf(lane_sum(xx) + kNormEpsilon);
        yy = rsqrtf(lane_sum(yy) + kNormEpsilon);
#pragma unroll
        for (int e = 0; e < kPerLane; ++e) {
          x[e] *= xx;
          y[e] *= yy;
        }
      }
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        xy += x[e] * y[e];
        q[i][e * kWarp + lane] = x[e];
        k[i][e * kWarp + lane] = y[e];
      }
      xy = lane_sum(xy);
      if (lane == 0) qk[i] = xy;
    }
  }

  // Columns [first, first + kColumns) of `count` rows of v.
  template <class T>
  __device__ void load_values(T const* rows, int64_t stride, int count, int first, int value_dim) {
    for (int e = threadIdx.x; e < count * Tile::kColumns; e += kScanThreads) {
      int const i = e / Tile::kColumns, c = e % Tile::kColumns;
      v[i][c] = first + c < value_dim ? to_float(rows[i * stride + first + c]) : 0.f;
    }
  }

  __device__ void set_decay(int i, float g, bool delta) {
    decay[i] = expf(g);
    erase[i] = delta ? decay[i] : 0.f;
    change[i] = expm1f(g);
  }

  // Everything of tokens [begin, begin + count) of an operator call; `values` is v or dO.
  template <class T>
  __device__ void load(Inputs const& p, Strided const& values, int64_t row, int64_t begin, int count,
                       int head, int first_column) {
    int const key_head = head / (p.value_heads / p.heads);
    load_keys(token_row<T const>(p.q, row, begin, key_head), p.q.token,
              token_row<T const>(p.k, row, begin, key_head), p.k.token, count, p.key_dim, p.qk_l2norm);
    load_values(token_row<T const>(values, row, begin, head), values.token, count, first_column, p.value_dim);
    if (int const i = threadIdx.x; i < count) {
      set_decay(i, log_decay(p, row, begin + i, head), p.delta);
      beta[i] = write_strength(p, row, begin + i, head);
    }
  }

  // The same of the tokens of a decode step.
  template <class T>
  __device__ void load_step(StepParams const& p, int64_t row, int count, int head, int first_column) {
    int const key_head = head / (p.value_heads / p.heads);
    load_keys(token_row<T const>(p.q, row, 0, key_head), p.q.token, token_row<T const>(p.k, row, 0, key_head),
              p.k.token, count, p.key_dim, p.qk_l2norm);
    load_values(token_row<T const>(p.v, row, 0, head), p.v.token, count, first_column, p.value_dim);
    if (int const i = threadIdx.x; i < count) {
      auto const scalar = [&](Strided const& x, float absent) {
        if (x.data == nullptr) return absent;
        return load_element(p.gate_dtype, x.data, row * x.batch + i * x.token + head * x.head);
      };
      float const a = scalar(p.a, 0.f), b = scalar(p.b, 1.f);
      set_decay(i, log_decay(p, a, head), p.delta);
      beta[i] = write_strength(p, b);
    }
  }
};

// This thread's part of one column of a state; rows in groups of 4, dealt to the lanes in turn.
template <class Tile_>
struct Column {
  using Tile = Tile_;
  using Staged = Tokens<Tile>;
  float s[Tile::kRows];

  __device__ static int part() { return threadIdx.x % Tile::kLanes; }
  __device__ static int index() { return threadIdx.x / Tile::kLanes; }
  __device__ static int row(int r) { return (r / 4 * Tile::kLanes + part()) * 4 + r % 4; }

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) s[r] = 0.f;
  }
  template <class S>
  __device__ void load(StateOf<S> const& state, int column, int key_dim, int value_dim) {
    S const* const data = state.data + column * state.value_stride;
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      s[r] = column < value_dim && row(r) < key_dim ? to_float(data[row(r) * state.key_stride]) : 0.f;
    }
  }
  template <class S>
  __device__ void store(StateOf<S> const& state, int column, int key_dim, int value_dim) const {
    if (column >= value_dim) return;
    S* const data = state.data + column * state.value_stride;
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      if (row(r) < key_dim) data[row(r) * state.key_stride] = from_float<S>(s[r]);
    }
  }

  // This thread's rows of a q or k in shared memory.
  __device__ static void read(float const* keys, float (&x)[Tile::kRows]) {
#pragma unroll
    for (int r = 0; r < Tile::kRows; r += 4) {
      float4 const y = *reinterpret_cast<float4 const*>(keys + row(r));
      x[r] = y.x, x[r + 1] = y.y, x[r + 2] = y.z, x[r + 3] = y.w;
    }
  }
  // x^T s over the whole column.
  __device__ float dot(float const (&x)[Tile::kRows]) const {
    float sums[4] = {};
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) sums[r % 4] += x[r] * s[r];
    return lane_sum<Tile::kLanes>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  // s <- e^g s. Near 1, where thousands of decays add up, e^g itself is not rounded.
  __device__ void apply_decay(Staged const& t, int i) {
    float const decay = t.decay[i], change = t.change[i];
    if (change > -0.5f) {
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) s[r] = fmaf(change, s[r], s[r]);
    } else {
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) s[r] *= decay;
    }
  }

  // s <- s + x a
  __device__ void add(float const (&x)[Tile::kRows], float a) {
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) s[r] += x[r] * a;
  }

  // One token; returns r = v - k^T (erase S), where t says what is erased. With kOutput, *o = q^T S after it,
  // without a second pass over S: q^T S' = decay q^T S + (q . k) u.
  template <bool kOutput>
  __device__ float advance(Staged const& t, int i, bool, float* o) {
    float k[Tile::kRows];
    read(t.k[i], k);
    float const decay = t.decay[i];
    float const residual = t.v[i][index()] - t.erase[i] * dot(k);
    float const write = t.beta[i] * residual;
    if constexpr (kOutput) {
      float q[Tile::kRows];
      read(t.q[i], q);
      *o = decay * dot(q) + t.qk[i] * write;
    }
    apply_decay(t, i);
    add(k, write);
    return residual;
  }
};

// Block -> (sequence or batch row, value head, first column).
template <class Tile>
struct Slice {
  int64_t n;
  int head, first;

  __device__ Slice(int value_heads, int value_dim) {
    int const slices = static_cast<int>(ceil_div(value_dim, Tile::kColumns));
    first = static_cast<int>(blockIdx.x % slices) * Tile::kColumns;
    head = static_cast<int>(blockIdx.x / slices % value_heads);
    n = blockIdx.x / slices / value_heads;
  }
};

template <class Tile>
int64_t slices(int64_t rows, int value_heads, int value_dim) {
  return rows * value_heads * ceil_div(value_dim, Tile::kColumns);
}

// kBackward: keeps residuals and the state before each chunk instead of o and the final state.
template <class T, class Column, bool kBackward>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
    forward_scan(__grid_constant__ Inputs const p, Strided const o, float* final_state, Workspace const w) {
  __shared__ typename Column::Staged tokens;
  constexpr int kStaged = Column::Staged::kStaged;
  Slice<typename Column::Tile> const slice(p.value_heads, p.value_dim);
  Sequence const sequence = portable::sequence(p, slice.n);
  int const head = slice.head, column = slice.first + Column::index();
  bool const writer = Column::part() == 0 && column < p.value_dim;
  int64_t const state_index = slice.n * p.value_heads + head;

  Column state;
  state.clear();
  if (p.initial_state != nullptr) {
    state.load(dense_state(const_cast<float*>(p.initial_state), state_index, p.key_dim, p.value_dim,
                           p.state_v_first),
               column, p.key_dim, p.value_dim);
  }
  int64_t const chunk = kBackward ? first_chunk(p, slice.n) : 0;
  for (int64_t begin = 0; begin < sequence.length; begin += kStaged) {
    if (kBackward && begin % kChunk == 0) {
      state.store(dense_state(w.states, (chunk + begin / kChunk) * p.value_heads + head, p.key_dim,
                              p.value_dim, false),
                  column, p.key_dim, p.value_dim);
    }
    int const count = static_cast<int>(min(sequence.length - begin, int64_t{kStaged}));
    int64_t const token = sequence.begin + begin;
    __syncthreads();
    tokens.template load<T>(p, p.v, sequence.row, token, count, head, slice.first);
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      if constexpr (kBackward) {
        float const residual = state.template advance<false>(tokens, i, p.delta, nullptr);
        int64_t const at = (sequence.row * p.tokens + token + i) * p.value_heads + head;
        if (writer) w.residuals[at * p.value_dim + column] = residual;
      } else {
        float out;
        state.template advance<true>(tokens, i, p.delta, &out);
        if (writer) token_row<T>(o, sequence.row, token + i, head)[column] = from_float<T>(p.scale * out);
      }
    }
  }
  if (!kBackward && final_state != nullptr) {
    state.store(dense_state(final_state, state_index, p.key_dim, p.value_dim, p.state_v_first), column,
                p.key_dim, p.value_dim);
  }
}

// From the last token to the first: with dS = dL/dS after a token, and its output included,
//   du = k^T dS,   dv = dr = beta du,   dS before the token = e^g (dS - k dr^T), or e^g dS without the delta
//   rule, with Diag(e^g) in kda.
template <class T, class Column>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
    reverse_scan(__grid_constant__ BackwardParams const p, Workspace const w) {
  constexpr int kRows = Column::Tile::kRows, kStaged = Column::Staged::kStaged;
  __shared__ typename Column::Staged tokens;
  Slice<typename Column::Tile> const slice(p.value_heads, p.value_dim);
  Sequence const sequence = portable::sequence(p, slice.n);
  int const head = slice.head, column = slice.first + Column::index();
  bool const writer = Column::part() == 0 && column < p.value_dim;
  int64_t const state_index = slice.n * p.value_heads + head;

  Column dstate;
  dstate.clear();
  if (p.dfinal_state != nullptr) {
    dstate.load(
        dense_state(const_cast<float*>(p.dfinal_state), state_index, p.key_dim, p.value_dim, p.state_v_first),
        column, p.key_dim, p.value_dim);
  }
  int64_t const chunk = first_chunk(p, slice.n);
  for (int64_t end = sequence.length; end > 0;) {
    int64_t const begin = (end - 1) / kStaged * kStaged;
    if (end == sequence.length || end % kChunk == 0) {
      dstate.store(dense_state(w.dstates, (chunk + begin / kChunk) * p.value_heads + head, p.key_dim,
                               p.value_dim, false),
                   column, p.key_dim, p.value_dim);
    }
    int const count = static_cast<int>(end - begin);
    int64_t const token = sequence.begin + begin;
    __syncthreads();
    tokens.template load<T>(p, p.dout, sequence.row, token, count, head, slice.first);
    __syncthreads();
    for (int i = count - 1; i >= 0; --i) {
      float k[kRows], q[kRows];
      Column::read(tokens.k[i], k);
      Column::read(tokens.q[i], q);
      float const dout = p.scale * tokens.v[i][Column::index()];
      float const dwrite = dstate.dot(k) + tokens.qk[i] * dout;
      float const dvalue = tokens.beta[i] * dwrite;
      if (writer) {
        int64_t const at = (sequence.row * p.tokens + token + i) * p.value_heads + head;
        w.dwrites[at * p.value_dim + column] = dwrite;
        token_row<T>(p.dv, sequence.row, token + i, head)[column] = from_float<T>(dvalue);
      }
      dstate.add(q, dout);
      if (p.delta) dstate.add(k, -dvalue);
      dstate.apply_decay(tokens, i);
    }
    end = begin;
  }
  if (p.dinitial_state != nullptr) {
    dstate.store(dense_state(p.dinitial_state, state_index, p.key_dim, p.value_dim, p.state_v_first), column,
                 p.key_dim, p.value_dim);
  }
}

template <class T, class S, class Column, class Params>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks) step_kernel(__grid_constant__ Params const p) {
  __shared__ typename Column::Staged tokens;
  Slice<typename Column::Tile> const slice(p.value_heads, p.value_dim);
  int64_t const row = slice.n;
  int const head = slice.head, column = slice.first + Column::index();
  int const count = static_cast<int>(p.tokens);
  bool const writer = Column::part() == 0 && column < p.value_dim;
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
  if (slot < 0 || slot >= p.slots) {
    for (int i = 0; i < count; ++i) {
      if (writer) token_row<T>(p.o, row, i, head)[column] = from_float<T>(0.f);
    }
    return;
  }
  StateOf<S> const pool{static_cast<S*>(p.state) + slot * p.state_slot + head * p.state_head,
                        p.state_v_first ? 1 : p.state_row, p.state_v_first ? p.state_row : 1};
  Column state;
  state.load(pool, column, p.key_dim, p.value_dim);
  tokens.template load_step<T>(p, row, count, head, slice.first);
  __syncthreads();
  for (int i = 0; i < count; ++i) {
    float out;
    state.template advance<true>(tokens, i, p.delta, &out);
    if (writer) token_row<T>(p.o, row, i, head)[column] = from_float<T>(p.scale * out);
  }
  state.store(pool, column, p.key_dim, p.value_dim);
}

}  // namespace lt2::gdn::portable
