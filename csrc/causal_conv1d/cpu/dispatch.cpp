// Cuts sequences into chunks of tokens and blocks of channels, spreads them over threads, picks the
// instruction set.
#include <algorithm>
#include <cstring>
#include <vector>

#include "causal_conv1d/cpu/kernels.h"
#include "common/cpu_isa.h"

namespace lt2::causal_conv1d {

LT2_DEFINE_KERNELS()

namespace cpu {
namespace {

int64_t cu_seqlen(Inputs const& p, int64_t i) {
  return p.cu_seqlens_int64 ? static_cast<int64_t const*>(p.cu_seqlens)[i]
                            : static_cast<int32_t const*>(p.cu_seqlens)[i];
}

std::vector<Chunk> chunks(Inputs const& p) {
  std::vector<Chunk> list;
  for (int64_t n = 0; n < p.sequences; ++n) {
    bool const packed = p.cu_seqlens != nullptr;
    int64_t const first = packed ? cu_seqlen(p, n) : 0, last = packed ? cu_seqlen(p, n + 1) : p.tokens;
    int64_t begin = first;
    do {
      int64_t const end = std::min(begin + kChunkTokens, last);
      list.push_back({n, packed ? 0 : n, first, last, begin, end});
      begin = end;
    } while (begin < last);
  }
  return list;
}

int64_t blocks(int64_t channels) { return (channels + kBlockChannels - 1) / kBlockChannels; }

// Rows of the contiguous y or dx that belong to no sequence.
void zero_outside(Inputs const& p, Tokens const& y) {
  if (p.cu_seqlens == nullptr) return;
  int64_t const row_bytes = p.channels * (p.dtype == Dtype::kFloat32 ? 4 : 2);
  int64_t const first = cu_seqlen(p, 0), last = cu_seqlen(p, p.sequences);
  std::memset(y.data, 0, first * row_bytes);
  std::memset(static_cast<char*>(y.data) + last * row_bytes, 0, (p.tokens - last) * row_bytes);
}

}  // namespace

void forward(ForwardParams const& p, ThreadPool const& pool) {
  zero_outside(p, p.y);
  auto const list = chunks(p);
  int64_t const n = blocks(p.channels);
  pool.items(static_cast<int64_t>(list.size()) * n,
             [&](int64_t item, int) { kernels().forward(p, list[item / n], item % n * kBlockChannels); });
}

int64_t backward_workspace(BackwardParams const& p) {
  return static_cast<int64_t>(chunks(p).size()) * (p.width + 1) * p.channels;
}

void backward(BackwardParams const& p, float* workspace, ThreadPool const& pool) {
  zero_outside(p, p.dx);
  auto const list = chunks(p);
  int64_t const count = static_cast<int64_t>(list.size()), n = blocks(p.channels);
  int64_t const partial = (p.width + 1) * p.channels;
  pool.items(count * n, [&](int64_t item, int) {
    kernels().backward(p, list[item / n], item % n * kBlockChannels, workspace + item / n * partial);
  });
  pool.items(n, [&](int64_t item, int) { kernels().reduce(p, workspace, count, item * kBlockChannels); });
}

void step(StepParams const& p, ThreadPool const& pool) {
  int64_t const n = blocks(p.channels);
  pool.items(p.batch * n, [&](int64_t item, int) { kernels().step(p, item / n, item % n * kBlockChannels); });
}

}  // namespace cpu
}  // namespace lt2::causal_conv1d
