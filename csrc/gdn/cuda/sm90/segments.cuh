// Few long sequences: each is cut into segments that run side by side. A segment is an affine map of the
// state,
//   S_end = M S_start + N,   M [K x K], N [K x V],
// so three passes give the same result as one: maps (N is a scan from zero, M one of the identity without
// values), a join that walks the segments of each head, and the outputs from the states that it found.
//
// Where a segment has decayed all that came before it, M is zero, and N needs the last tiles only.
// plan_segments decides that for each segment and head on the device, from a bound that holds for any gate,
// strength and key: a token multiplies the norm of a state by at most e^g max(1, |1 - b |k|^2|).
#pragma once

#include "common/cuda/overlap.cuh"
#include "gdn/cuda/sm90/tile.cuh"

namespace lt2::gdn::sm90 {

struct Segments {
  int64_t span;  // tokens of a segment, a multiple of 64; 0: sequences are not cut
  // By the number of a segment, 0..count - 1; null where sequences are not cut.
  // [count, HV, V, K]: before the segment, where that before it has a map; N^T, which is the state after the
  // first segment of a sequence and after those without a map.
  float *starts, *ends;
  float* maps;       // [count, HV, K rounded up to 64, K]: M^T
  int* first_tiles;  // [count, HV]: the first tile on which the end depends; kWhole: on all, and on the start
};

inline constexpr int kWhole = -1;

// What the cut of the work goes by: measured microseconds of a tile in a block with one slice, with two and
// with one in a cluster that shares, without and with helpers aside, and until a block runs at that rate.
inline constexpr float kOneTime = 2.4f, kTwoTime = 3.5f, kSharedTime = 2.35f, kAsideTime = 2, kStartTime = 8;

struct Segment {
  int sequence, index, count;  // count: of the sequence's segments, at least 1
  int row, begin, tokens;      // of this segment
};

// Segments are numbered without reading cu_seqlens on the host, as chunks are: those of a sequence end before
// those of the next one begin, with gaps.
__device__ inline int64_t first_segment(Inputs const& p, int64_t span, int64_t n) {
  portable::Sequence const s = portable::sequence(p, n);
  return (s.row * p.tokens + s.begin) / span + n;
}
inline int64_t segment_numbers(Inputs const& p, int64_t span) {
  return span == 0 ? p.sequences : p.batch * p.tokens / span + p.sequences;
}

// tokens < 0: no segment has this number.
__device__ inline Segment find_segment(Inputs const& p, int64_t span, int64_t number) {
  int64_t low = 0, high = p.sequences;
  if (span == 0) {
    low = number;
  } else {
    while (high - low > 1) {
      int64_t const middle = (low + high) / 2;
      (first_segment(p, span, middle) <= number ? low : high) = middle;
    }
  }
  portable::Sequence const s = portable::sequence(p, low);
  int64_t const index = span == 0 ? 0 : number - first_segment(p, span, low);
  int64_t const count = span == 0 ? 1 : max((s.length + span - 1) / span, int64_t{1});
  int64_t const offset = index * span;
  int64_t const tokens = index >= count ? -1 : span == 0 ? s.length : min(s.length - offset, span);
  return {static_cast<int>(low),
          static_cast<int>(index),
          static_cast<int>(count),
          static_cast<int>(s.row),
          static_cast<int>(s.begin + offset),
          static_cast<int>(tokens)};
}

inline constexpr int kPlanWarps = 8, kPlanRounds = 4, kPlanTiles = kPlanWarps * kPlanRounds;
inline constexpr float kForgotten = -32.f;  // log2

// One block per segment and value head: a warp for each of the last tiles in turn, then a lane.
template <class T>
__global__ void __launch_bounds__(kPlanWarps * 32, 2)
    plan_segments(Inputs const p, Segments const segments, int key_dim) {
  __shared__ float growth[kPlanTiles], scratch[kPlanWarps];
  let_next_kernel_start();
  int const number = blockIdx.x / p.value_heads, head = blockIdx.x % p.value_heads;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Segment const segment = find_segment(p, segments.span, number);
  if (segment.index >= segment.count - 1) {  // nobody asks for the end of a sequence's last one
    if (threadIdx.x == 0) segments.first_tiles[blockIdx.x] = static_cast<int>(segments.span / kTileSide);
    return;
  }
  int const tiles = (segment.tokens + kTileSide - 1) / kTileSide;
  int const qk_head = head / (p.value_heads / p.heads);
  // A warp's tiles, of each two tokens a lane. All gates are asked for at once.
  auto const token_of = [&](int round, int half) {
    return (tiles - 1 - round * kPlanWarps - warp) * kTileSide + half * 32 + lane;
  };
  auto const is_there = [&](int token) { return token >= 0 && token < segment.tokens; };
  float g[kPlanRounds][2], beta[kPlanRounds][2];
#pragma unroll
  for (int round = 0; round < kPlanRounds; ++round) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const token = token_of(round, half);
      int64_t const at = segment.begin + token;
      bool const there = is_there(token);
      bool const decays = there && p.g.data != nullptr, writes = there && p.beta.data != nullptr;
      g[round][half] = decays ? *portable::token_row<float const>(p.g, segment.row, at, head) : 0.f;
      beta[round][half] = writes ? *portable::token_row<float const>(p.beta, segment.row, at, head) : 1.f;
    }
  }
  float sum = 0.f;  // of all that is looked at: keys are read only where it is enough
