// Kernel bodies and function table of one instruction set; causal_conv1d_<isa>.cpp compiles it.
//
// Tokens are worked on in tiles whose accumulators stay in registers while the taps pass by: kTile tokens, or
// one at the end of a sequence and when decoding. A token's sum always runs in the same order by the same
// instructions, so splitting a sequence never changes a bit.
#pragma once

#include "causal_conv1d/cpu/kernels.h"
#include "common/cpu/simd.h"

namespace lt2::causal_conv1d::LT2_ISA {
namespace {

using namespace lt2::LT2_ISA;

constexpr int kTile = 8;

template <class T>
inline Vec load_some(T const* p, int n) {
  if (n == kLanes) return load(p);
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_some(T* p, Vec v, int n) {
  if (n == kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  __builtin_memcpy(p, padded, n * sizeof(T));
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// f(c, n) for each vector of the n channels [c, c + n) in a block of `channels`.
template <class F>
inline void for_each_vec(int channels, F const& f) {
  for (int c = 0; c < channels; c += kLanes) f(c, channels - c < kLanes ? channels - c : kLanes);
}

// Weights of a channel block in fp32, one row per tap, and the bias. Rows are padded with zeros.
struct Taps {
  alignas(64) float weight[kMaxWidth][kBlockChannels];
  alignas(64) float bias[kBlockChannels] = {};
  int width;

  Taps(float const* weights, float const* biases, int width, int64_t channel, int channels) : width(width) {
    __builtin_memset(weight, 0, width * sizeof(weight[0]));
    for (int c = 0; c < channels; ++c) {
      for (int w = 0; w < width; ++w) weight[w][c] = weights[(channel + c) * width + w];
      if (biases != nullptr) bias[c] = biases[channel + c];
    }
  }
};

// Rows of a channel block of one sequence [first, last): inputs, before them the state, after them zeros.
template <class T>
struct Window {
  T const* x;  // row of token 0 of the batch row
  int64_t token_stride, first, last;
  int width;
  T history[kMaxWidth][kBlockChannels] = {};  // rows of tokens [first - width, first)
  T zeros[kBlockChannels] = {};

  T const* row(int64_t token) const {
    if (token >= last) return zeros;
    return token >= first ? x + token * token_stride : history[token - first + width];
  }
};

// Element [w][c] of a block of states, transposed: channels are contiguous in the kernels, taps in the state.
template <class T, class S>
inline void load_state(State const& state, int64_t sequence, int64_t channel, int channels, int width,
                       S (*rows)[kBlockChannels]) {
  T const* const from =
      static_cast<T const*>(state.data) + sequence * state.sequence + channel * state.channel;
  for (int c = 0; c < channels; ++c) {
    for (int w = 0; w < width; ++w) {
      T const value = from[c * state.channel + w * state.tap];
      if constexpr (sizeof(S) == sizeof(T)) {
        rows[w][c] = value;
      } else {
        rows[w][c] = to_float(value);
      }
    }
  }
}

template <class T, class Row>
inline void store_state(State const& state, int64_t sequence, int64_t channel, int channels, int width,
                        Row const& row) {
  T* const to = static_cast<T*>(state.data) + sequence * state.sequence + channel * state.channel;
  T const* rows[kMaxWidth];
  for (int w = 0; w < width; ++w) rows[w] = row(w);
  for (int c = 0; c < channels; ++c) {
    for (int w = 0; w < width; ++w) to[c * state.channel + w * state.tap] = rows[w][c];
  }
}

// acc[i] += sum_w weight[w] rows[i + w], for the channels [c, c + n). Sums in a local array: it becomes
// registers.
template <bool kWhole, class T, int kTokens>
inline void accumulate(T const* const* rows, float const (*weight)[kBlockChannels], int width, int c, int n,
                       Vec (&acc)[kTokens]) {
  Vec sum[kTokens];
  for (int i = 0; i < kTokens; ++i) sum[i] = acc[i];
  for (int w = 0; w < width; ++w) {
    Vec const tap = load(weight[w] + c);
    for (int i = 0; i < kTokens; ++i) sum[i] += tap * load_some(rows[i + w] + c, kWhole ? kLanes : n);
  }
  for (int i = 0; i < kTokens; ++i) acc[i] = sum[i];
}

template <class T, int kTokens>
inline void convolve(T const* const* rows, float const (*weight)[kBlockChannels], int width, int c, int n,
                     Vec (&acc)[kTokens]) {
  (n == kLanes ? accumulate<true, T, kTokens> : accumulate<false, T, kTokens>)(rows, weight, width, c, n,
                                                                               acc);
}

template <class T, int kTokens>
inline void convolve_inputs(T const* const* rows, Taps const& taps, int c, int n, Vec (&z)[kTokens]) {
  for (int i = 0; i < kTokens; ++i) z[i] = load(taps.bias + c);
  convolve(rows, taps.weight, taps.width, c, n, z);
}

inline Vec sigmoids(Vec z) { return 1.f / (1.f + exp(-z)); }

// y of the tokens [t, t + kTokens), y being its row of token 0.
template <int kTokens, class T, class Y>
inline void convolve_tile(Window<T> const& window, Taps const& taps, int channels, bool silu, int64_t t, Y* y,
                          int64_t y_stride) {
  T const* rows[kTokens + kMaxWidth - 1];
  for (int i = 0; i < kTokens + taps.width - 1; ++i) rows[i] = window.row(t - taps.width + 1 + i);
  for_each_vec(channels, [&](int c, int n) {
    Vec z[kTokens];
    convolve_inputs(rows, taps, c, n, z);
    for (int i = 0; i < kTokens; ++i) {
      store_some(y + (t + i) * y_stride + c, silu ? z[i] * sigmoids(z[i]) : z[i], n);
    }
  });
}

template <class T, class Y>
inline void convolve_tokens(Window<T> const& window, Taps const& taps, int channels, bool silu, int64_t begin,
                            int64_t end, Y* y, int64_t y_stride) {
  int64_t t = begin;
  for (; t + kTile <= end; t += kTile) convolve_tile<kTile>(window, taps, channels, silu, t, y, y_stride);
  for (; t < end; ++t) convolve_tile<1>(window, taps, channels, silu, t, y, y_stride);
}

template <class T>
inline Window<T> window_of(Inputs const& p, Chunk const& chunk, int64_t channel, int channels) {
  Window<T> window{.x = static_cast<T const*>(p.x.data) + chunk.row * p.x.batch + channel,
                   .token_stride = p.x.token,
                   .first = chunk.first,
                   .last = chunk.last,
                   .width = p.width};
  if (p.initial_state.data != nullptr) {
    load_state<T>(p.initial_state, chunk.sequence, channel, channels, p.width, window.history);
  }
  return window;
}

inline int channels_of(int64_t all, int64_t channel) {
  return static_cast<int>(min(kBlockChannels, all - channel));
}

template <class T>
void forward_item(ForwardParams const& p, Chunk const& chunk, int64_t channel) {
  int const channels = channels_of(p.channels, channel);
  Taps const taps(p.weight, p.bias, p.width, channel, channels);
  auto const window = window_of<T>(p, chunk, channel, channels);
  convolve_tokens(window, taps, channels, p.silu, chunk.begin, chunk.end,
                  static_cast<T*>(p.y.data) + chunk.row * p.y.batch + channel, p.y.token);
  if (p.final_state.data != nullptr && chunk.end == chunk.last) {
    store_state<T>(p.final_state, chunk.sequence, channel, channels, p.width,
                   [&](int w) { return window.row(chunk.last - p.width + w); });
  }
}

// Gradients of z for the tokens [begin, limit) of a chunk: its own, and the width - 1 after it that see its
// inputs.
struct GradientRows {
  int64_t begin, limit;
  alignas(64) float dz[kChunkTokens + kMaxWidth + kTile][kBlockChannels];
  alignas(64) float zeros[kBlockChannels] = {};

  float const* row(int64_t token) const {
    return token < begin || token >= limit ? zeros : dz[token - begin];
  }
};

// dz of tokens [begin, end); sums, unless null, gains sum_t dz_t x_{t-W+1+w} in row w and sum_t dz_t in row
// W.
template <class T>
inline void gradient_tokens(BackwardParams const& p, Window<T> const& window, Taps const& taps, int channels,
                            T const* dy, int64_t begin, int64_t end, GradientRows& gradients,
                            float (*sums)[kBlockChannels]) {
  for (int64_t t = begin; t < end; t += kTile) {
    T const* rows[kTile + kMaxWidth - 1];
    for (int i = 0; i < kTile + p.width - 1; ++i) rows[i] = window.row(t - p.width + 1 + i);
    T const* dy_rows[kTile];
    for (int i = 0; i < kTile; ++i) dy_rows[i] = t + i < end ? dy + (t + i) * p.dy.token : window.zeros;
    for_each_vec(channels, [&](int c, int n) {
      Vec z[kTile], dz[kTile];
      if (p.silu) convolve_inputs(rows, taps, c, n, z);
      for (int i = 0; i < kTile; ++i) {
        dz[i] = load_some(dy_rows[i] + c, n);
        if (p.silu) {
          Vec const s = sigmoids(z[i]);
          dz[i] *= s * (1.f + z[i] * (1.f - s));
        }
        store(gradients.dz[t - gradients.begin + i] + c, dz[i]);
      }
      if (sums == nullptr) return;
      for (int w = 0; w < p.width; ++w) {
        Vec sum = load(sums[w] + c);
        for (int i = 0; i < kTile; ++i) sum += dz[i] * load_some(rows[i + w] + c, n);
        store(sums[w] + c, sum);
      }
      Vec sum = load(sums[p.width] + c);
      for (int i = 0; i < kTile; ++i) sum += dz[i];
      store(sums[p.width] + c, sum);
    });
  }
}

// dx_u = sum_w weight[w] dz_{u+W-1-w}, and what dfinal_state adds to the last W inputs. The inputs before the
// first token are the initial state.
template <class T>
inline void input_gradients(BackwardParams const& p, Chunk const& chunk, Taps const& taps, int64_t channel,
                            int channels, GradientRows const& gradients) {
  alignas(64) float reversed[kMaxWidth][kBlockChannels], dfinal[kMaxWidth][kBlockChannels] = {};
  for (int w = 0; w < p.width; ++w) {
    __builtin_memcpy(reversed[w], taps.weight[p.width - 1 - w], sizeof(reversed[w]));
  }
  if (p.dfinal_state.data != nullptr) {
    load_state<T>(p.dfinal_state, chunk.sequence, channel, channels, p.width, dfinal);
  }
  bool const with_state = p.dinitial_state.data != nullptr && chunk.begin == chunk.first;
  int64_t const from = chunk.begin - (with_state ? p.width : 0);
  T dinitial[kMaxWidth][kBlockChannels];
  T* const dx = static_cast<T*>(p.dx.data) + chunk.row * p.dx.batch + channel;
  for (int64_t u = from; u < chunk.end; u += kTile) {
    float const* rows[kTile + kMaxWidth - 1];
    for (int i = 0; i < kTile + p.width - 1; ++i) rows[i] = gradients.row(u + i);
    int const live = static_cast<int>(min(kTile, chunk.end - u));
    for_each_vec(channels, [&](int c, int n) {
      Vec sum[kTile] = {};
      convolve(rows, reversed, p.width, c, kLanes, sum);
      for (int i = 0; i < live; ++i) {
        int64_t const token = u + i, final_tap = token - (chunk.last - p.width);
        if (final_tap >= 0) sum[i] += load(dfinal[final_tap] + c);
        T* const to = token < chunk.first ? dinitial[token - chunk.first + p.width] : dx + token * p.dx.token;
        store_some(to + c, sum[i], n);
      }
    });
  }
  if (with_state) {
    store_state<T>(p.dinitial_state, chunk.sequence, channel, channels, p.width,
                   [&](int w) { return dinitial[w]; });
  }
}

template <class T>
void backward_item(BackwardParams const& p, Chunk const& chunk, int64_t channel, float* partial) {
  int const channels = channels_of(p.channels, channel);
  Taps const taps(p.weight, p.bias, p.width, channel, channels);
  auto const window = window_of<T>(p, chunk, channel, channels);
  T const* const dy = static_cast<T const*>(p.dy.data) + chunk.row * p.dy.batch + channel;
  GradientRows gradients;
  gradients.begin = chunk.begin;
  gradients.limit = min(chunk.end + p.width - 1, chunk.last);
  alignas(64) float sums[kMaxWidth + 1][kBlockChannels] = {};
  gradient_tokens(p, window, taps, channels, dy, chunk.begin, chunk.end, gradients, sums);
  gradient_tokens(p, window, taps, channels, dy, chunk.end, gradients.limit, gradients, nullptr);
  input_gradients<T>(p, chunk, taps, channel, channels, gradients);
  for (int w = 0; w <= p.width; ++w) {
    __builtin_memcpy(partial + w * p.channels + channel, sums[w], channels * sizeof(float));
  }
}

template <class T, class Y = T>
void step_item(StepParams const& p, int64_t row, int64_t channel) {
  int const channels = channels_of(p.channels, channel);
  Y* const y = static_cast<Y*>(p.y.data) + row * p.y.batch + channel;
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row];
  if (slot < 0 || slot >= p.slots) {
    for (int64_t t = 0; t < p.tokens; ++t) __builtin_memset(y + t * p.y.token, 0, channels * sizeof(Y));
    return;
  }
  Taps const taps(p.weight, p.bias, p.width, channel, channels);
  Window<T> window{.x = static_cast<T const*>(p.x.data) + row * p.x.batch + channel,
                   .token_stride = p.x.token,
                   .first = 0,
                   .last = p.tokens,
                   .width = p.width};
  load_state<T>(p.state, slot, channel, channels, p.width, window.history);
  convolve_tokens(window, taps, channels, p.silu, 0, p.tokens, y, p.y.token);
  store_state<T>(p.state, slot, channel, channels, p.width,
                 [&](int w) { return window.row(p.tokens - p.width + w); });
}

void forward(ForwardParams const& p, Chunk const& chunk, int64_t channel) {
  (p.dtype == Dtype::kBFloat16 ? forward_item<Bf16> : forward_item<float>)(p, chunk, channel);
}

void backward(BackwardParams const& p, Chunk const& chunk, int64_t channel, float* partial) {
  (p.dtype == Dtype::kBFloat16 ? backward_item<Bf16> : backward_item<float>)(p, chunk, channel, partial);
}

void reduce(BackwardParams const& p, float const* partials, int64_t chunks, int64_t channel) {
  int const channels = channels_of(p.channels, channel);
  float sums[kBlockChannels];
  for (int w = 0; w <= p.width; ++w) {
    if (w == p.width && p.dbias == nullptr) break;
    for (int c = 0; c < channels; ++c) sums[c] = 0.f;
    for (int64_t i = 0; i < chunks; ++i) {
      float const* const row = partials + (i * (p.width + 1) + w) * p.channels + channel;
      for (int c = 0; c < channels; ++c) sums[c] += row[c];
    }
    for (int c = 0; c < channels; ++c) {
      *(w == p.width ? p.dbias + channel + c : p.dweight + (channel + c) * p.width + w) = sums[c];
    }
  }
}

void step(StepParams const& p, int64_t row, int64_t channel) {
  auto const item = p.dtype != Dtype::kBFloat16 ? step_item<float>
                    : p.y_float32               ? step_item<Bf16, float>
                                                : step_item<Bf16>;
  item(p, row, channel);
}

}  // namespace

extern Kernels const kKernels;
Kernels const kKernels = {&forward, &backward, &reduce, &step};

}  // namespace lt2::causal_conv1d::LT2_ISA
