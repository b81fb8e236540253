// What the decode kernels are told, and how a block and its warps share the work.
#pragma once

#include "activation.cuh"
#include "ahead.cuh"
#include "ring.cuh"

namespace flute {

constexpr int kPartialColumn = 16 + 4;  // floats of one column of sums; the pad avoids conflicts
constexpr int kBarrierBytes = (kMaxSlots + 1) * 8;

// A small block has 8 warps and half of a multiprocessor. With overlap the next launch's blocks
// then come while this one's are at work: their tables and first weights are there when it ends.
constexpr int kWarpsOfSmall = 8;

// What a launch needs; filled by decode_launch.cuh from FluteMatrix and FluteDecodeConfig.
struct DecodeParams {
  const uint8_t* records;
  const uint8_t* table;
  const void* x;
  void* y;
  int m, n, k, k_tiles;  // n: columns of y
  int activation;        // of a gated launch, else 0
  int table_bytes;       // of one part
  bool pair_table;
  int row_tiles, row_warps, k_warps, splits, slots;
  int k_warps_log2, splits_log2;  // both are powers of two: an integer division costs
  int rows_each;                  // a tenth of a microsecond at the start of a block
  uint32_t row_tiles_inverse, rows_each_inverse;  // see divide
  int early_slots;                             // requested before the previous kernel has finished
  int x_bytes;                                 // of the x tiles of a step
  int region_bytes;                            // of one warp: its ring, later its partial sums
  int x_offset;                                // of all x tiles, from the start of shared memory
  int first_region, low_regions, high_region;  // regions below the table, then those behind it
  int full_regions;                            // of a small block; the others have a slot less
  int ranks_log2;                              // blocks of a cluster
  int room_offset;                             // where sums of the cluster's other blocks come
  int first_block[FLUTE_MAX_PARTS + 1];        // of each part
  Parts parts;
  Ahead ahead;
};

// A warp's share of its block's work: `rows` row tiles from `first`, k tiles `begin` .. `end` - 1,
// kDepth of them in each of `steps` steps. The warps with the most have `most_steps`.
template <typename Shape>
struct WarpShare {
  int row_warp, k_warp;
  int first, rows, begin, end, steps, most_steps;

  __device__ __forceinline__ WarpShare(const DecodeParams& p, const BlockRows& block, int warp) {
    row_warp = warp >> p.k_warps_log2, k_warp = warp & (p.k_warps - 1);
    first = row_warp * p.rows_each;
    rows = max(0, min(p.rows_each, block.tiles - first));
    const int split = blockIdx.x & (p.splits - 1);
    const int block_begin = p.k_tiles * split >> p.splits_log2;
    const int length = (p.k_tiles * (split + 1) >> p.splits_log2) - block_begin;
    begin = block_begin + (length * k_warp >> p.k_warps_log2);
    end = block_begin + (length * (k_warp + 1) >> p.k_warps_log2);
    steps = (end - begin + Shape::kDepth - 1) / Shape::kDepth;
    most_steps = (((length + p.k_warps - 1) >> p.k_warps_log2) + Shape::kDepth - 1) / Shape::kDepth;
  }
};

}  // namespace flute
