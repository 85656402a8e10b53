// Tiles of [B, T, heads, D] tensors between global memory and swizzled shared memory, by the copy engine.
//
// A tile is 64 tokens x 64 elements of 2 bytes: 64 rows of 128 bytes, 8 KiB, aligned to 1 KiB, in which the
// 16-byte chunk c of row r is at chunk c ^ (r % 8) (the 128-byte swizzle that wgmma reads).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda/sm90/barrier.cuh"
#include "common/dtype.h"
#include "common/status.h"

namespace lt2::cuda::sm90 {

inline constexpr int kTileSide = 64;
inline constexpr int kTileBytes = kTileSide * kTileSide * 2;

// Byte offset of 16-byte chunk `chunk` (0..7) of row `row` in a tile.
__host__ __device__ constexpr int tile_offset(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Strides in elements, as in the contracts.
struct TokenMajor {
  void* data;
  int64_t batch, token, head;           // strides
  int64_t batches, tokens, heads, dim;  // sizes
};

// What the copy engine asks of a tensor.
inline bool tma_compatible(TokenMajor const& x) {
  auto const ok = [](int64_t size, int64_t stride) { return size <= 1 || (stride > 0 && stride % 8 == 0); };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && ok(x.batches, x.batch) && ok(x.tokens, x.token) &&
         ok(x.heads, x.head);
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, cuuint64_t const*,
                                 cuuint64_t const*, cuuint32_t const*, cuuint32_t const*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

// The driver's function, found at run time: nothing links against libcuda.
inline EncodeTiled encode_tiled() {
  static EncodeTiled const f = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess) {
      entry = nullptr;
    }
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return f;
}

// The driver's functions want a current context. A thread that has only asked the runtime for memory that was
// there already, as one of autograd's may, has none yet.
inline bool bind_context() {
  thread_local bool const bound = [] {
    int device;
    return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
  }();
  return bound;
}

// For tiles of `tile_tokens` x `tile_heads` rows, heads of a token next to each other. Coordinates of the map
// are (element, head, token, batch); what is outside reads as zero and is not written.
inline Status make_tensor_map(CUtensorMap* map, TokenMajor const& x, Dtype dtype, int tile_tokens,
                              int tile_heads = 1) {
  EncodeTiled const encode = encode_tiled();
  if (encode == nullptr) return "the CUDA driver is too old for tensor maps (CUDA 12 is needed)";
  if (!bind_context()) return "no CUDA device can be made current for tensor maps";
  auto const stride = [](int64_t size, int64_t elements) -> cuuint64_t {
    return size <= 1 ? 16 : elements * 2;
  };
  cuuint64_t const sizes[4] = {static_cast<cuuint64_t>(x.dim), static_cast<cuuint64_t>(x.heads),
                               static_cast<cuuint64_t>(x.tokens), static_cast<cuuint64_t>(x.batches)};
  cuuint64_t const strides[3] = {stride(x.heads, x.head), stride(x.tokens, x.token),
                                 stride(x.batches, x.batch)};
  cuuint32_t const box[4] = {kTileSide, static_cast<cuuint32_t>(tile_heads),
                             static_cast<cuuint32_t>(tile_tokens), 1};
  cuuint32_t const steps[4] = {1, 1, 1, 1};
  auto const type =
      dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUresult const result = encode(map, type, 4, x.data, sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? kOk : "the CUDA driver refused a tensor map";
}

// One thread issues these.
__device__ inline void load_tile(void* tile, CUtensorMap const& map, int element, int head, int token,
                                 int batch, Barrier& loaded) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
      "%5, "
      "%6}], [%2];" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(&loaded)), "r"(element), "r"(head), "r"(token), "r"(batch)
      : "memory");
}
__device__ inline void store_tile(CUtensorMap const& map, void const* tile, int element, int head, int token,
                                  int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(shared_address(tile)), "r"(element), "r"(head), "r"(token), "r"(batch)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Contiguous bytes: addresses and size are multiples of 16.
__device__ inline void load_bytes(void* to, void const* from, uint32_t bytes, Barrier& loaded) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&loaded))
      : "memory");
}
// By the threads for which `mine` holds, without a branch: wgmma may be under way.
__device__ inline void store_bytes(void* to, void const* from, uint32_t bytes, bool mine = true) {
  asm volatile(
      "{\n"
      ".reg .pred mine;\n"
      "setp.ne.b32 mine, %3, 0;\n"
      "@mine cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "}\n" ::"l"(__cvta_generic_to_global(to)),
      "r"(shared_address(from)), "r"(bytes), "r"(static_cast<int>(mine))
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// At most kPending of this thread's stores are not in global memory yet.
template <int kPending>
__device__ inline void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// This thread's stores have read shared memory.
__device__ inline void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

}  // namespace lt2::cuda::sm90
