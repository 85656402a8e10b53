#pragma once

#include <atomic>
#include <cstdint>

namespace lt2 {

// Thread pool injected by the caller (the bindings pass libtorch's), so that kernels neither own threads nor
// depend on a particular OpenMP runtime.
struct ThreadPool {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  int num_threads;
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

  // f(begin, end) over disjoint ranges that cover [begin, end).
  template <class F>
  void ranges(int64_t begin, int64_t end, int64_t grain, F const& f) const {
    run(
        begin, end, grain,
        [](int64_t b, int64_t e, void* context) { (*static_cast<F const*>(context))(b, e); },
        const_cast<void*>(static_cast<void const*>(&f)));
  }

  // Lanes that items() uses for this many items: each lane may own one slice of a workspace.
  int lanes(int64_t items) const { return static_cast<int>(items < num_threads ? items : num_threads); }

  // f(item, lane) once for every item in [0, count). Lanes take items one by one, so unequal items balance;
  // which lane runs an item varies, what it computes must not.
  template <class F>
  void items(int64_t count, F const& f) const {
    std::atomic<int64_t> next{0};
    ranges(0, lanes(count), 1, [&](int64_t begin, int64_t end) {
      for (int64_t lane = begin; lane < end; ++lane) {
        for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) f(i, static_cast<int>(lane));
      }
    });
  }
};

}  // namespace lt2
