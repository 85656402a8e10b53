// y = x W^T for a few rows x, bound by reading W once.
//
// A tile is 16 rows of W, or 8 of the gate's and 8 of the up projection's; a narrow tile is 8 rows, which
// have two pieces of channels at a time instead, so that a small W is on two blocks of every multiprocessor.
// The warps of a block share its channels: warp w has piece w, w + kWarps, .. of kPiece channels, and adds
// their products in this order whatever the tile. Rows of W are the A operand of the tensor cores and rows of
// x the B operand. Which channel stands where in a product does not matter as long as both agree, so a lane
// loads 16 adjacent bytes of its row of W, and of its row of x, for two products.
#include <algorithm>

#include "block_ops/cuda/portable/rows.cuh"
#include "common/cuda/mma.cuh"
#include "common/cuda/overlap.cuh"

namespace lt2::block_ops::portable {
namespace {

constexpr int kWarps = 16, kThreads = kWarps * kWarp, kTile = 16, kHalf = kTile / 2;
constexpr int kPiece = 64;    // channels: 128 bytes of each row of a tile
constexpr int kStages = 2;    // pieces on their way to a warp
constexpr int kSkew = 32;     // elements after each row of x: two rows have no bank in common
constexpr int kResident = 2;  // blocks on a multiprocessor
constexpr int kMostShared = 132 << 10;
constexpr int kSumRows = 8;     // rows of x in one product
constexpr int kNarrowRows = 4;  // most rows of x with narrow tiles: more blocks have more of x to prepare

// What a launch is of: parts with tiles of their own, narrow tiles of one part, or gate and up.
enum class Kind { kParts, kNarrow, kGated };

// A block begins as the one before it ends, when every instruction before its first loads counts: it divides
// nothing.
struct Tiles {
  int count, each, more;  // in all, of every block, and blocks that have one more
  int width_bits;         // of the number of threads to each row of x
  int of[kMostLinears];   // of each weight
};

template <int kGroups>
struct Shared {
  float sums[2][kWarps][kTile][kGroups * kSumRows];
};

__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint4 read_once(void const* p, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy));
  return v;
}

// Where tile `tile` is: its first rows in both halves, and how many there are in each.
template <Kind kKind>
struct Place {
  int part = 0, second_part = kKind == Kind::kGated, first, second, rows, second_rows;

  __device__ __forceinline__ Place(LinearStepParams const& p, Tiles const& tiles, int tile) {
    if constexpr (kKind == Kind::kParts) {
      while (tile >= tiles.of[part]) tile -= tiles.of[part++];
      second_part = part;
      first = tile * kTile;
      second = first + kHalf;
    } else {
      first = second = tile * kHalf;
    }
    rows = min(kHalf, p.parts[part].outputs - first);
    second_rows = min(kHalf, p.parts[part].outputs - second);
  }
};

template <class T>
__device__ __forceinline__ T const* weight_row(LinearStepParams const& p, int part, int row) {
  return static_cast<T const*>(p.parts[part].weight) + static_cast<int64_t>(row) * p.channels;
}

// The weight of the norm on its way to shared memory.
__device__ __forceinline__ void copy_norm(LinearStepParams const& p, unsigned char* norm) {
  if (p.norm_weight == nullptr) return;
  int const bytes = p.channels * (p.float_norm_weight ? 4 : 2);
#pragma unroll 1
  for (int i = 16 * threadIdx.x; i < bytes; i += 16 * kThreads) {
    copy_16(norm + i, static_cast<unsigned char const*>(p.norm_weight) + i, true);
  }
}

