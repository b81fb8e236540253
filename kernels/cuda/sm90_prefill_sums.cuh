// How the prefill kernel's sums reach y: through shared memory, as whole lines, and where a
// cluster's blocks share a tile, added up first.
#pragma once

#include "wgmma.cuh"

namespace flute {

constexpr int kStagedPitch = 64 * 2 + 16;  // bytes of a column of sums; without bank conflicts
constexpr int kStagedBytes = 2 * 32 * kStagedPitch;  // of a warpgroup: twice 32 columns

#if FLUTE_HAS_WGMMA
// Sums of 64 rows of w to y [columns, n], of which `rows` and `columns` are inside. They pass
// through shared memory, 32 columns at a time, so that a column is written as one whole line, where
// the registers of a warp hold only sixteen bytes of it side by side.
template <typename T, int Count>
__device__ __forceinline__ void write_tile(const float (&sums)[Count], T* y, int64_t n, int rows,
                                           int columns, bool aligned, uint32_t staged, int group) {
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

// Adds up the sums of a cluster's blocks; each block finishes a share of the columns. `at`: this
// warpgroup's room in every block's shared memory. `finish` gets the sums and their first column.
template <int Splits, int Count, typename Finish>
__device__ __forceinline__ void share_sums(const float (&sums)[Count], uint32_t at, Finish finish) {
  constexpr int kOwn = Count / Splits, kQuad = 128 * 16;
  const int rank = cluster_rank();
  at += threadIdx.x % 128 * 16;
  auto store = [&](int to, const float* v) {
    store_shared_float4(at + to * kQuad, make_float4(v[0], v[1], v[2], v[3]));
  };
  float own[kOwn];
  if constexpr (Splits == 2) {  // what is not for itself, a block stores for the other
    float other[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      own[i] = rank ? sums[kOwn + i] : sums[i];
      other[i] = rank ? sums[i] : sums[kOwn + i];
    }
#pragma unroll
    for (int i = 0; i < kOwn / 4; i++) store(i, other + 4 * i);
    cluster_sync();
#pragma unroll
    for (int i = 0; i < kOwn / 4; i++) {
      const float4 sum = load_cluster_float4(at + i * kQuad, rank ^ 1);
      own[4 * i] += sum.x, own[4 * i + 1] += sum.y, own[4 * i + 2] += sum.z,
          own[4 * i + 3] += sum.w;
    }
  } else {  // all in the order of ranks
#pragma unroll
    for (int i = 0; i < Count / 4; i++) store(i, sums + 4 * i);
    cluster_sync();
#pragma unroll
    for (int i = 0; i < kOwn / 4; i++) {
      const uint32_t from = at + (rank * (kOwn / 4) + i) * kQuad;
      float4 sum = load_cluster_float4(from, 0);
#pragma unroll
      for (int other = 1; other < Splits; other++) add(sum, load_cluster_float4(from, other));
      own[4 * i] = sum.x, own[4 * i + 1] = sum.y, own[4 * i + 2] = sum.z, own[4 * i + 3] = sum.w;
    }
  }
  cluster_sync();  // no block leaves while another reads its sums
  finish(own, rank * kOwn * 2);
}
#endif

}  // namespace flute
