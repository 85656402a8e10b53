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
  float *starts, *ends;  // [count, HV, V, K]: before the segment; N^T, or the state after a sequence's first
  float* maps;           // [count, HV, K rounded up to 64, K]: M^T
  int* first_tiles;  // [count, HV]: the first tile on which the end depends; kWhole: on all, and on the start
};

inline constexpr int kWhole = -1;

// What the cut of the work goes by: measured microseconds of a tile in a block with one slice, with two and
// with one in a cluster that shares, and until a block runs at that rate.
inline constexpr float kOneTime = 2.4f, kTwoTime = 3.5f, kSharedTime = 2.35f, kStartTime = 8;

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
__global__ void __launch_bounds__(kPlanWarps * 32)
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
  auto const decay_of = [&](int token) {
    bool const there = token >= 0 && token < segment.tokens;
    return there ? portable::log_decay(p, segment.row, segment.begin + token, head) * kLog2E : 0.f;
  };
  // Of a tile's tokens, 2 a lane: how much they multiply the norm of a state by, at most.
  auto const growth_of = [&](int tile) {
    float sum = 0.f;
    for (int token = tile * kTileSide + lane; token < (tile + 1) * kTileSide; token += 32) {
      if (token < 0 || token >= segment.tokens) continue;
      int64_t const at = segment.begin + token;
      float norm2 = 1.f;  // after l2norm |k| <= 1, so that 1 - b |k|^2 lies between 1 and 1 - b
      if (!p.qk_l2norm) {
        auto const* const k =
            reinterpret_cast<uint4 const*>(portable::token_row<T const>(p.k, segment.row, at, qk_head));
        norm2 = 0.f;
        for (int j = 0; j < key_dim / 8; ++j) {
          uint4 const x = k[j];
          for (uint32_t const pair : {x.x, x.y, x.z, x.w}) {
            float2 const two = unpack<T>(pair);
            norm2 += two.x * two.x + two.y * two.y;
          }
        }
      }
      float const strength = portable::write_strength(p, segment.row, at, head);
      sum += decay_of(token) + log2f(fmaxf(1.f, fabsf(1.f - strength * norm2)));
    }
    return lane_sum(sum);
  };
  int result = kWhole;
  float decay = 0.f;  // of all that is looked at: keys are read only where it is enough
  for (int i = threadIdx.x; i < kPlanTiles * kTileSide; i += kPlanWarps * 32)
    decay += decay_of(tiles * kTileSide - 1 - i);
  if (block_sum<kPlanWarps * 32>(decay, scratch) < kForgotten) {
#pragma unroll
    for (int round = 0; round < kPlanRounds; ++round) {
      int const back = round * kPlanWarps + warp;
      float const mine = growth_of(tiles - 1 - back);
      if (lane == 0) growth[back] = mine;
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

// One block per sequence, value head and kJoinRows value columns: a thread has two key columns and a part of
// the sum. What is read of a segment is requested one segment ahead.
template <int kKeyDim>
__global__ void __launch_bounds__(kJoinThreads<kKeyDim>)
    join_segments(Inputs const p, Segments const segments) {
  constexpr int kMapRows = (kKeyDim + kTileSide - 1) / kTileSide * kTileSide, kParts = kJoinParts<kKeyDim>,
                kTerms = kKeyDim / kParts, kOwn = kJoinRows / kParts;
  __shared__ __align__(16) float state[kJoinRows][kKeyDim];
  __shared__ __align__(16) float partial[kParts][kJoinRows][kKeyDim];
  let_next_kernel_start();
  wait_for_previous_kernel();
  int const groups = p.value_dim / kJoinRows;
  int const group = blockIdx.x % groups, unit = blockIdx.x / groups;
  int const head = unit % p.value_heads, n = unit / p.value_heads;
  int const column = threadIdx.x % (kKeyDim / kJoinColumns) * kJoinColumns,
            part = threadIdx.x / (kKeyDim / kJoinColumns);
  int64_t const first = first_segment(p, segments.span, n);
  int const count = find_segment(p, segments.span, first).count;
  int64_t const offset = static_cast<int64_t>(group) * kJoinRows * kKeyDim + column;
  float2 map[kTerms], end[kOwn];
  bool mapped = false;
  auto const request = [&](int i) {  // of segment i, from whose start to its end the join goes
    if (i >= count - 1) return;
    int64_t const at = (first + i) * p.value_heads + head;
    mapped = i > 0 && segments.first_tiles[at] == kWhole;
    float const* const ends = segments.ends + at * p.value_dim * kKeyDim + offset;
#pragma unroll
    for (int r = 0; r < kOwn; ++r)
      end[r] = *reinterpret_cast<float2 const*>(ends + (part + r * kParts) * kKeyDim);
    if (!mapped) return;
    float const* const m = segments.maps + (at * kMapRows + part * kTerms) * kKeyDim + column;
#pragma unroll
    for (int j = 0; j < kTerms; ++j) map[j] = *reinterpret_cast<float2 const*>(m + j * kKeyDim);
  };
  request(0);
  for (int i = 0; i + 1 < count; ++i) {
    int64_t const next = (first + i + 1) * p.value_heads + head;
    if (mapped) {
#pragma unroll
      for (int r = 0; r < kJoinRows; ++r) {
        float2 sum = {};
#pragma unroll
        for (int j = 0; j < kTerms; j += 4) {
          float4 const s = *reinterpret_cast<float4 const*>(&state[r][part * kTerms + j]);
          sum.x += s.x * map[j].x + s.y * map[j + 1].x + s.z * map[j + 2].x + s.w * map[j + 3].x;
          sum.y += s.x * map[j].y + s.y * map[j + 1].y + s.z * map[j + 2].y + s.w * map[j + 3].y;
        }
        *reinterpret_cast<float2*>(&partial[part][r][column]) = sum;
      }
    }
    bool const adds = mapped;
    float2 sum[kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) sum[r] = end[r];
    request(i + 1);
    __syncthreads();
    float* const start = segments.starts + next * p.value_dim * kKeyDim + offset;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      int const row = part + r * kParts;
      if (adds) {
#pragma unroll
        for (int q = 0; q < kParts; ++q) {
          float2 const x = *reinterpret_cast<float2 const*>(&partial[q][row][column]);
          sum[r].x += x.x;
          sum[r].y += x.y;
        }
      }
      *reinterpret_cast<float2*>(&state[row][column]) = sum[r];
      *reinterpret_cast<float2*>(start + row * kKeyDim) = sum[r];
    }
    __syncthreads();
  }
}

}  // namespace lt2::gdn::sm90