// Rows of x to shared memory, normalised if wanted: a number of adjacent threads to each row. The weight of
// the norm is on its way to `norm`. A row's squares are added in an order that does not depend on that
// number: those of 8 channels, those kThreads pieces apart, those of each lane, the lanes.
template <class T, int kGroups>
__device__ void stage_rows(LinearStepParams const& p, T* x, unsigned char const* norm,
                           Shared<kGroups>& shared, int width_bits) {
  using Row = RowOf<T, 8>;
  int const width = 1 << width_bits, row = threadIdx.x >> width_bits, column = threadIdx.x & (width - 1),
            pieces = p.channels / 8;
  T const* const from = static_cast<T const*>(p.x) + row * static_cast<int64_t>(p.channels);
  T* const to = x + row * (p.channels + kSkew);
  if (row < p.rows) {
    for (int i = column; i < pieces; i += width) copy_16(to + 8 * i, from + 8 * i, true);
  }
  wait_copies();
  if (p.norm_weight != nullptr) {
    static_assert(sizeof(shared.sums) >= sizeof(float) * kGroups * kSumRows * kThreads);
    float* const squares = &shared.sums[0][0][0][0] + row * kThreads;
    if (row < p.rows) {
      for (int i = column; i < pieces; i += width) {
        Row const piece = Row::load(to + 8 * i);  // its own copy
        float sum = i < kThreads ? 0.f : squares[i % kThreads];
#pragma unroll
        for (int e = 0; e < 8; ++e) sum = fmaf(piece.at(e), piece.at(e), sum);
        squares[i % kThreads] = sum;
      }
    }
    __syncthreads();
    if (row < p.rows) {
      float total = 0.f;
      for (int i = threadIdx.x % kWarp; i < min(pieces, kThreads); i += kWarp) total += squares[i];
      total = lane_sum(total);
      float const rstd = rsqrtf(total / static_cast<float>(p.channels) + p.eps);
      for (int i = column; i < pieces; i += width) {
        Row piece = Row::load(to + 8 * i);
        float weight[8];
        if (p.float_norm_weight) {
          load_floats(weight, reinterpret_cast<float const*>(norm) + 8 * i);
        } else {
          Row const w = Row::load(reinterpret_cast<T const*>(norm) + 8 * i);
#pragma unroll
          for (int e = 0; e < 8; ++e) weight[e] = w.at(e);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) piece[e] = from_float<T>(piece.at(e) * rstd * weight[e]);
        piece.store(to + 8 * i);
      }
    }
  }
  __syncthreads();
}

