// Rotary embedding and cache write of new tokens: a thread has some channels of a half of one head, and those
// of its other half.
#include "block_ops/cuda/portable/rows.cuh"
#include "common/cuda/overlap.cuh"

namespace lt2::block_ops::portable {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ T* head_of(Heads const& x, int64_t row, int64_t token, int head) {
  return static_cast<T*>(x.data) + row * x.row + token * x.token + head * x.head;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) rope_cache_heads(RopeCacheParams const p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  using Row = RowOf<T, kVec>;
  int64_t const position = blockIdx.x, row = position / p.tokens, token = position % p.tokens;
  int const pieces = p.dim / 2 / kVec, value_pieces = p.value_dim / 2 / kVec;
  int const rotated = (p.query_heads + p.heads) * pieces;
  int const i = static_cast<int>(blockIdx.y) * kThreads + threadIdx.x;
  if (i >= rotated + p.heads * value_pieces) return;
  int64_t const slot = p.slot_ids == nullptr ? row : p.slot_ids[row], place = p.places[position];
  bool const kept = slot >= 0 && slot < p.slots && place >= 0 && place < p.capacity;
  if (i >= rotated) {
    int const head = (i - rotated) / value_pieces, c = (i - rotated) % value_pieces * kVec;
    if (!kept) return;
    T const* const from = head_of<T const>(p.v, row, token, head) + c;
    T* const to = head_of<T>(p.v_cache, slot, place, head) + c;
    Row const first = Row::load(from), second = Row::load(from + p.value_dim / 2);
    first.store(to);
    second.store(to + p.value_dim / 2);
    return;
  }
  int const head = i / pieces, c = i % pieces * kVec, half = p.dim / 2;
  bool const query = head < p.query_heads;
  if (!query && !kept) return;
  T const* const from = (query ? head_of<T const>(p.q, row, token, head)
                               : head_of<T const>(p.k, row, token, head - p.query_heads)) +
                        c;
  T* const to = (query ? static_cast<T*>(p.q_out) + (position * p.query_heads + head) * p.dim
                       : head_of<T>(p.k_cache, slot, place, head - p.query_heads)) +
                c;
  float cos[kVec], sin[kVec];
  int64_t const angle = row * p.angle_row + token * half + c;
  load_floats(cos, p.cos + angle);
  load_floats(sin, p.sin + angle);
  Row const a = Row::load(from), b = Row::load(from + half);
  Row first, second;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    first[e] = from_float<T>(a.at(e) * cos[e] - b.at(e) * sin[e]);
    second[e] = from_float<T>(b.at(e) * cos[e] + a.at(e) * sin[e]);
  }
  first.store(to);
  second.store(to + half);
}

bool aligned_heads(Dtype dtype, Heads const& x) {
  int64_t const elements = dtype == Dtype::kFloat32 ? 4 : 8;
  return aligned(x.data) && x.row % elements == 0 && x.token % elements == 0 && x.head % elements == 0;
}

}  // namespace

Status rope_cache(RopeCacheParams const& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVec = 16 / sizeof(T);
    bool whole = p.dim / 2 % kVec == 0 && p.value_dim / 2 % kVec == 0 && aligned(p.cos) && aligned(p.sin) &&
                 aligned(p.q_out);
    for (Heads const& x : {p.q, p.k, p.v, p.k_cache, p.v_cache}) whole &= aligned_heads(p.dtype, x);
    int const vec = whole ? kVec : 1;
    int64_t const work =
        (int64_t{p.query_heads + p.heads} * p.dim + int64_t{p.heads} * p.value_dim) / 2 / vec;
    int64_t const across = (work + kThreads - 1) / kThreads;
    if (p.batch * p.tokens > INT32_MAX || across > 65535) return Status{"too many tokens for one launch"};
    dim3 const grid(static_cast<unsigned>(p.batch * p.tokens), static_cast<unsigned>(across));
    return launch_overlapped(whole ? rope_cache_heads<T, kVec> : rope_cache_heads<T, 1>, grid, kThreads, 0, 1,
                             stream, p);
  });
}

}  // namespace lt2::block_ops::portable
