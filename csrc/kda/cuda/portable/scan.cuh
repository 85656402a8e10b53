// The recurrence, token by token: forward, in reverse for the gradient of the state, and the decode step. As
// in gdn's scan.cuh a block owns a slice of the columns of a state, in registers.
#pragma once

#include "gdn/cuda/portable/scan.cuh"
#include "kda/cuda/portable/problem.cuh"

namespace lt2::kda::portable {

inline constexpr int kStaged = 8;  // tokens in shared memory at a time
static_assert(kChunk % kStaged == 0 && kStaged >= kMaxStepTokens);

template <class Tile>
struct Tokens : gdn::portable::Tokens<Tile, kStaged> {
  // e^g - 1 (with its sign bit set) where it is above -1/2, else e^g: near 1, where thousands of decays
  // multiply up, e^g itself is not rounded.
  alignas(16) float decays[kStaged][Tile::kKeys];

  // Everything of tokens [begin, begin + count); `values` is v or dO.
  template <class T>
  __device__ void load(Inputs const& p, Strided const& values, int64_t row, int64_t begin, int count,
                       int head, int first_column) {
    int const key_head = head / (p.value_heads / p.heads);
    this->load_keys(token_row<T const>(p.q, row, begin, key_head), p.q.token,
                    token_row<T const>(p.k, row, begin, key_head), p.k.token, count, p.key_dim, p.qk_l2norm);
    this->load_values(token_row<T const>(values, row, begin, head), values.token, count, first_column,
                      p.value_dim);
    for (int e = threadIdx.x; e < count * Tile::kKeys; e += kScanThreads) {
      int const i = e / Tile::kKeys, c = e % Tile::kKeys;
      float const g = c < p.key_dim ? log_decay(p, row, begin + i, head, c) : 0.f, change = expm1f(g);
      decays[i][c] = change > -0.5f ? -fabsf(change) : expf(g);
    }
    if (int const i = threadIdx.x; i < count) this->beta[i] = write_strength(p, row, begin + i, head);
  }
};

template <class Tile>
struct Column : gdn::portable::Column<Tile> {
  // s <- Diag(e^g) s.
  __device__ void apply_decays(float const* decays) {
    float x[Tile::kRows];
    this->read(decays, x);
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      float& s = this->s[r];
      s = fmaf(x[r], s, __float_as_int(x[r]) < 0 ? s : 0.f);
    }
  }

  // One token; returns r = v - k^T (decayed S), or v. With kOutput, *o = q^T S after it.
  template <bool kOutput>
  __device__ float advance(Tokens<Tile> const& t, int i, bool delta, float* o) {
    apply_decays(t.decays[i]);
    float k[Tile::kRows];
    this->read(t.k[i], k);
    float residual = t.v[i][this->index()];
    if (delta) residual -= this->dot(k);
    float const write = t.beta[i] * residual;
    if constexpr (kOutput) {
      float q[Tile::kRows];
      this->read(t.q[i], q);
      *o = this->dot(q) + t.qk[i] * write;
    }
    this->add(k, write);
    return residual;
  }
};

// kBackward: keeps residuals and the state before each chunk instead of o and the final state.
template <class T, class Tile, bool kBackward>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
    forward_scan(__grid_constant__ Inputs const p, Strided const o, float* final_state, Workspace const w) {
  __shared__ Tokens<Tile> tokens;
  Slice<Tile> const slice(p.value_heads, p.value_dim);
  Sequence const sequence = gdn::portable::sequence(p, slice.n);
  int const head = slice.head, column = slice.first + Column<Tile>::index();
  bool const writer = Column<Tile>::part() == 0 && column < p.value_dim;
  int64_t const state_index = slice.n * p.value_heads + head;

  Column<Tile> state;
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
//   du = k^T dS,   dv = dr = beta du,   dS before the token = Diag(e^g) (dS - k dr^T), without delta
//   Diag(e^g) dS.
template <class T, class Tile>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
    reverse_scan(__grid_constant__ BackwardParams const p, Workspace const w) {
  __shared__ Tokens<Tile> tokens;
  Slice<Tile> const slice(p.value_heads, p.value_dim);
  Sequence const sequence = gdn::portable::sequence(p, slice.n);
  int const head = slice.head, column = slice.first + Column<Tile>::index();
  bool const writer = Column<Tile>::part() == 0 && column < p.value_dim;
  int64_t const state_index = slice.n * p.value_heads + head;

  Column<Tile> dstate;
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
      float k[Tile::kRows], q[Tile::kRows];
      Column<Tile>::read(tokens.k[i], k);
      Column<Tile>::read(tokens.q[i], q);
      float const dout = p.scale * tokens.v[i][Column<Tile>::index()];
      float const dwrite = dstate.dot(k) + tokens.qk[i] * dout;
      float const dvalue = tokens.beta[i] * dwrite;
      if (writer) {
        int64_t const at = (sequence.row * p.tokens + token + i) * p.value_heads + head;
        w.dwrites[at * p.value_dim + column] = dwrite;
        token_row<T>(p.dv, sequence.row, token + i, head)[column] = from_float<T>(dvalue);
      }
      dstate.add(q, dout);
      if (p.delta) dstate.add(k, -dvalue);
      dstate.apply_decays(tokens.decays[i]);
    }
    end = begin;
  }
  if (p.dinitial_state != nullptr) {
    dstate.store(dense_state(p.dinitial_state, state_index, p.key_dim, p.value_dim, p.state_v_first), column,
                 p.key_dim, p.value_dim);
  }
}

template <class T, class S, class Tile>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
    step_kernel(__grid_constant__ StepParams const p) {
  __shared__ Tokens<Tile> tokens;
  Slice<Tile> const slice(p.value_heads, p.value_dim);
  int64_t const row = slice.n;
  int const head = slice.head, column = slice.first + Column<Tile>::index();
  int const count = static_cast<int>(p.tokens);
  bool const writer = Column<Tile>::part() == 0 && column < p.value_dim;
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
  if (slot < 0 || slot >= p.slots) {
    for (int i = 0; i < count; ++i) {
      if (writer) token_row<T>(p.o, row, i, head)[column] = from_float<T>(0.f);
    }
    return;
  }
  StateOf<S> const pool{static_cast<S*>(p.state) + slot * p.state_slot + head * p.state_head,
                        p.state_v_first ? 1 : p.state_row, p.state_v_first ? p.state_row : 1};
  Column<Tile> state;
  state.load(pool, column, p.key_dim, p.value_dim);
  tokens.template load<T>(p, p.v, row, 0, count, head, slice.first);
  __syncthreads();
  for (int i = 0; i < count; ++i) {
    float out;
    state.template advance<true>(tokens, i, p.delta, &out);
    if (writer) token_row<T>(p.o, row, i, head)[column] = from_float<T>(p.scale * out);
  }
  state.store(pool, column, p.key_dim, p.value_dim);
}

}  // namespace lt2::kda::portable
