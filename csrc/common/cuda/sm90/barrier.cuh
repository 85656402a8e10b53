// Synchronisation of Hopper kernels: mbarriers, named barriers, register budgets, proxy fences.
#pragma once

#include <cstdint>

#include "common/cuda/mma.cuh"

namespace lt2::cuda::sm90 {

inline constexpr int kWarpgroup = 128;

// Where `p` of this block's shared memory is in that of block `rank` of the cluster.
__device__ inline uint32_t address_of_rank(void const* p, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}

// A barrier in shared memory. Its n-th completion, n = 0, 1, .., is awaited with parity n & 1.
struct Barrier {
  uint64_t word;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // One arrival, and `bytes` of asynchronous copies that belong to the phase.
  __device__ void arrive_expecting(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
                 "r"(bytes)
                 : "memory");
  }
  // `arrivals` at this barrier in block `rank` of the cluster, and bytes of copies that belong to the phase.
  __device__ void arrive_at(int rank, int arrivals) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0], %1;" ::"r"(address_of_rank(this, rank)),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ void arrive_expecting_at(int rank, int arrivals, uint32_t bytes) {
    asm volatile(
        "mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%0], %1;" ::"r"(address_of_rank(this, rank)),
        "r"(bytes)
        : "memory");
    arrive_at(rank, arrivals);
  }
  // Whether that phase is complete, without waiting for it.
  __device__ bool test(uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return done != 0;
  }
  __device__ void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
  // After arrivals of other blocks of the cluster.
  __device__ void wait_for_cluster(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// x on its way to `to` in the shared memory of block `rank`, as bytes that its barrier expects. Only of
// kernels that were launched in clusters of more than one block, after all blocks have initialised their
// barriers.
template <class T>
__device__ inline void send(T* to, T const& x, Barrier& arrived, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  auto const* const words = reinterpret_cast<uint32_t const*>(&x);
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     address_of_rank(to, rank)),
                 "r"(words[0]), "r"(address_of_rank(&arrived, rank))
                 : "memory");
  } else {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
            address_of_rank(to, rank)),
        "r"(words[0]), "r"(words[1]), "r"(address_of_rank(&arrived, rank))
        : "memory");
  }
}

// Contiguous bytes, a multiple of 16, to the same place in block `rank`, whose barrier expects them.
__device__ inline void send_bytes(void const* from, uint32_t bytes, Barrier& arrived, int rank) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          address_of_rank(from, rank)),
      "r"(shared_address(from)), "r"(bytes), "r"(address_of_rank(&arrived, rank))
      : "memory");
}

// Makes initialised barriers visible to the copy engine; before the block's first synchronisation.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary shared-memory accesses before later ones of wgmma and the copy engine.
__device__ inline void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Among `threads` threads that share the number `id`, 1..15.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// One of these threads' arrivals, without waiting.
__device__ inline void arrive_at_named_barrier(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace lt2::cuda::sm90
