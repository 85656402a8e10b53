// The decode step with the short convolution before and the gated RMSNorm after it, in one launch.
//
// A cluster has one row and query/key head with all its value heads. Its blocks share out the columns of
// every state, in slices, and the channels of q and k: a block convolves its part of them, updates their
// window, and gives the result to all blocks. So every state and every window is read and written once, by
// one block. The sums of squares for the norm meet the same way.
#pragma once

#include "causal_conv1d/cuda/portable/forward.cuh"
#include "common/cuda/cluster.cuh"
#include "gdn/cuda/sm90/decode.cuh"

namespace lt2::gdn::portable {

using namespace sm90;  // tiles of states

// One slice of one value head.
template <class Tile>
struct FusedItem {
  typename Tile::Writes writes;
  float o[kMaxStepTokens][Tile::kColumns];
};

// Shared memory of a block: this, `items` FusedItems, and two floats for each value head and token.
template <class Tile>
struct FusedShared {
  typename Tile::Keys keys;
  typename Tile::Shared sums;
};

template <class Tile>
int fused_shared_bytes(int items, int group) {
  return static_cast<int>(sizeof(FusedShared<Tile>) + items * sizeof(FusedItem<Tile>) +
                          2 * group * kMaxStepTokens * sizeof(float));
}

template <class T, class Emit>
__device__ void convolve(causal_conv1d::StepParams const& p, int64_t row, int64_t slot, int64_t channel,
                         Emit const& emit) {
  if (p.width <= 4) {
    causal_conv1d::portable::step_channel<T, 4, false>(p, row, slot, channel, emit);
  } else {
    causal_conv1d::portable::step_channel<T, causal_conv1d::kMaxWidth, false>(p, row, slot, channel, emit);
  }
}

// Block (rank in its cluster, query/key head, row); `slices` cover the columns of a state, block r has the
// slices r, r + blocks, ..
template <class T, class Tile>
__global__ void __launch_bounds__(kStepThreads, sizeof(Tile) <= 128 ? 4 : 2)
    fused_kernel(__grid_constant__ FusedStepParams const p, int slices) {
  extern __shared__ __align__(16) char shared_bytes[];
  constexpr int kColumns = Tile::kColumns;
  StepParams const& s = p.step;
  int const rank = blockIdx.x, blocks = gridDim.x, key_head = blockIdx.y;
  int const group = s.value_heads / s.heads, first_head = key_head * group;
  int const own = (slices - rank + blocks - 1) / blocks, items = group * own;
  int64_t const row = blockIdx.z;
  auto& shared = *reinterpret_cast<FusedShared<Tile>*>(shared_bytes);
  auto* const item = reinterpret_cast<FusedItem<Tile>*>(&shared + 1);  // number g * own + l
  float* const squares = reinterpret_cast<float*>(item + group * ((slices + blocks - 1) / blocks));
  float* const norms = squares + group * kMaxStepTokens;  // both of (g, token), number g * tokens + token
  auto const first_column = [&](int n) { return (rank + n % own * blocks) * kColumns; };
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  cluster_arrive();
  wait_for_previous_kernel();
  let_next_kernel_start();
  int64_t const slot = s.slot_ids == nullptr ? row : s.slot_ids[row];
  bool const live = slot >= 0 && slot < s.slots;
  Tile tile;
  auto const state_of = [&](int n) { return state_rows(s, live ? slot : 0, first_head + n / own); };
  if (live) tile.load(state_of(0), first_column(0), s.key_dim, s.value_dim);
  auto const each_output = [&](auto const& value) {
    for (int e = threadIdx.x; e < items * s.tokens * kColumns; e += kStepThreads) {
      int const c = e % kColumns, i = e / kColumns % s.tokens, n = e / kColumns / s.tokens;
      int const column = first_column(n) + c, head = first_head + n / own;
      if (column < s.value_dim)
        token_row<T>(s.o, row, i, head)[column] = from_float<T>(value(n, i, c, head, column));
    }
  };
  cluster_wait();  // every block of the cluster runs: its shared memory may be written
  if (!live) return each_output([](int, int, int, int, int) { return 0.f; });

  int const keys = 2 * s.key_dim, share = (keys + blocks - 1) / blocks;
  int const begin = min(rank * share, keys), mine = min(share, keys - begin);
  for (int e = threadIdx.x; e < mine + items * kColumns; e += kStepThreads) {
    if (e < mine) {
      int const c = (begin + e) % s.key_dim;
      bool const is_q = begin + e < s.key_dim;
      int64_t const channel = (is_q ? key_head : s.heads + key_head) * int64_t{s.key_dim} + c;
      convolve<T>(p.conv, row, slot, channel, [&](int64_t i, float x) {
        float* const to = is_q ? &shared.keys.q[i][c] : &shared.keys.k[i][c];
        for (int r = 0; r < blocks; ++r) *of_rank(to, r) = x;
      });
    } else {
      int const n = (e - mine) / kColumns, c = (e - mine) % kColumns, column = first_column(n) + c;
      int64_t const channel = int64_t{s.heads} * keys + int64_t{first_head + n / own} * s.value_dim + column;
      if (column < s.value_dim) {
        convolve<T>(p.conv, row, slot, channel, [&](int64_t i, float x) { item[n].writes.v[i][c] = x; });
      } else {
        for (int i = 0; i < s.tokens; ++i) item[n].writes.v[i][c] = 0.f;
      }
    }
  }
  int const padding = Tile::kKeys - s.key_dim;
  for (int e = threadIdx.x; e < padding * s.tokens; e += kStepThreads) {
    int const i = e / padding, c = s.key_dim + e % padding;
    shared.keys.q[i][c] = shared.keys.k[i][c] = 0.f;
  }
  for (int e = threadIdx.x; e < items * s.tokens; e += kStepThreads) {
    Gates gates;
    gates.load(s, row, e % s.tokens, first_head + e / s.tokens / own);
    gates.store(s, item[e / s.tokens].writes, e % s.tokens);
  }
  cluster_sync();

  for (int i = warp; i < s.tokens; i += kStepWarps) {
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
    for (int i = 0; i < s.tokens; ++i) {
      advance(tile, shared.keys, item[n].writes, shared.sums, i, [&](int j, float x) {
        if (Tile::leads()) item[n].o[i][Tile::column(j)] = s.scale * x;
      });
    }
    tile.store(state_of(n), first_column(n), s.key_dim, s.value_dim);
  }
  __syncthreads();

  for (int e = warp; e < group * s.tokens; e += kStepWarps) {
    int const g = e / s.tokens, i = e % s.tokens;
    float sum = 0.f;  // columns beyond the state are zeros
    for (int c = lane; c < own * kColumns; c += kWarp) {
      float const x = item[g * own + c / kColumns].o[i][c % kColumns];
      sum = fmaf(x, x, sum);
    }
    sum = lane_sum(sum);
    if (lane == 0) squares[e] = sum;
  }
  cluster_sync();
  for (int e = threadIdx.x; e < group * s.tokens; e += kStepThreads) {
    float sum = 0.f;
    for (int r = 0; r < blocks; ++r) sum += *of_rank(squares + e, r);
    norms[e] = rsqrtf(sum / s.value_dim + p.eps);
  }
  cluster_arrive();
  __syncthreads();
  each_output([&](int n, int i, int c, int head, int column) {
    float const z = to_float(token_row<T const>(p.z, row, i, head)[column]);
    return item[n].o[i][c] * norms[n / own * s.tokens + i] * p.norm_weight[column] * z * sigmoid(z);
  });
  cluster_wait();  // nobody leaves while another block reads its sums
}

}  // namespace lt2::gdn::portable