#pragma unroll
  for (int round = 0; round < kPlanRounds; ++round) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& decay = g[round][half];
      bool const decays = is_there(token_of(round, half)) && p.g.data != nullptr;
      decay = decays ? portable::log_decay(p, decay, head) * kLog2E : 0.f;
      sum += decay;
    }
  }
  int result = kWhole;
  if (block_sum<kPlanWarps * 32>(sum, scratch) < kForgotten) {
#pragma unroll
    for (int round = 0; round < kPlanRounds; ++round) {
      float mine = 0.f;  // how much the tile's tokens multiply the norm of a state by, at most
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const token = token_of(round, half);
        if (!is_there(token)) continue;
        float norm2 = 1.f;  // after l2norm |k| <= 1, so that 1 - b |k|^2 lies between 1 and 1 - b
        if (!p.qk_l2norm) {
          auto const* const k = reinterpret_cast<uint4 const*>(
              portable::token_row<T const>(p.k, segment.row, segment.begin + token, qk_head));
          norm2 = 0.f;
          for (int j = 0; j < key_dim / 8; ++j) {
            uint4 const x = k[j];
            for (uint32_t const pair : {x.x, x.y, x.z, x.w}) {
              float2 const two = unpack<T>(pair);
              norm2 += two.x * two.x + two.y * two.y;
            }
          }
        }
        float const strength = p.beta.data == nullptr ? 1.f : portable::write_strength(p, beta[round][half]);
        mine += g[round][half] + log2f(fmaxf(1.f, fabsf(1.f - strength * norm2)));
      }
      mine = lane_sum(mine);
      if (lane == 0) growth[round * kPlanWarps + warp] = mine;
    }
    __syncthreads();
    float total = growth[lane];  // of the tiles from here on
#pragma unroll
    for (int d = 1; d < kPlanTiles; d *= 2) {
      float const after = __shfl_up_sync(0xffffffffu, total, d);
      if (lane >= d) total += after;
    }
    uint32_t const enough = __ballot_sync(0xffffffffu, total < kForgotten && lane < tiles);
    if (enough != 0) result = tiles - __ffs(enough);
  }
  if (threadIdx.x == 0) segments.first_tiles[blockIdx.x] = result;
}

inline constexpr int kJoinRows = 8, kJoinColumns = 2;
// How many threads share a sum.
template <int kKeyDim>
inline constexpr int kJoinParts = kKeyDim > 128 ? 4 : 8;
template <int kKeyDim>
inline constexpr int kJoinThreads = kKeyDim / kJoinColumns * kJoinParts<kKeyDim>;

