// The only place that launches kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/status.h"

namespace lt2::cuda {

inline Status status(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return kOk;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "the build has no CUDA code for this GPU (rebuild with its architecture in LT2_CUDA_ARCHS)";
    default:
      return cudaGetErrorString(error);
  }
}

inline constexpr int kDefaultSharedBytes = 48 << 10;

// The attribute is set on every launch because it belongs to one device, and costs next to nothing.
template <class... Params>
Status allow_shared(void (*kernel)(Params...), int shared_bytes) {
  if (shared_bytes <= kDefaultSharedBytes) return kOk;
  return status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
}

// Asynchronous; a grid of no blocks is a success.
template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, void* stream,
              Args const&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return kOk;
  if (Status const allowed = allow_shared(kernel, shared_bytes); allowed != kOk) return allowed;
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return status(cudaGetLastError());
}

template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, void* stream,
              Args const&... args) {
  if (blocks > INT32_MAX) return "too many sequences, heads and chunks for one launch (2^31 - 1 blocks)";
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, stream, args...);
}

}  // namespace lt2::cuda