// kGroups: of kSumRows rows of x.
template <class T, int kGroups, Kind kKind>
__global__ void __launch_bounds__(kThreads, kResident)
    linear_step_tiles(__grid_constant__ LinearStepParams const p, __grid_constant__ Tiles const tiles) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kGroups>*>(memory);
  T* const x = reinterpret_cast<T*>(&shared + 1);
  constexpr int kRows = kGroups * kSumRows;
  constexpr int kApart = kWarps * kPiece;  // between a warp's pieces
  constexpr bool kNarrow = kKind == Kind::kNarrow;
  constexpr int kPieces = kNarrow ? 2 : 1;  // of them at a time
  int const block = static_cast<int>(blockIdx.x), begin = block * tiles.each + min(block, tiles.more),
            end = begin + tiles.each + (block < tiles.more);
  int const channels = p.channels, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint64_t const policy = read_once_policy();
  int const per_tile = (channels + kPieces * kApart - 1) / (kPieces * kApart);
  int const steps = (end - begin) * per_tile, row = lane / 4, own = 8 * (lane % 4);
  uint4 weights[kStages][2][2];  // of a piece: halves of the tile (narrow: pieces), halves of the channels
  T const* rows[2];
  int next_tile = begin, next_piece = 0;
  auto const load = [&](uint4(&w)[2][2]) {
    if (next_piece == 0) {
      Place<kKind> const place(p, tiles, next_tile);
      // Beyond the last row the last one again; its results are not written.
      rows[0] = weight_row<T>(p, place.part, place.first + min(row, place.rows - 1));
      rows[1] = place.second_rows <= 0
                    ? rows[0]
                    : weight_row<T>(p, place.second_part, place.second + min(row, place.second_rows - 1));
    }
    int const begin = kPieces * next_piece * kApart + warp * kPiece + own;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int const c = begin + 32 * h + (kNarrow ? kApart * r : 0);
        w[r][h] = c < channels ? read_once(rows[kNarrow ? 0 : r] + c, policy) : uint4{};
      }
    }
    if (++next_piece == per_tile) next_piece = 0, ++next_tile;
  };
  // Of the sums of a tile a thread has one of row `own_row` of W; the residual there is on its way early.
  int const own_row = threadIdx.x / kRows, own_column = threadIdx.x % kRows;
  bool const has_sum = own_column < p.rows && own_row < (kKind == Kind::kParts ? kTile : kHalf);
  float residual = 0.f;
  auto const load_residual = [&](int tile) {
    if (p.residual == nullptr || !has_sum || tile >= end) return;
    Place<kKind> const place(p, tiles, tile);
    int const output = place.first + own_row;
    if (output < p.parts[0].outputs)
      residual =
          to_float(static_cast<T const*>(p.residual)[int64_t{own_column} * p.parts[0].outputs + output]);
  };
  if (!p.settled) wait_for_previous_kernel();
  auto* const norm = reinterpret_cast<unsigned char*>(x + p.rows * (channels + kSkew));
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    if (s < steps) load(weights[s]);
  }
  load_residual(begin);
  copy_norm(p, norm);
  wait_for_previous_kernel();
  let_next_kernel_start();
  stage_rows<T>(p, x, norm, shared, tiles.width_bits);

  float sums[kGroups][4] = {};
  int piece = 0, tile = begin;
  auto const finish = [&] {
    auto& partial = shared.sums[(tile - begin) % 2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      int const column = g * kSumRows + 2 * (lane % 4);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        *reinterpret_cast<float2*>(&partial[warp][row + kHalf * r][column]) = {sums[g][2 * r],
                                                                               sums[g][2 * r + 1]};
        sums[g][2 * r] = sums[g][2 * r + 1] = 0.f;
      }
    }
    __syncthreads();
    auto const total = [&](int r, int m) {
      float t = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) t += partial[w][r][m];
      return t;
    };
    int const r = own_row, m = own_column;
    if (has_sum) {
      Place<kKind> const place(p, tiles, tile);
      LinearStepParams::Part const& part = p.parts[place.part];
      int const output = place.first + r;
      if (output < part.outputs) {
        int64_t const at = int64_t{m} * part.outputs + output;
        float y = total(r, m);
        if (kKind == Kind::kGated) y *= fast_sigmoid(y) * total(r + kHalf, m);
        if (p.residual != nullptr) y += residual;
        if (part.float_out) {
          static_cast<float*>(part.out)[at] = y;
        } else {
          static_cast<T*>(part.out)[at] = from_float<T>(y);
        }
      }
    }
    piece = 0;
    load_residual(++tile);
  };
  for (int first = 0; first < steps; first += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (first + s >= steps) break;
      int const c = kPieces * piece * kApart + warp * kPiece + own;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        int const m = g * kSumRows + row;
        auto const multiply = [&](uint4 const& upper, uint4 const& lower, int at) {
          uint4 b{};
          if (m < p.rows && at < channels) {
            b = *reinterpret_cast<uint4 const*>(x + m * (channels + kSkew) + at);
          }
          mma<T>(sums[g], {upper.x, lower.x, upper.y, lower.y}, b.x, b.y);
          mma<T>(sums[g], {upper.z, lower.z, upper.w, lower.w}, b.z, b.w);
        };
#pragma unroll
        for (int r = 0; r < kPieces; ++r) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            multiply(weights[s][r][h], kNarrow ? uint4{} : weights[s][1][h], c + kApart * r + 32 * h);
          }
        }
      }
      if (first + s + kStages < steps) load(weights[s]);
      if (++piece == per_tile) finish();
    }
  }
}

template <int kGroups>
int shared_bytes(LinearStepParams const& p, int rows) {
  int const norm = p.norm_weight == nullptr ? 0 : p.channels * (p.float_norm_weight ? 4 : 2);
  return static_cast<int>(sizeof(Shared<kGroups>)) + rows * (p.channels + kSkew) * 2 + norm;
}

}  // namespace

