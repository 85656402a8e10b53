// Blocks of a cluster and their shared memory. On GPUs without clusters every block is a cluster of its own.
#pragma once

namespace lt2::cuda {

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// What was written before arrive() in any block is visible after wait(). All threads call both.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The object of block `rank` that is where `p` is in this block's shared memory.
template <class T>
__device__ T* of_rank(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return p;
#endif
}

// As cluster_arrive(), without making anything visible.
__device__ inline void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

}  // namespace lt2::cuda
