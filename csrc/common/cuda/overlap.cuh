// Programmatic dependent launch: a kernel's blocks are scheduled while the kernel before it still runs.
#pragma once

#include "common/cuda/launch.cuh"

namespace lt2::cuda {

// Until all that earlier kernels of the stream wrote is visible. Call before the first access to memory.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may be scheduled once every block of this one has called (or ended). Called after
// wait_for_previous_kernel(), what is older than this kernel is visible to the next one from its start.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Whether the build has sm_90 code and the current device runs it. Elsewhere the two functions above are
// empty, so kernels must not be launched by launch_overlapped.
inline bool runs_sm90_code() {
  constexpr int kBuilt[] = {__CUDA_ARCH_LIST__};
  bool built = false;
  for (int arch : kBuilt) built |= arch == 900;
  int device = 0, major = 0;
  return built && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
}

// As launch(), in clusters of `cluster` blocks along x, for kernels that begin with
// wait_for_previous_kernel(). `carveout`: percent of a multiprocessor's memory that is shared memory.
template <class... Params, class... Args>
Status launch_overlapped_carved(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                                unsigned cluster, int carveout, void* stream, Args const&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return kOk;
  if (Status const allowed = allow_shared(kernel, shared_bytes); allowed != kOk) return allowed;
  cudaLaunchAttribute attributes[3] = {};
  unsigned count = 0;
  if (runs_sm90_code()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster, 1, 1};
  }
  if (carveout != cudaSharedmemCarveoutDefault) {
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count++].val.sharedMemCarveout = static_cast<unsigned>(carveout);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return status(cudaLaunchKernelEx(&config, kernel, args...));
}

template <class... Params, class... Args>
Status launch_overlapped(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                         unsigned cluster, void* stream, Args const&... args) {
  return launch_overlapped_carved(kernel, grid, threads, shared_bytes, cluster, cudaSharedmemCarveoutDefault,
                                  stream, args...);
}

}  // namespace lt2::cuda