Status linear_step_supports(LinearStepParams const& p) {
  if (p.dtype == Dtype::kFloat32) return "x must be bfloat16 or float16 on CUDA";
  if (p.channels % 8 != 0) return "x must have a multiple of 8 channels on CUDA";
  bool whole = aligned(p.x) && aligned(p.norm_weight);
  for (int i = 0; i < p.count; ++i) whole &= aligned(p.parts[i].weight);
  if (!whole) return "x, norm_weight and weights must begin at multiples of 16 bytes on CUDA";
  if (shared_bytes<1>(p, 1) > 227 << 10) return "x must have fewer channels on CUDA";
  return kOk;
}

Status linear_step(LinearStepParams const& p, void* stream) {
  int device = 0, multiprocessors = 0, most_shared = 0, all_shared = 0;
  if (Status const s = status(cudaGetDevice(&device)); s != kOk) return s;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&all_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  bool const narrow = p.count == 1 && p.rows <= kNarrowRows && p.parts[0].outputs <= kTile * multiprocessors;
  Tiles tiles{};
  for (int i = 0; i < (p.swiglu ? 1 : p.count); ++i) {
    int const side = p.swiglu || narrow ? kHalf : kTile;
    tiles.of[i] = (p.parts[i].outputs + side - 1) / side;
    tiles.count += tiles.of[i];
  }
  auto const run = [&](auto element, auto groups, LinearStepParams const& some) {
    using T = decltype(element);
    constexpr int kGroups = groups;
    int const bytes = shared_bytes<kGroups>(p, some.rows),
              used = bytes + (1 << 10);  // CUDA takes some itself
    // What loads bring lies in the L1 cache until it arrives: no more shared memory than two blocks need, or
    // one where it is much.
    int const resident = kResident * used <= kMostShared ? kResident : 1;
    int const carveout = std::min(100, (100 * resident * used + all_shared - 1) / all_shared);
    int const blocks = std::min(tiles.count, resident * multiprocessors);
    Tiles shares = tiles;
    shares.each = tiles.count / blocks;
    shares.more = tiles.count % blocks;
    for (shares.width_bits = 9; kThreads >> shares.width_bits < some.rows;) --shares.width_bits;
    auto const start = [&](auto* kernel) {
      return launch_overlapped_carved(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, bytes, 1,
                                      carveout, stream, some, shares);
    };
    if (p.swiglu) return start(linear_step_tiles<T, kGroups, Kind::kGated>);
    if constexpr (kGroups == 1) {
      if (narrow) return start(linear_step_tiles<T, kGroups, Kind::kNarrow>);
    }
    return start(linear_step_tiles<T, kGroups, Kind::kParts>);
  };
  // As many rows at a time as shared memory takes.
  int const fit = (most_shared - shared_bytes<2>(p, 0)) / ((p.channels + kSkew) * 2);
  int const most = std::clamp(fit, 1, 2 * kSumRows);
  for (int first = 0; first < p.rows; first += most) {
    LinearStepParams some = p;
    some.rows = std::min(most, p.rows - first);
    auto const skip = [&](auto*& data, int64_t width) {
      if (data != nullptr)
        data = reinterpret_cast<decltype(+data)>(reinterpret_cast<uintptr_t>(data) + first * width * 2);
    };
    skip(some.x, p.channels);
    skip(some.residual, p.parts[0].outputs);
    for (int i = 0; i < p.count; ++i)
      skip(some.parts[i].out, p.parts[i].outputs * (p.parts[i].float_out ? 2 : 1));
    auto const with = [&](auto element) {
      return some.rows <= kSumRows ? run(element, std::integral_constant<int, 1>{}, some)
                                   : run(element, std::integral_constant<int, 2>{}, some);
    };
    Status const s =
        p.dtype == Dtype::kBFloat16 ? with(Element<Dtype::kBFloat16>{}) : with(Element<Dtype::kFloat16>{});
    if (s != kOk) return s;
  }
  return kOk;
}

}  // namespace lt2::block_ops::portable
