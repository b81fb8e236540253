// How the blocks of a cluster add up sums of which each has a part: every block finishes a share of
// them, and sends the others its part of theirs.
//
// Reading each other's sums instead takes two barriers of the whole cluster, one before and one
// after, and a way there and back for each sum: some 1.3 us more where blocks exchange 64 KiB
// (benchmarks/NOTES.md). Here sums arrive on their own and a barrier counts their bytes; a block
// waits for nothing but them, and leaves.
#pragma once

#include "cluster.cuh"
#include "layout.cuh"

namespace flute {

// A thread has sum i where i % threads is its number, in turn i / threads; the turns go round the
// blocks. Turns that a block finishes, at most:
__host__ __device__ __forceinline__ int cluster_turns(int count, int threads, int ranks_log2) {
  const int turns = ceil_div(count, threads);
  return (turns + (1 << ranks_log2) - 1) >> ranks_log2;
}

constexpr int kClusterBarrierBytes = 16;

// Bytes of shared memory where a block receives, without the barrier.
inline int cluster_room(int count, int threads, int value_bytes, int ranks_log2) {
  return ((1 << ranks_log2) - 1) * cluster_turns(count, threads, ranks_log2) * threads *
         value_bytes;
}

#if FLUTE_HAS_BULK
template <typename Value, int Threads>  // Value: float or float4
struct ClusterSums {
  uint32_t barrier, room;  // the same addresses in all blocks; room in it for one arrival
  int count;               // sums
  int ranks_log2, rank;    // of the cluster

  // This block's part of all sums that others finish, and to one thread how much comes here. The
  // others must have begun, and have room.
  template <typename SumOf>
  __device__ __forceinline__ void send(SumOf sum_of) const {
    const int ranks = 1 << ranks_log2;
    if (threadIdx.x == 0) {
      const int whole = count / Threads;
      int own = ((whole + ranks - 1 - rank) >> ranks_log2) * Threads;
      if ((whole & (ranks - 1)) == rank) own += count % Threads;
      barrier_expect(barrier, (ranks - 1) * own * static_cast<int>(sizeof(Value)));
    }
#pragma unroll 1
    for (int i = threadIdx.x, turn = 0; i < count; i += Threads, turn++) {
      const int to = turn & (ranks - 1);
      if (to == rank) continue;
      store_cluster_async(cluster_address(place(rank, to, turn), to), sum_of(i),
                          cluster_address(barrier, to));
    }
  }

  // Visits the sums that this block finishes: visit(i, part). After wait(), part(from) is what
  // another block has sent.
  template <typename Visit>
  __device__ __forceinline__ void finish(Visit visit) const {
#pragma unroll 1
    for (int turn = rank, i = rank * Threads + threadIdx.x; i < count;
         turn += 1 << ranks_log2, i += Threads << ranks_log2)
      visit(i, [&](int from) { return load(place(from, rank, turn), Value()); });
    wait();  // also for sums that nobody needed: a block must not be gone when they come
  }
  __device__ __forceinline__ void wait() const {
    if (ranks_log2 > 0) barrier_wait_cluster(barrier, 0);
  }

 private:
  // Where block `to` receives this thread's sum of a turn from block `from`.
  __device__ __forceinline__ uint32_t place(int from, int to, int turn) const {
    const int sender = from - (from > to);
    const int turns = cluster_turns(count, Threads, ranks_log2);
    return room + ((sender * turns + (turn >> ranks_log2)) * Threads + threadIdx.x) *
                      static_cast<int>(sizeof(Value));
  }
  static __device__ __forceinline__ float load(uint32_t at, float) { return load_shared_float(at); }
  static __device__ __forceinline__ float4 load(uint32_t at, float4) {
    return load_shared_float4(at);
  }
};
#endif

}  // namespace flute
