// y[m, n] = x[m, k] * w[n, k]^T for few rows of x (m <= 32), w in the internal layout.
//
// A block computes a few 16-row tiles of w over its range of k. Its warps form `row_warps` groups
// along the rows; within a group they split k, tile by tile in turns, so that together they read
// long contiguous runs. Each warp feeds itself: a ring of tiles in flight, private barriers, no
// block-wide synchronization between the start and the final sum. Where rows alone do not fill the
// GPU, a cluster of blocks splits k. All sums are in a fixed order: equal inputs give equal bits.
//
// The weights are the A operand (16 rows of w), x is B (8 rows of x a tile), both in 16 bits; each
// group of k accumulates apart in fp32 and is multiplied by its fp32 scale once, so that no weight
// is rounded after the table.
#pragma once

#include "decode_operands.cuh"
#include "decode_sums.cuh"

namespace flute {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kSmall ? 2 : 1)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  if constexpr (Shape::kSmall && !FLUTE_HAS_BULK) return;
  extern __shared__ uint8_t shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = same_for_all(thread / 32);
  const int half = half_of_block(p, blockIdx.x >> p.splits_log2);
  const BlockRows block(p, row_block(p, blockIdx.x >> p.splits_log2));

  // Shared memory: barriers, x tiles, zeros, some warps' regions | table | the other regions. Of a
  // small block: barriers | table and x | regions. Then room for sums of other blocks.
  const uint32_t base = shared_address(shared);
  const uint32_t table = Shape::kSmall ? base - kSharedReserved + kSmallTable
                                       : (base + table_alignment(kWideTable) - 1) &
                                             ~(table_alignment(kWideTable) - 1u);
  auto region_of = [&](int w) {
    if constexpr (Shape::kSmall)
      return base + p.high_region + w * p.region_bytes -
             max(0, w - p.full_regions) * Shape::kStride;
    return (w < p.low_regions ? base + p.first_region
                              : base + p.high_region - p.low_regions * p.region_bytes) +
           w * p.region_bytes;
  };
  const WarpShare<Shape> share(p, block, warp);
  const int row_warp = share.row_warp, k_warp = share.k_warp;
  const int first = share.first, rows = share.rows;
  const int begin = share.begin, end = share.end, steps = share.steps;
  const uint32_t barriers = base + warp * kBarrierBytes;
  const uint32_t x_barrier = base + k_warp * kBarrierBytes + kMaxSlots * 8;
  const uint32_t zeros = base + Shape::kWarps * kBarrierBytes;
  const uint32_t x_tile =
      Shape::kSmall ? table + 128 + k_warp * XPlace<Shape>::kRowsOfStep * XPlace<Shape>::kRow
                    : base + p.x_offset + k_warp * p.x_bytes;
  const uint32_t region = region_of(warp);

  // The weights do not depend on the previous kernel: with overlap, some are requested while it
  // still runs. The others follow x, which is needed first and would wait behind them.
  TileRing<Shape> ring;
  ring.barriers = barriers, ring.slots_at = region;
  ring.slots = p.slots - (Shape::kSmall && warp >= p.full_regions);
  ring.rows = rows, ring.k_left = rows > 0 ? end - begin : 0;
  ring.slot = ring.row = 0, ring.phase = 0;
  constexpr uint32_t kUnits = Shape::kRecord / 16;
  ring.records = p.records;
  ring.row_step = p.k_tiles * kUnits;
  ring.back = Shape::kDepth * kUnits - rows * ring.row_step;
  ring.start_at(((block.first_tile + first) * p.k_tiles + begin) * kUnits);
  if (lane < p.slots) barrier_init(barriers + lane * 8, FLUTE_HAS_BULK ? 1 : 32);
  if (lane == kMaxSlots) barrier_init(barriers + lane * 8, 32 * p.row_warps);
#if FLUTE_HAS_BULK
  barrier_init_fence();
  ring.policy = evict_first_policy();
#endif
  __syncwarp();
  const int early = min(p.early_slots, ring.slots);
  ring.start(0, early, lane);
  TableFill<Shape::kBits, Shape::kThreads> fill;
  fill.load(p.table + static_cast<int64_t>(block.part) * p.table_bytes, p.pair_table);

  // What is added to a small block's constant is 0, or in a cluster the block's number in bits 24..
  const TableDecoder<Shape> decoder(Shape::kSmall ? table - kSmallTable : table, lane);
  uint32_t x_row[Shape::kXTiles], x_next[Shape::kXTiles];  // a row, and how far to the next tile's
  if constexpr (Shape::kSmall) {  // rows past the last are zero, where the others will be
    constexpr int kRows = Shape::kXTiles * 8;
#pragma unroll 1
    for (int i = thread; i < p.k_warps * XPlace<Shape>::kRowsOfStep * 16; i += Shape::kThreads)
      if (i / 16 % kRows >= p.m)
        store_shared4(table + 128 + XPlace<Shape>::of_chunk(i / 16, i % 16),
                      make_uint4(0, 0, 0, 0));
  } else {
    if (thread < kXRow / 16) store_shared4(zeros + thread * 16, make_uint4(0, 0, 0, 0));
  }
