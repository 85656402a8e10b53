// The decode step with the short convolution before and the gated RMSNorm after it, in one launch.
//
// A cluster has one row and query/key head with all its value heads. Its blocks share out the columns of
// every state, in slices, with the channels of v that belong to them. What all of them need, q and k, every
// block convolves for itself: reading the windows again is cheaper than waiting for another block. Each block
// has a share of these channels whose windows it writes, once all blocks have read them. So every state is
// read and written once, by one block, and the only thing that a block ever waits for are the other blocks'
// sums of squares for the norm.
#pragma once

#include "causal_conv1d/cuda/portable/forward.cuh"
#include "common/cuda/cluster.cuh"
#include "common/cuda/sm90/barrier.cuh"
#include "gdn/cuda/sm90/decode.cuh"

namespace lt2::gdn::portable {

using namespace sm90;  // tiles of states
using causal_conv1d::portable::kFewTaps;
using causal_conv1d::portable::StepChannel;
using causal_conv1d::portable::WideStepChannel;
using cuda::sm90::Barrier;

// Blocks of a cluster, at most.
inline constexpr int kMaxCluster = 8;

// One slice of one value head.
template <class Tile>
struct FusedItem {
  typename Tile::Writes writes;
  float o[kMaxStepTokens][Tile::kColumns];
  float factor[kMaxStepTokens][Tile::kColumns];  // weight silu(z)
};

// Shared memory of a block: this, `items` FusedItems, the sums of squares of every block, [blocks, group,
// tokens], and the new windows of its share of q and k, [share, W].
template <class Tile>
struct FusedShared {
  typename Tile::Keys keys;
  typename Tile::Shared sums;
  Barrier joined;  // has what all blocks of the cluster send
};

// x to `to` in block `rank`. A message, or a barrier of the cluster that made ordinary writes visible would
// wait for all that the block wrote to global memory.
__device__ __forceinline__ void deliver(float* to, float x, Barrier& joined, int rank, int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) return cuda::sm90::send(to, x, joined, rank);
#endif
  *to = x;
}
// All threads of the block call it once.
__device__ __forceinline__ void await_delivery(Barrier& joined, int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) return joined.wait(0);
#endif
  __syncthreads();
}

