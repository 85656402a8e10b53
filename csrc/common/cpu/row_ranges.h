// Sums over rows whose bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"

namespace lt2 {

// Rows cut into at most kMost ranges, by their number alone: a range gives one partial sum.
struct RowRanges {
  static constexpr int64_t kMost = 128, kFewestRows = 16;
  int64_t rows, per_range, count;

  explicit RowRanges(int64_t rows)
      : rows(rows),
        per_range(std::max(kFewestRows, (rows + kMost - 1) / kMost)),
        count((rows + per_range - 1) / per_range) {}

  // f(begin, end, partial) over the ranges, where partial is a slice of `stride` floats; then out(c) = the
  // sum of elements c < width of the partials in order.
  template <class F, class Out>
  void sum(int64_t width, int64_t stride, float* partials, ThreadPool const& pool, F const& f,
           Out const& out) const {
    pool.items(count, [&](int64_t i, int) {
      f(i * per_range, std::min((i + 1) * per_range, rows), partials + i * stride);
    });
    pool.ranges(0, width, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float sum = 0.f;
        for (int64_t i = 0; i < count; ++i) sum += partials[i * stride + c];
        out(c) = sum;
      }
    });
  }
};

// Rows of a range of work that is worth a thread.
inline int64_t row_grain(int64_t channels) {
  return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(channels, 1));
}

}  // namespace lt2
