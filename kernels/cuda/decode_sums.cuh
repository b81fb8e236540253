// How a block of a decode kernel ends: the sums of its warps become rows of y.
#pragma once

#include "cluster_sums.cuh"
#include "decode_share.cuh"

namespace flute {

// All threads, once all partial sums are stored. `partials_of(warp)`: where a warp's are.
template <typename Shape, typename PartialsOf>
__device__ __forceinline__ void finish_rows(const DecodeParams& p, const BlockRows& block, int half,
                                            uint32_t base, PartialsOf partials_of) {
  // Sum i of this block: row i % stride of w and i / stride of x. Half a warp sums a column of 16
  // rows over the warps; then those of the cluster's blocks are added, gate's before up's.
  const int stride = p.row_tiles * kTileRows;
  auto sum_of = [&](int i, int m) {
    const int tile = i / kTileRows - m * p.row_tiles, group = divide(tile, p.rows_each_inverse);
    const uint32_t at = (tile - group * p.rows_each) * Shape::partial_tile(p.m) +
                        (m * kPartialColumn + i % kTileRows) * 4;
    float sum = 0;
#pragma unroll 1
    for (int j = 0; j < p.k_warps; j += 4) {
      float part[4];  // loaded together, added in order
#pragma unroll
      for (int l = 0; l < 4; l++)
        part[l] = j + l < p.k_warps
                      ? load_shared_float(partials_of((group << p.k_warps_log2) + j + l) + at)
                      : 0;
      sum = sum + part[0] + part[1] + part[2] + part[3];
    }
    return sum;
  };
  auto column_of = [&](int i) { return divide(i / kTileRows, p.row_tiles_inverse); };
  typename Shape::T* y = static_cast<typename Shape::T*>(p.y) + block.first_row - half * p.n;
#if FLUTE_HAS_BULK
  const int ranks = 1 << p.ranks_log2, rank = blockIdx.x & (ranks - 1);
  const ClusterSums<float, Shape::kThreads> cluster{base + p.room_offset,
                                                    base + p.room_offset + kClusterBarrierBytes,
                                                    p.m * stride, p.ranks_log2, rank};
  if (ranks > 1) {
    cluster_wait();
    cluster.send([&](int i) { return sum_of(i, column_of(i)); });
  }
  cluster.finish([&](int i, auto part) {
    const int m = column_of(i), row = i - m * stride;
    if (row >= block.rows) return;
    const float own = sum_of(i, m);
    float sum = own, gate = 0;
    cluster.wait();
#pragma unroll 1
    for (int from = 0; from < ranks && ranks > 1; from++) {
      const float other = from == rank ? own : part(from);
      const bool up = from == p.splits;
      if (up) gate = sum;
      sum = from == 0 || up ? other : sum + other;
    }
    if (p.activation) sum = activate(p.activation, gate, sum);
    y[static_cast<int64_t>(m) * p.n + row] = narrow<typename Shape::T>(sum);
  });
#else
#pragma unroll 1
  for (int i = threadIdx.x; i < p.m * stride; i += Shape::kThreads) {
    const int m = column_of(i), row = i - m * stride;
    if (row < block.rows)
      y[static_cast<int64_t>(m) * p.n + row] = narrow<typename Shape::T>(sum_of(i, m));
  }
#endif
}

}  // namespace flute