// To L2.
__device__ __forceinline__ void ask_for(void const* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

struct FusedSizes {
  int slices, blocks;  // of a state, of a cluster
  int own, group;      // slices of a block at most, value heads of a query/key head
  int share;           // channels of q and k whose windows a block writes

  template <class T, class Tile>
  int shared_bytes(int width) const {
    return static_cast<int>(sizeof(FusedShared<Tile>) + own * group * sizeof(FusedItem<Tile>) +
                            blocks * group * kMaxStepTokens * sizeof(float) + share * width * sizeof(T));
  }
};

// Most calls have one token and blocks with one slice: no division then.
__device__ __forceinline__ int quotient(int a, int b) { return b == 1 ? a : a / b; }
__device__ __forceinline__ int remainder(int a, int b) { return b == 1 ? 0 : a % b; }

// Block (rank in its cluster, query/key head, row); block r has the slices r, r + blocks, ..
// kPlain: one token, one value head per query/key head, one slice per block, and windows of 4 adjacent taps.
// Nearly every step is, and its code, which each launch fetches anew, is much shorter.
template <class T, class Tile, bool kPlain>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kThreads > kStepThreads ? 1
                                                  : sizeof(Tile) <= 128         ? 4
                                                                                : 2)
    fused_kernel(__grid_constant__ FusedStepParams const p, FusedSizes const sizes) {
  extern __shared__ __align__(16) char shared_bytes[];
  constexpr int kColumns = Tile::kColumns, kThreads = Tile::kThreads, kWarps = kThreads / kWarp;
  StepParams const& s = p.step;
  causal_conv1d::StepParams plain = p.conv;
  if constexpr (kPlain) plain.tokens = 1, plain.width = kFewTaps, plain.state.tap = 1;
  causal_conv1d::StepParams const& conv = kPlain ? plain : p.conv;
  int const rank = blockIdx.x, blocks = sizes.blocks, key_head = blockIdx.y;
  int const tokens = kPlain ? 1 : s.tokens, group = kPlain ? 1 : sizes.group, most = kPlain ? 1 : sizes.own;
  int const first_head = key_head * group;
  int const own = kPlain ? 1 : quotient(sizes.slices - rank + blocks - 1, blocks), items = group * own;
  int64_t const row = blockIdx.z;
  auto& shared = *reinterpret_cast<FusedShared<Tile>*>(shared_bytes);
  auto* const item = reinterpret_cast<FusedItem<Tile>*>(&shared + 1);  // number g * own + l
  float* const squares = reinterpret_cast<float*>(item + group * most);
  T* const windows = reinterpret_cast<T*>(squares + blocks * group * kMaxStepTokens);
  auto const first_column = [&](int n) { return (rank + remainder(n, own) * blocks) * kColumns; };
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

#if __CUDA_ARCH__ >= 900
  if (warp == 0) {
    if (lane == 0) {
      shared.joined.init(1);
      shared.joined.arrive_expecting(blocks * group * tokens * sizeof(float));
      cuda::sm90::fence_barrier_init();
    }
    __syncwarp();
  }
#endif
  cluster_arrive_relaxed();
  if (!p.settled) wait_for_previous_kernel();
  int64_t const slot = s.slot_ids == nullptr ? row : s.slot_ids[row];
  bool const live = slot >= 0 && slot < s.slots;
  Tile tile;
  auto const state_of = [&](int n) {
    return state_rows<float>(s, live ? slot : 0, first_head + quotient(n, own));
  };
  if (live) tile.load(state_of(0), first_column(0), s.key_dim, s.value_dim);
  auto const each_output = [&](auto const& value) {
    for (int e = threadIdx.x; e < items * tokens * kColumns; e += kThreads) {
      int const c = e % kColumns, i = remainder(e / kColumns, tokens), n = quotient(e / kColumns, tokens);
      int const column = first_column(n) + c, head = first_head + quotient(n, own);
      if (column < s.value_dim)
        token_row<T>(s.o, row, i, head)[column] = from_float<T>(value(n, i, c, head, column));
    }
  };
  int const keys = 2 * s.key_dim, begin = rank * sizes.share;
  auto const key_channel = [&](int e) {
    int const head = e < s.key_dim ? key_head : s.heads + key_head, c = e < s.key_dim ? e : e - s.key_dim;
    return int64_t{head} * s.key_dim + c;
  };
  auto const value_channel = [&](int n, int column) {
    return int64_t{s.heads} * keys + int64_t{first_head + quotient(n, own)} * s.value_dim + column;
  };
  if (p.settled && live) {
    auto const ask = [&](int64_t channel) {
      ask_for(static_cast<T const*>(conv.state.data) + slot * conv.state.sequence +
              channel * conv.state.channel);
      ask_for(conv.weight + channel * conv.width);
    };
    for (int e = threadIdx.x; e < keys; e += kThreads) ask(key_channel(e));
    for (int e = threadIdx.x; e < items * kColumns; e += kThreads) {
      int const n = e / kColumns, column = first_column(n) + e % kColumns;
      if (column < s.value_dim) ask(value_channel(n, column));
    }
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (!live) {
    each_output([](int, int, int, int, int) { return 0.f; });
    return cluster_wait();
  }

  auto const convolve = [&](auto channel_kind) {
    using Channel = decltype(channel_kind);
    auto const load_key = [&](Channel& step, int e) { step.load(conv, row, slot, key_channel(e)); };
    auto const advance_key = [&](Channel& step, int e) {
      float* const to = e < s.key_dim ? &shared.keys.q[0][e] : &shared.keys.k[0][e - s.key_dim];
      step.advance(conv, [&](int64_t i, float x) { to[i * Tile::kKeys] = x; });
      if (e >= begin && e < begin + sizes.share) step.store(conv, windows + (e - begin) * conv.width, 1);
    };
    constexpr int kKeyChannels = 2;  // of a thread at a time
    Channel step[kKeyChannels];
#pragma unroll
    for (int r = 0; r < kKeyChannels; ++r) {
      int const e = r * kThreads + threadIdx.x;
      if (e < keys) load_key(step[r], e);
    }
    // While these are on their way: a thread has a channel of v, or an element of z.
    int const channels = items * kColumns;
    constexpr int kKeysFirst = kThreads > kStepThreads ? kThreads / 2 : 0;  // threads busy with q and k
    for (int e = (threadIdx.x + kThreads - kKeysFirst) % kThreads; e < channels * (1 + tokens);
         e += kThreads) {
      if (e < channels) {
        int const n = e / kColumns, c = e % kColumns, column = first_column(n) + c;
        if (column < s.value_dim) {
          int64_t const channel = value_channel(n, column);
          Channel of_value;
          of_value.load(conv, row, slot, channel);
          of_value.advance(conv, [&](int64_t i, float x) { item[n].writes.v[i][c] = x; });
          of_value.store(conv, of_value.state, conv.state.tap);
        } else {
          for (int i = 0; i < tokens; ++i) item[n].writes.v[i][c] = 0.f;
        }
      } else {
        int const c = e % kColumns, line = (e - channels) / kColumns;
        int const i = remainder(line, tokens), n = quotient(line, tokens);
        int const column = first_column(n) + c, head = first_head + quotient(n, own);
        Gates gates;
        if (c == 0) gates.load(s, row, i, head);
        if (column < s.value_dim) {
          float const z = to_float(token_row<T const>(p.z, row, i, head)[column]);
          item[n].factor[i][c] = p.norm_weight[column] * z * sigmoid(z);
        }
        if (c == 0) gates.store(s, item[n].writes, i);
      }
    }
#pragma unroll
    for (int r = 0; r < kKeyChannels; ++r) {
      int const e = r * kThreads + threadIdx.x;
      if (e < keys) advance_key(step[r], e);
    }
    if constexpr (2 * Tile::kKeys > kKeyChannels * kThreads) {
      for (int e = kKeyChannels * kThreads + threadIdx.x; e < keys; e += kThreads) {
        load_key(step[0], e);
        advance_key(step[0], e);
      }
    }
  };
  if (kPlain || conv.width <= kFewTaps) {
    convolve(StepChannel<T, kFewTaps, kPlain>{});
  } else {
    convolve(WideStepChannel<T>{});
  }
  int const padding = Tile::kKeys - s.key_dim;
  for (int e = threadIdx.x; e < padding * tokens; e += kThreads) {
    int const i = e / padding, c = s.key_dim + e % padding;
    shared.keys.q[i][c] = shared.keys.k[i][c] = 0.f;
  }
  cluster_wait();            // every block of the cluster runs: its shared memory may be written
  cluster_arrive_relaxed();  // this one has read the windows of q and k
  __syncthreads();

  for (int i = warp; i < tokens; i += kWarps) {
    constexpr int kPerLane = Tile::kKeys / kWarp;
    float q[kPerLane], k[kPerLane];
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      q[e] = shared.keys.q[i][e * kWarp + lane];
      k[e] = shared.keys.k[i][e * kWarp + lane];
    }
    store_keys(shared.keys, i, s.qk_l2norm, q, k);
  }
  for (int n = 0; n < items; ++n) {
    if (n > 0) tile.load(state_of(n), first_column(n), s.key_dim, s.value_dim);
    __syncthreads();
    for (int i = 0; i < tokens; ++i) {
      advance(tile, shared.keys, item[n].writes, shared.sums, i, [&](int j, float x) {
        if (Tile::leads()) item[n].o[i][Tile::column(j)] = s.scale * x;
      });
    }
    tile.store(state_of(n), first_column(n), s.key_dim, s.value_dim);
  }
  __syncthreads();

  for (int e = warp; e < group * tokens; e += kWarps) {
    int const g = quotient(e, tokens), i = remainder(e, tokens);
    float sum = 0.f;  // columns beyond the state are zeros
    for (int c = lane; c < own * kColumns; c += kWarp) {
      float const x = item[g * own + c / kColumns].o[i][c % kColumns];
      sum = fmaf(x, x, sum);
    }
    sum = lane_sum(sum);
    if (lane < blocks) deliver(squares + rank * group * kMaxStepTokens + e, sum, shared.joined, lane, blocks);
  }
  cluster_wait();  // every block has read the windows
  for (int e = threadIdx.x; e < min(sizes.share, keys - begin) * conv.width; e += kThreads) {
    int const c = begin + e / conv.width, w = e % conv.width;
    int64_t const head = c < s.key_dim ? key_head : s.heads + key_head;
    int64_t const channel = head * s.key_dim + (c < s.key_dim ? c : c - s.key_dim);
    static_cast<T*>(
        conv.state.data)[slot * conv.state.sequence + channel * conv.state.channel + w * conv.state.tap] =
        windows[e];
  }
  await_delivery(shared.joined, blocks);
  each_output([&](int n, int i, int c, int, int) {
    float sum = 0.f;
    for (int r = 0; r < blocks; ++r)
      sum += squares[(r * group * kMaxStepTokens) + quotient(n, own) * tokens + i];
    return item[n].o[i][c] * rsqrtf(sum / s.value_dim + p.eps) * item[n].factor[i][c];
  });
}

}  // namespace lt2::gdn::portable
