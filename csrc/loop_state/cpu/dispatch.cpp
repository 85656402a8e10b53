// Spreads rows, key heads and slots over threads and picks the instruction set.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "common/cpu/row_ranges.h"
#include "common/cpu_isa.h"
#include "loop_state/cpu/kernels.h"

namespace lt2::loop_state {

LT2_DEFINE_KERNELS()

namespace cpu {
namespace {

constexpr int64_t kPieceBytes = 1 << 18;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t decode_splits(DecodeParams const& p) {
  int64_t longest = p.topk;
  for (int64_t u = 0; p.indices == nullptr && u < unit_count(p); ++u)
    longest = std::max(longest, Sight(p, u).keys);
  return std::max<int64_t>(1, ceil_div(longest, kSplitKeys));
}

bool in_pool(Pool const& pool, int64_t slot) { return slot >= 0 && slot < pool.slots; }

// f(index, bytes, offset in the slot's contiguous copy, offset in the pool's slot) for pieces of `count`
// slots.
template <class F>
void for_each_piece(Pool const& slots, int64_t count, ThreadPool const& pool, F const& f) {
  int64_t const pieces = ceil_div(slots.row_bytes, kPieceBytes), per_slot = slots.rows * pieces;
  pool.items(count * per_slot, [&](int64_t item, int) {
    int64_t const row = item % per_slot / pieces, begin = item % pieces * kPieceBytes;
    int64_t const bytes = std::min(kPieceBytes, slots.row_bytes - begin);
    f(item / per_slot, bytes, row * slots.row_bytes + begin, row * slots.row_stride + begin);
  });
}

// The copies that happen, and whether one of them reads what another writes.
struct CopyPlan {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  bool staged = false;
};

CopyPlan copy_plan(CopyParams const& p) {
  std::vector<int64_t> writer(p.pool.slots, -1);
  auto const valid = [&](int64_t i) { return in_pool(p.pool, p.src[i]) && in_pool(p.pool, p.dst[i]); };
  for (int64_t i = 0; i < p.count; ++i) {
    if (valid(i)) writer[p.dst[i]] = i;
  }
  CopyPlan plan;
  for (int64_t i = 0; i < p.count; ++i) {
    if (!valid(i) || writer[p.dst[i]] != i || p.src[i] == p.dst[i]) continue;
    plan.pairs.emplace_back(p.src[i], p.dst[i]);
    plan.staged |= writer[p.src[i]] >= 0;
  }
  return plan;
}

}  // namespace

int64_t residual_backward_workspace(ResidualBackwardParams const& p) {
  return RowRanges(p.rows).count * p.channels;
}

int64_t residual_norm_backward_workspace(ResidualNormBackwardParams const& p) {
  return RowRanges(p.rows).count * (p.rho == nullptr ? 1 : 2) * p.channels;
}

void residual(ResidualParams const& p, ThreadPool const& pool) {
  pool.ranges(0, p.rows, row_grain(p.channels),
              [&](int64_t begin, int64_t end) { kernels().residual(p, begin, end); });
}

void residual_backward(ResidualBackwardParams const& p, float* workspace, ThreadPool const& pool) {
  RowRanges(p.rows).sum(
      p.channels, p.channels, workspace, pool,
      [&](int64_t begin, int64_t end, float* partial) {
        kernels().residual_backward(p, begin, end, partial);
      },
      [&](int64_t c) -> float& { return p.drho[c]; });
}

void residual_norm(ResidualNormParams const& p, ThreadPool const& pool) {
  pool.ranges(0, p.rows, row_grain(p.channels),
              [&](int64_t begin, int64_t end) { kernels().residual_norm(p, begin, end); });
}

void residual_norm_backward(ResidualNormBackwardParams const& p, float* workspace, ThreadPool const& pool) {
  int64_t const width = (p.rho == nullptr ? 1 : 2) * p.channels;
  RowRanges(p.rows).sum(
      width, width, workspace, pool,
      [&](int64_t begin, int64_t end, float* partial) {
        kernels().residual_norm_backward(p, begin, end, partial);
      },
      [&](int64_t c) -> float& { return c < p.channels ? p.dweight[c] : p.drho[c - p.channels]; });
}

int64_t decode_workspace(DecodeParams const& p, ThreadPool const& pool) {
  int64_t const items = unit_count(p) * p.heads * decode_splits(p);
  return kernels().decode_workspace(p) * pool.lanes(items) + kernels().decode_partial(p) * items;
}

void decode(DecodeParams const& p, float* workspace, ThreadPool const& pool) {
  int64_t const splits = decode_splits(p), pairs = unit_count(p) * p.heads;
  int64_t const lane_floats = kernels().decode_workspace(p), partial_floats = kernels().decode_partial(p);
  float* const partials = workspace + lane_floats * pool.lanes(pairs * splits);
  // Heads of the same keys lie side by side in memory: one lane reads them, where there is enough for all.
  int64_t const items = pairs * splits, together = items >= 2 * p.heads * pool.num_threads ? p.heads : 1;
  pool.items(items / together, [&](int64_t group, int lane) {
    for (int64_t item = group * together; item < (group + 1) * together; ++item) {
      int64_t const unit = item / (p.heads * splits), split = item / p.heads % splits;
      kernels().decode(p, unit, static_cast<int>(item % p.heads), split, workspace + lane * lane_floats,
                       partials + item * partial_floats);
    }
  });
  pool.items(pairs, [&](int64_t pair, int) {
    int64_t const unit = pair / p.heads, head = pair % p.heads;
    kernels().merge(p, unit, static_cast<int>(head),
                    partials + (unit * splits * p.heads + head) * partial_floats, p.heads * partial_floats,
                    splits);
  });
}

void zero(ZeroParams const& p, ThreadPool const& pool) {
  for_each_piece(p.pool, p.count, pool, [&](int64_t i, int64_t bytes, int64_t, int64_t offset) {
    if (in_pool(p.pool, p.ids[i]))
      std::memset(p.pool.data + p.ids[i] * p.pool.slot_stride + offset, 0, bytes);
  });
}

int64_t copy_workspace(CopyParams const& p) {
  CopyPlan const plan = copy_plan(p);
  return plan.staged ? static_cast<int64_t>(plan.pairs.size()) * p.pool.rows * p.pool.row_bytes : 0;
}

void copy(CopyParams const& p, char* workspace, ThreadPool const& pool) {
  auto const [pairs, staged] = copy_plan(p);
  int64_t const count = static_cast<int64_t>(pairs.size()), slot_bytes = p.pool.rows * p.pool.row_bytes;
  auto const slot = [&](int64_t id) { return p.pool.data + id * p.pool.slot_stride; };
  if (!staged) {
    for_each_piece(p.pool, count, pool, [&](int64_t i, int64_t bytes, int64_t, int64_t offset) {
      std::memcpy(slot(pairs[i].second) + offset, slot(pairs[i].first) + offset, bytes);
    });
    return;
  }
  for_each_piece(p.pool, count, pool, [&](int64_t i, int64_t bytes, int64_t packed, int64_t offset) {
    std::memcpy(workspace + i * slot_bytes + packed, slot(pairs[i].first) + offset, bytes);
  });
  for_each_piece(p.pool, count, pool, [&](int64_t i, int64_t bytes, int64_t packed, int64_t offset) {
    std::memcpy(slot(pairs[i].second) + offset, workspace + i * slot_bytes + packed, bytes);
  });
}

}  // namespace cpu
}  // namespace lt2::loop_state
