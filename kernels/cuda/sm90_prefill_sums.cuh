// How the prefill kernel's sums reach y: through shared memory, as whole lines, and where blocks
// share a tile, added up first.
#pragma once

#include "cluster.cuh"
#include "sm90_prefill_work.cuh"
#include "wgmma.cuh"

namespace flute {

constexpr int kStagedPitch = 64 * 2 + 16;  // bytes of a column of sums; without bank conflicts
constexpr int kStagedBytes = 2 * 32 * kStagedPitch;  // of a warpgroup: twice 32 columns

#if FLUTE_HAS_WGMMA
// Sums of 64 rows of w to y [columns, n], of which `rows` and `columns` are inside. They pass
// through shared memory, 32 columns at a time, so that a column is written as one whole line, where
// the registers of a warp hold only sixteen bytes of it side by side.
// `arrived(i)` runs before columns 32 i to 32 i + 31 are needed.
template <typename T, int Count, typename Arrived>
__device__ __forceinline__ void write_tile(const float (&sums)[Count], T* y, int64_t n, int rows,
                                           int columns, bool aligned, uint32_t staged, int group,
                                           Arrived arrived) {
  constexpr int kHalf = 16;  // columns that a warp stores, and the warpgroup writes, at once
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  const uint32_t to =
      staged + (lane / 16 * 8 + lane % 8) * kStagedPitch + warp * 32 + lane / 8 % 2 * 16;
  const int row = thread % 8 * 8;
  const uint32_t from = staged + thread / 8 * kStagedPitch + row * 2;
  T* at = y + thread / 8 * n + row;
  int left = columns - thread / 8;
#pragma unroll
  for (int i = 0; i < 2 * Count / kHalf; i++, at += kHalf * n, left -= kHalf) {
    const uint32_t buffer = i % 4 * (kHalf * kStagedPitch);
    if (i % 2 == 0) {
      if (i * kHalf >= columns) break;
      arrived(i / 2);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t r[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float* pair = sums + 8 * (i + half) + 2 * j;
          r[j] = narrow_pair<T>(pair[0], pair[1]);
        }
        store_transposed(to + buffer + half * kHalf * kStagedPitch, r);
      }
      warps_sync(1 + group, 4);
    }
    if (left <= 0 || row >= rows) continue;
    const uint4 values = load_shared4(from + buffer);
    if (aligned && row + 8 <= rows) {
      *reinterpret_cast<uint4*>(at) = values;
      continue;
    }
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (row + j < rows)
        reinterpret_cast<uint16_t*>(at)[j] = static_cast<uint16_t>(words[j / 2] >> (j & 1) * 16);
  }
  warps_sync(1 + group, 4);  // the next tile's sums may come
}

// A warpgroup's sums to global memory, for another block to add to its own; `flag` then says so.
template <int Count>
__device__ __forceinline__ void give_sums(const float (&sums)[Count], float* to, uint32_t* flag,
                                          int barrier) {
  const int thread = threadIdx.x % 128;
  float4* at = reinterpret_cast<float4*>(to) + thread;
#pragma unroll
  for (int i = 0; i < Count / 4; i++)
    __stcg(at + i * 128,
           make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
  warps_sync(barrier, 4);
  if (thread == 0) store_release(flag, 1);
}

// Waits for what another block gives, and adds it. The flag is cleared for the next launch.
template <int Count>
__device__ __forceinline__ void add_sums(float (&sums)[Count], const float* from, uint32_t* flag,
                                         int barrier) {
  const int thread = threadIdx.x % 128;
  while (load_acquire(flag) == 0) __nanosleep(20);
  warps_sync(barrier, 4);  // all have seen the flag
  if (thread == 0) *flag = 0;
  const float4* at = reinterpret_cast<const float4*>(from) + thread;
#pragma unroll
  for (int i = 0; i < Count / 4; i++) {
    const float4 v = __ldcg(at + i * 128);
    sums[4 * i] += v.x, sums[4 * i + 1] += v.y, sums[4 * i + 2] += v.z, sums[4 * i + 3] += v.w;
  }
}

// Barriers of a pair of blocks that share a tile: there is room in the other block for the sums
// that it needs, and so many columns of them have come to this one.
struct PairBarriers {
  static constexpr int kColumnsEach = 32;  // of sums that a barrier stands for
  uint32_t base;
  __device__ __forceinline__ uint32_t room() const { return base; }
  __device__ __forceinline__ uint32_t come(int group, int part) const {
    return base + 8 + (group * 4 + part) * 8;
  }
  static constexpr int kBytes = 8 + kPrefillGroups * 4 * 8;

  // One thread, for its block. Each is used once in a launch.
  __device__ __forceinline__ void init(int columns) const {
    barrier_init(room(), 1);
    for (int g = 0; g < kPrefillGroups; g++)
      for (int i = 0; i < columns / 2 / kColumnsEach; i++) {
        barrier_init(come(g, i), 1);
        barrier_expect(come(g, i), kColumnsEach * 64 * 4);
      }
  }
};

// The two blocks of a cluster share a tile: each sends the other half of its columns, and adds what
// comes to its own half. `from`: this warpgroup's room for that, `to`: the other block's.
// `finish(own, first, arrived)` writes the own half, columns from `first` on; it calls
// arrived(32 columns) before it needs them. Nothing is waited for but sums: a block leaves when it
// has got all that is sent to it.
template <int Count, typename Finish>
__device__ __forceinline__ void exchange_sums(const float (&sums)[Count], uint32_t from,
                                              uint32_t to, PairBarriers barriers, int group,
                                              Finish finish) {
  constexpr int kOwn = Count / 2, kQuad = 128 * 16, kEach = PairBarriers::kColumnsEach / 2;
  const uint32_t rank = cluster_rank(), at = threadIdx.x % 128 * 16;
  float own[kOwn];
  barrier_wait_cluster(barriers.room(), 0);
  to = cluster_address(to + at, rank ^ 1);
#pragma unroll
  for (int i = 0; i < kOwn; i += 4) {
    float other[4];
#pragma unroll
    for (int j = i; j < i + 4; j++) {
      own[j] = rank ? sums[kOwn + j] : sums[j];
      other[j - i] = rank ? sums[j] : sums[kOwn + j];
    }
    store_cluster_async(to + i / 4 * kQuad, make_float4(other[0], other[1], other[2], other[3]),
                        cluster_address(barriers.come(group, i / kEach), rank ^ 1));
  }
  finish(own, rank * kOwn * 2, [&](int part) {
    barrier_wait_cluster(barriers.come(group, part), 0);
#pragma unroll
    for (int i = part * kEach; i < (part + 1) * kEach; i += 4) {
      const float4 sum = load_shared_float4(from + at + i / 4 * kQuad);
      own[i] += sum.x, own[i + 1] += sum.y, own[i + 2] += sum.z, own[i + 3] += sum.w;
    }
  });
  // Sums of columns that do not exist come, too.
  for (int part = 0; part < kOwn / kEach; part++)
    barrier_wait_cluster(barriers.come(group, part), 0);
}
#endif

}  // namespace flute
