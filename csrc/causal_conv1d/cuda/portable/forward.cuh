// The convolution of sequences, and of the next tokens of a decode step.
//
// A thread has kVec channels of one chunk and walks over its tokens, kTile at a time: their loads are under
// way at once, and the kTaps - 1 rows before them stay in registers. A token's sum always runs in the same
// order, so splitting a sequence never changes a bit.
#pragma once

#include "causal_conv1d/cuda/portable/rows.cuh"

namespace lt2::causal_conv1d::portable {

template <class T, int kVec, int kTaps>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(__grid_constant__ ForwardParams const p, int size) {
  constexpr int kTile = 8, kPast = kTaps - 1;
  using Row = RowOf<T, kVec>;
  int64_t const channel = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kVec;
  Chunk chunk;
  if (channel >= p.channels || !find_chunk(p, size, blockIdx.x, chunk)) return;
  if (chunk.sequence < 0) return zero_rows<T, kVec>(p.y, chunk, channel);

  Taps<kVec, kTaps> const taps(p.weight, p.bias, p.width, channel);
  Row rows[kPast + kTile];
#pragma unroll
  for (int j = 0; j < kPast; ++j) {
    bool const exists = j >= taps.first && chunk.begin < chunk.end;
    rows[j] = exists ? input_row<T, kVec>(p, chunk, chunk.begin - kPast + j, channel) : Row::zero();
  }
  T const* x = token_row<T const>(p.x, chunk.row, chunk.begin, channel);
  T* y = token_row<T>(p.y, chunk.row, chunk.begin, channel);
  for (int left = static_cast<int>(chunk.end - chunk.begin); left > 0; left -= kTile) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) rows[kPast + i] = i < left ? Row::load(x + i * p.x.token) : Row::zero();
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      Row out;
#pragma unroll
      for (int c = 0; c < kVec; ++c) out[c] = from_float<T>(activate(taps.convolve(rows + i, c), p.silu));
      if (i < left) out.store(y + i * p.y.token);
    }
#pragma unroll
    for (int j = 0; j < kPast; ++j) rows[j] = rows[kTile + j];
    x += kTile * p.x.token;
    y += kTile * p.y.token;
  }
  if (p.final_state.data == nullptr || chunk.end != chunk.last) return;
  for (int w = 0; w < p.width; ++w) {
    store_tap(p.final_state, chunk.sequence, channel, w,
              input_row<T, kVec>(p, chunk, chunk.last - p.width + w, channel));
  }
}

// Whether windows are 4 adjacent, aligned elements.
template <class T>
bool packed_windows(StepParams const& p) {
  return p.width == kFewTaps && p.state.tap == 1 && p.state.channel % kFewTaps == 0 &&
         p.state.sequence % kFewTaps == 0 &&
         reinterpret_cast<uintptr_t>(p.state.data) % (kFewTaps * sizeof(T)) == 0;
}

// The next tokens of one channel of a row, whose window is in `slot` of the pool. kPacked: the window is 4
// adjacent, aligned elements. Loading is a step of its own, so that a thread can have several channels under
// way.
template <class T, int kTaps, bool kPacked>
struct StepChannel {
  static_assert(!kPacked || kTaps == 4);
  Taps<1, kTaps> taps;
  RowOf<T, 1> window[kTaps], next;
  T const* x;
  T* state;

  __device__ void load(StepParams const& p, int64_t row, int64_t slot, int64_t channel) {
    x = token_row<T const>(p.x, row, 0, channel);
    state = static_cast<T*>(p.state.data) + slot * p.state.sequence + channel * p.state.channel;
    next[0] = p.tokens > 0 ? *x : T(0.f);  // without tokens there is no x
    taps = Taps<1, kTaps>(p.weight, p.bias, p.width, channel);
    if constexpr (kPacked) {
      auto const four = RowOf<T, 4>::load(state);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) window[j][0] = four[j];
    } else {
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        window[j][0] = j >= taps.first ? state[(j - taps.first) * p.state.tap] : T(0.f);
      }
    }
  }

  // emit(t, y) for every token.
  template <class Emit>
  __device__ void advance(StepParams const& p, Emit const& emit) {
    for (int64_t t = 0; t < p.tokens; ++t) {
#pragma unroll
      for (int j = 0; j + 1 < kTaps; ++j) window[j] = window[j + 1];
      window[kTaps - 1] = next;
      if (t + 1 < p.tokens) next[0] = x[(t + 1) * p.x.token];
      emit(t, activate(taps.convolve(window, 0), p.silu));
    }
  }

  // The window after the tokens.
  __device__ void store(StepParams const&, T* to, int64_t tap) const {
    if constexpr (kPacked) {
      RowOf<T, 4> four;
#pragma unroll
      for (int j = 0; j < kTaps; ++j) four[j] = window[j][0];
      four.store(to);
    } else {
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        if (j >= taps.first) to[(j - taps.first) * tap] = window[j][0];
      }
    }
  }
};

// The same for any width, without registers: everything is read again for every token.
template <class T>
struct WideStepChannel {
  T const* x;
  T* state;
  float const* weight;
  float bias;

  __device__ void load(StepParams const& p, int64_t row, int64_t slot, int64_t channel) {
    x = token_row<T const>(p.x, row, 0, channel);
    state = static_cast<T*>(p.state.data) + slot * p.state.sequence + channel * p.state.channel;
    weight = p.weight + channel * p.width;
    bias = p.bias == nullptr ? 0.f : p.bias[channel];
  }
  template <class Emit>
  __device__ void advance(StepParams const& p, Emit const& emit) const {
    for (int64_t t = 0; t < p.tokens; ++t) {
      float z = bias;
      for (int j = 0; j < p.width; ++j) z = fmaf(weight[j], to_float(input(p, t + 1 + j)), z);
      emit(t, activate(z, p.silu));
    }
  }
  __device__ void store(StepParams const& p, T* to, int64_t tap) const {
    for (int j = 0; j < p.width; ++j) to[j * tap] = input(p, p.tokens + j);
  }

 private:
  // Number i of the window and the tokens after it.
  __device__ T input(StepParams const& p, int64_t i) const {
    return i < p.width ? state[i * p.state.tap] : x[(i - p.width) * p.x.token];
  }
};

// A thread has one channel of one row.
template <class T, int kTaps, bool kPacked>
__global__ void __launch_bounds__(kThreads) step_kernel(__grid_constant__ StepParams const p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int64_t const row = blockIdx.x, channel = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (channel >= p.channels) return;
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
  T* const y = token_row<T>(p.y, row, 0, channel);
  if (slot < 0 || slot >= p.slots) {
    for (int64_t t = 0; t < p.tokens; ++t) y[t * p.y.token] = T(0.f);
    return;
  }
  StepChannel<T, kTaps, kPacked> step;
  step.load(p, row, slot, channel);
  step.advance(p, [&](int64_t t, float x) { y[t * p.y.token] = from_float<T>(x); });
  step.store(p, step.state, p.state.tap);
}

}  // namespace lt2::causal_conv1d::portable
