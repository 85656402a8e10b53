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

inline constexpr int kPlanWarps = 8, kPlanRounds = 4;
inline constexpr float kForgotten = -40.f;  // log2

// One block per segment and value head, a warp per tile, from the end of the segment backwards.
template <class T>
__global__ void __launch_bounds__(kPlanWarps * 32)
    plan_segments(Inputs const p, Segments const segments, int key_dim) {
  __shared__ float growth[kPlanWarps], scratch[kPlanWarps];
  int const number = blockIdx.x / p.value_heads, head = blockIdx.x % p.value_heads;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Segment const segment = find_segment(p, segments.span, number);
  if (segment.tokens < 0) return;
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
  for (int i = threadIdx.x; i < kPlanRounds * kPlanWarps * kTileSide; i += kPlanWarps * 32)
    decay += decay_of(tiles * kTileSide - 1 - i);
  if (block_sum<kPlanWarps * 32>(decay, scratch) < kForgotten) {
    float total = 0.f;
    for (int round = 0; round < kPlanRounds && result == kWhole; ++round) {
      int const last = tiles - 1 - round * kPlanWarps;
      if (last < 0) break;
      float const mine = growth_of(last - warp);
      if (lane == 0) growth[warp] = mine;
      __syncthreads();
      for (int w = 0; w < kPlanWarps && result == kWhole; ++w) {
        total += growth[w];
        if (last - w >= 0 && total < kForgotten) result = last - w;
      }
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) segments.first_tiles[number * p.value_heads + head] = result;
}

inline constexpr int kJoinRows = 8, kJoinParts = 4;

// One block per sequence, value head and kJoinRows value columns: kKeyDim x kJoinParts threads, one key
// column and a part of the sum each. Maps are requested a segment ahead.
template <int kKeyDim>
__global__ void __launch_bounds__(kKeyDim* kJoinParts)
    join_segments(Inputs const p, Segments const segments) {
  constexpr int kMapRows = (kKeyDim + kTileSide - 1) / kTileSide * kTileSide, kTerms = kKeyDim / kJoinParts;
  __shared__ __align__(16) float state[kJoinRows][kKeyDim];
  __shared__ float partial[kJoinParts][kJoinRows][kKeyDim];
  int const groups = p.value_dim / kJoinRows;
  int const group = blockIdx.x % groups, unit = blockIdx.x / groups;
  int const head = unit % p.value_heads, n = unit / p.value_heads;
  int const column = threadIdx.x % kKeyDim, part = threadIdx.x / kKeyDim;
  int64_t const first = first_segment(p, segments.span, n);
  int const count = find_segment(p, segments.span, first).count;
  float map[kTerms];
  bool mapped = false;
  auto const request = [&](int i) {  // of segment i, from whose start to its end the join goes
    int64_t const at = (first + i) * p.value_heads + head;
    mapped = i > 0 && i < count - 1 && segments.first_tiles[at] == kWhole;
    if (!mapped) return;
    float const* const m = segments.maps + (at * kMapRows + part * kTerms) * kKeyDim + column;
#pragma unroll
    for (int j = 0; j < kTerms; ++j) map[j] = m[j * kKeyDim];
  };
  request(0);
  for (int i = 0; i + 1 < count; ++i) {
    int64_t const at = (first + i) * p.value_heads + head, next = at + p.value_heads;
    if (mapped) {
#pragma unroll
      for (int r = 0; r < kJoinRows; ++r) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kTerms; j += 4) {
          float4 const s = *reinterpret_cast<float4 const*>(&state[r][part * kTerms + j]);
          sum += s.x * map[j] + s.y * map[j + 1] + s.z * map[j + 2] + s.w * map[j + 3];
        }
        partial[part][r][column] = sum;
      }
    }
    bool const adds = mapped;
    request(i + 1);
    __syncthreads();
    int64_t const offset = static_cast<int64_t>(group) * kJoinRows * kKeyDim + column;
    float const* const end = segments.ends + at * p.value_dim * kKeyDim + offset;
    float* const start = segments.starts + next * p.value_dim * kKeyDim + offset;
#pragma unroll
    for (int r = part; r < kJoinRows; r += kJoinParts) {
      float sum = end[r * kKeyDim];
      if (adds) {
#pragma unroll
        for (int q = 0; q < kJoinParts; ++q) sum += partial[q][r][column];
      }
      state[r][column] = sum;
      start[r * kKeyDim] = sum;
    }
    __syncthreads();
  }
}

}  // namespace lt2::gdn::sm90
