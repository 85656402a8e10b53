// Zero and copy whole slots of a pool, in pieces of kPieceWords words per block.
#include "common/cuda/launch.cuh"
#include "loop_state/loop_state.h"

namespace lt2::loop_state::portable {
namespace {

using namespace ::lt2::cuda;

constexpr int kThreads = 256;
constexpr int64_t kPieceWords = kThreads * 16;

int64_t slot_bytes(Pool const& pool) { return pool.rows * pool.row_bytes; }

template <class Word>
__host__ __device__ int64_t pieces(Pool const& pool) {
  int64_t const words = pool.row_bytes / static_cast<int64_t>(sizeof(Word));
  return (words + kPieceWords - 1) / kPieceWords;
}

__device__ bool in_pool(Pool const& pool, int64_t slot) { return slot >= 0 && slot < pool.slots; }

// Words [begin, end) of one row of slot number `index` of the list.
struct Piece {
  int64_t index, row, begin, end;
};
template <class Word>
__device__ Piece piece_of_block(Pool const& pool) {
  int64_t const words = pool.row_bytes / static_cast<int64_t>(sizeof(Word));
  // The grid has fewer than 2^31 blocks, so both fit: 64-bit divisions are slow.
  unsigned const per_row = static_cast<unsigned>(pieces<Word>(pool)), rows = static_cast<unsigned>(pool.rows);
  unsigned const row = blockIdx.x / per_row;
  int64_t const begin = blockIdx.x % per_row * kPieceWords, end = begin + kPieceWords;
  return {row / rows, row % rows, begin, end < words ? end : words};
}

template <class Word>
__device__ Word* pool_row(Pool const& pool, int64_t slot, int64_t row) {
  return reinterpret_cast<Word*>(pool.data + slot * pool.slot_stride + row * pool.row_stride);
}
template <class Word>
__device__ Word* staged_row(Pool const& pool, char* staging, int64_t index, int64_t row) {
  return reinterpret_cast<Word*>(staging + (index * pool.rows + row) * pool.row_bytes);
}

template <class Word>
__global__ void __launch_bounds__(kThreads) zero_slots(ZeroParams const p) {
  Piece const piece = piece_of_block<Word>(p.pool);
  int64_t const slot = p.ids[piece.index];
  if (!in_pool(p.pool, slot)) return;
  Word* const to = pool_row<Word>(p.pool, slot, piece.row);
  for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += kThreads) to[i] = Word{};
}

__device__ bool valid_pair(CopyParams const& p, int64_t i) {
  return in_pool(p.pool, p.src[i]) && in_pool(p.pool, p.dst[i]);
}

template <class Word>
__global__ void __launch_bounds__(kThreads) gather_slots(CopyParams const p, char* staging) {
  Piece const piece = piece_of_block<Word>(p.pool);
  if (!valid_pair(p, piece.index)) return;
  Word const* const from = pool_row<Word>(p.pool, p.src[piece.index], piece.row);
  Word* const to = staged_row<Word>(p.pool, staging, piece.index, piece.row);
  for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += kThreads) to[i] = from[i];
}

template <class Word>
__global__ void __launch_bounds__(kThreads) scatter_slots(CopyParams const p, char* staging) {
  Piece const piece = piece_of_block<Word>(p.pool);
  if (!valid_pair(p, piece.index)) return;
  int64_t const slot = p.dst[piece.index];
  bool later = false;
  for (int64_t i = piece.index + 1 + threadIdx.x; i < p.count; i += kThreads) {
    later |= p.dst[i] == slot && valid_pair(p, i);
  }
  if (__syncthreads_or(later)) return;
  Word const* const from = staged_row<Word>(p.pool, staging, piece.index, piece.row);
  Word* const to = pool_row<Word>(p.pool, slot, piece.row);
  for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += kThreads) to[i] = from[i];
}

// f with the widest word that divides every address.
template <class F>
Status with_word(Pool const& pool, F const& f) {
  uint64_t const all = reinterpret_cast<uint64_t>(pool.data) | static_cast<uint64_t>(pool.slot_stride) |
                       static_cast<uint64_t>(pool.row_stride) | static_cast<uint64_t>(pool.row_bytes);
  if (all % sizeof(uint4) == 0) return f(uint4{});
  if (all % sizeof(uint16_t) == 0) return f(uint16_t{});
  return f(uint8_t{});
}

}  // namespace

int64_t copy_workspace(CopyParams const& p) { return p.count * slot_bytes(p.pool); }

Status zero(ZeroParams const& p, void* stream) {
  return with_word(p.pool, [&](auto word) {
    using Word = decltype(word);
    return launch(zero_slots<Word>, p.count * p.pool.rows * pieces<Word>(p.pool), kThreads, 0, stream, p);
  });
}

Status copy(CopyParams const& p, char* workspace, void* stream) {
  return with_word(p.pool, [&](auto word) {
    using Word = decltype(word);
    int64_t const blocks = p.count * p.pool.rows * pieces<Word>(p.pool);
    Status const gathered = launch(gather_slots<Word>, blocks, kThreads, 0, stream, p, workspace);
    if (gathered != kOk) return gathered;
    return launch(scatter_slots<Word>, blocks, kThreads, 0, stream, p, workspace);
  });
}

}  // namespace lt2::loop_state::portable