#pragma unroll
  for (int t = 0; t < Shape::kXTiles; t++) {
    const int row = t * 8 + lane % 8;
    const bool exists = Shape::kSmall || row < p.m;
    x_row[t] = exists ? x_tile + XPlace<Shape>::of_chunk(row, lane / 8) : zeros + lane / 8 * 16;
    x_next[t] = exists ? XPlace<Shape>::tile_bytes(p.m) : 0;
  }
  auto request_x = [&](int step) {
    const int k_tile = begin + step * Shape::kDepth;
    XTile<Shape>::request(p.x, p.m, p.k, x_tile, x_barrier, k_tile,
                          min(Shape::kDepth, end - k_tile), row_warp, p.row_warps, lane);
  };
#if FLUTE_HAS_BULK
  if (p.ranks_log2 > 0) {
    if (thread == 0) barrier_init(base + p.room_offset, 1);
    barrier_init_fence();
    cluster_arrive();
  }
#endif
  if (p.row_warps > 1) __syncthreads();  // barriers of other warps
#if FLUTE_HAS_BULK
  wait_for_previous_launch();
  allow_next_launch();
#endif
  if (steps > 0) request_x(0);
  ring.start(early, ring.slots, lane);
  fill.store(table, p.pair_table);
  __syncthreads();

  Sums<Shape> sums[Shape::kMaxRows] = {};
  for (int step = 0; step < steps; step++) {
    barrier_wait(x_barrier, step & 1);
    auto request_next_x = [&] {
      if (step + 1 == steps) return;
      if (p.row_warps == 1)
        __syncwarp();
      else
        warps_sync(1 + k_warp, p.row_warps);
      request_x(step + 1);
    };
    if constexpr (Shape::kHalves == 1) {
      auto multiply_step = [&](auto k_tiles, bool all) {  // if not all of them, the first
        constexpr int kTiles = decltype(k_tiles)::value;
        XTile<Shape> x[kTiles];
#pragma unroll
        for (int d = 0; d < kTiles; d++)
          if (d == 0 || all) x[d].load(x_row, x_next, d, 0);
        request_next_x();
#pragma unroll
        for (int r = 0; r < Shape::kMaxRows; r++) {
          if (r < rows) {
            const uint32_t slot = ring.wait();
#pragma unroll
            for (int d = 0; d < kTiles; d++) {
              if (d > 0 && !all) continue;
              Codes<Shape::kBits> codes;
              Scales<Shape> scales;
              codes.load(slot + d * Shape::kRecord, lane);
              scales.load(slot + d * Shape::kRecord, lane);
              multiply_tile<Shape>(sums[r], codes, scales, x[d], decoder, 0);
            }
            ring.advance(lane);
          }
        }
        ring.next_step();
      };
      // Code of its own for a last k tile alone: within the other's a branch would keep the
      // compiler from doing one tile's loads under the other's products. Only for Hopper: with it
      // for all architectures the library would be too large.
      const bool full = Shape::kDepth == 1 || begin + (step + 1) * Shape::kDepth <= end;
      if constexpr (!FLUTE_HAS_BULK)
        multiply_step(Constant<Shape::kDepth>(), full);
      else if (full)
        multiply_step(Constant<Shape::kDepth>(), true);
      else
        multiply_step(Constant<1>(), true);
    } else {
      // The warp's tiles stay in their slots until both halves are done.
      XTile<Shape> x;
      uint32_t record[Shape::kMaxRows];
      TileRing<Shape> done = ring;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        x.load(x_row, x_next, 0, half);
        if (half == 1) request_next_x();
#pragma unroll
        for (int r = 0; r < Shape::kMaxRows; r++) {
          if (r < rows) {
            if (half == 0) {
              record[r] = ring.wait();
              ring.skip();
            }
            Codes<Shape::kBits> codes;
            Scales<Shape> scales;
            codes.load(record[r], lane);
            scales.load(record[r], lane);
            multiply_tile<Shape>(sums[r], codes, scales, x, decoder, half);
            if (half == 1) done.advance(lane);
          }
        }
      }
      ring = done;
      ring.next_step();
    }
  }

  // As often past this barrier as the warps with the most steps: racecheck tells the stores below
  // from earlier ones by the barriers since.
  if (p.row_warps > 1)
    for (int step = max(steps, 1); step < share.most_steps; step++)
      warps_sync(1 + k_warp, p.row_warps);

  p.ahead.ask(blockIdx.x, gridDim.x, warp, Shape::kWarps, lane);

  // Sum over the warps that split k, in their order. A small block's regions may be too small for
  // its sums; they take the table's place, once all warps are done with it.
  auto partials_of = [&](int w) {
    return Shape::kSmall ? table + w * p.rows_each * Shape::kPartialTile : region_of(w);
  };
  if constexpr (Shape::kSmall)
    __syncthreads();
  else
    __syncwarp();
#pragma unroll
  for (int r = 0; r < Shape::kMaxRows; r++)
    if (r < rows) store_partial<Shape>(partials_of(warp) + r * Shape::kPartialTile, sums[r], lane);
  __syncthreads();

  finish_rows<Shape>(p, block, half, base, partials_of);
}

}  // namespace flute
