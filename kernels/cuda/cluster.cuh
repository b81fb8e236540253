// What the blocks of a cluster tell each other: instructions of Hopper, beside those of ptx.cuh.
#pragma once

#include "ptx.cuh"

namespace flute {

#if FLUTE_HAS_BULK
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of a cluster arrive and later, before they need to know that all have begun, wait.
// Barriers that other blocks will use are initialized before, and barrier_init_fence called: a
// releasing arrival would wait for all stores and copies under way. With threads that arrive but
// never wait, racecheck does not end (NOTES.md).
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address, for the next three, of what lies at `address` in block `rank` of this cluster.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Arrives at a barrier of another block of the cluster, which may then write where this thread, and
// those that it has waited for, have read: nothing that they have written is meant. A releasing
// arrival would wait for all memory accesses under way; compilers before CUDA 12.8 know no other.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
#define FLUTE_ARRIVAL "relaxed"
#else
#define FLUTE_ARRIVAL "release"
#endif
__device__ __forceinline__ void cluster_barrier_arrive(uint32_t remote) {
  asm volatile("mbarrier.arrive." FLUTE_ARRIVAL
               ".cluster.shared::cluster.b64 _, [%0];" ::"r"(remote)
               : "memory");
}
#undef FLUTE_ARRIVAL

// Sixteen bytes to another block's shared memory; `remote_barrier`, of the same block, hears of
// them. Asynchronous.
__device__ __forceinline__ void store_cluster_async(uint32_t remote, float4 v,
                                                    uint32_t remote_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(remote),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(remote_barrier)
      : "memory");
}

__device__ __forceinline__ void store_cluster_async(uint32_t remote, float v,
                                                    uint32_t remote_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
          remote),
      "f"(v), "r"(remote_barrier)
      : "memory");
}

// As barrier_wait, for what other blocks of the cluster did before they arrived.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#endif

}  // namespace flute