// The starts of segments whose predecessor has a map; others start from what is in `ends` of theirs. One
// block per sequence, value head and kJoinRows value columns: a thread has two key columns and a part of the
// sum.
template <int kKeyDim>
__global__ void __launch_bounds__(kJoinThreads<kKeyDim>, 1)
    join_segments(Inputs const p, Segments const segments) {
  constexpr int kMapRows = (kKeyDim + kTileSide - 1) / kTileSide * kTileSide, kParts = kJoinParts<kKeyDim>,
                kTerms = kKeyDim / kParts, kOwn = kJoinRows / kParts;
  __shared__ __align__(16) float state[kJoinRows][kKeyDim];
  __shared__ __align__(16) float partial[kParts][kJoinRows][kKeyDim];
  let_next_kernel_start();
  int const groups = p.value_dim / kJoinRows;
  int const group = blockIdx.x % groups, unit = blockIdx.x / groups;
  int const head = unit % p.value_heads, n = unit / p.value_heads;
  int const column = threadIdx.x % (kKeyDim / kJoinColumns) * kJoinColumns,
            part = threadIdx.x / (kKeyDim / kJoinColumns);
  int64_t const first = first_segment(p, segments.span, n);
  int const count = find_segment(p, segments.span, first).count;
  int64_t const offset = static_cast<int64_t>(group) * kJoinRows * kKeyDim + column;
  auto const at = [&](int i) { return (first + i) * p.value_heads + head; };
  // The first segment from i on that has a map, a successor and a start that is not that of the sequence; or
  // `count`. By whole warps.
  auto const next_mapped = [&](int i) {
    for (; i + 1 < count; i += 32) {
      int const mine = i + static_cast<int>(threadIdx.x % 32);
      bool const mapped = mine + 1 < count && segments.first_tiles[at(mine)] == kWhole;
      if (uint32_t const some = __ballot_sync(0xffffffffu, mapped); some != 0) return i + __ffs(some) - 1;
    }
    return count;
  };
  auto const rows_of = [&](float* states, int i, int r) {
    return reinterpret_cast<float2*>(states + at(i) * p.value_dim * kKeyDim + offset +
                                     (part + r * kParts) * kKeyDim);
  };
  auto const map_of = [&](int i, int j) {
    return *reinterpret_cast<float2 const*>(segments.maps + (at(i) * kMapRows + part * kTerms + j) * kKeyDim +
                                            column);
  };
  int i = next_mapped(1), joined = 0;  // the segment whose end is in `state`
  // Blocks without work make room for others at once. The plan is older than the maps; one block always waits
  // for these, so that what waits for the join waits for both.
  if (i == count && blockIdx.x > 0) return;
  wait_for_previous_kernel();
  if (i == count) return;
  float2 map[kTerms];
#pragma unroll
  for (int j = 0; j < kTerms; ++j) map[j] = map_of(i, j);
  while (i < count) {
    int const next = next_mapped(i + 1);
    float2 end[kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) end[r] = *rows_of(segments.ends, i, r);
    if (joined == 0 || joined + 1 != i) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r)
        *reinterpret_cast<float2*>(&state[part + r * kParts][column]) = *rows_of(segments.ends, i - 1, r);
      __syncthreads();
    }
    float2 sum[kJoinRows] = {};
#pragma unroll
    for (int j = 0; j < kTerms; j += 4) {
#pragma unroll
      for (int r = 0; r < kJoinRows; ++r) {
        float4 const s = *reinterpret_cast<float4 const*>(&state[r][part * kTerms + j]);
        sum[r].x += s.x * map[j].x + s.y * map[j + 1].x + s.z * map[j + 2].x + s.w * map[j + 3].x;
        sum[r].y += s.x * map[j].y + s.y * map[j + 1].y + s.z * map[j + 2].y + s.w * map[j + 3].y;
      }
      if (next < count) {
#pragma unroll
        for (int m = j; m < j + 4; ++m) map[m] = map_of(next, m);
      }
    }
#pragma unroll
    for (int r = 0; r < kJoinRows; ++r) *reinterpret_cast<float2*>(&partial[part][r][column]) = sum[r];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      int const row = part + r * kParts;
#pragma unroll
      for (int q = 0; q < kParts; ++q) {
        float2 const x = *reinterpret_cast<float2 const*>(&partial[q][row][column]);
        end[r].x += x.x;
        end[r].y += x.y;
      }
      *reinterpret_cast<float2*>(&state[row][column]) = end[r];
      *rows_of(segments.starts, i + 1, r) = end[r];
    }
    __syncthreads();
    joined = i;
    i = next;
  }
}

}  // namespace lt2::gdn::sm90
