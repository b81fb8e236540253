// y[m, n] = x[m, k] * w[n, k]^T for many rows of x, w in the internal layout, on sm_80 and later.
//
// A block computes 128 rows of w times 64 or 128 rows of x. Each of its 8 warps has 64 x 64 sums
// in registers: a decoded weight serves 64 rows of x, and of all shapes with so many sums this one
// reads least from shared memory, where the table and x compete. Warps with the same sums split
// the columns of each step and meet at the end. k can be split over blocks too; their sums go to a
// workspace and are added by a second kernel. Every order is fixed: equal inputs give equal bits.
//
// The weights are the A operand. Each is multiplied by its scale and rounded to 16 bits once, the
// value that flute_dequantize gives.
#pragma once

#include "tile_operands.cuh"
#include "tile_supply.cuh"

namespace flute {

constexpr int kTileTableBytes = table_bytes(false);

template <typename Shape>
using TileSums = float[Shape::kWarpRowTiles][Shape::kWarpTokens / 8][4];

// The sums of a block as [row of x][row of w]. The pad keeps the stores of a warp in different
// banks.
constexpr int kSumRow = 128 + 4;  // floats
template <typename Shape>
constexpr int kSumBytes = Shape::kTokens * kSumRow * 4;

// Calls `visit(address, sum)` for each sum of this lane.
template <typename Shape, typename Visit>
__device__ __forceinline__ void for_each_sum(TileSums<Shape>& sums, uint32_t buffer, int row_warp,
                                             int token_warp, int lane, Visit visit) {
  const uint32_t at = buffer + ((token_warp * Shape::kWarpTokens + lane % 4 * 2) * kSumRow +
                                row_warp * Shape::kWarpRowTiles * kTileRows + lane / 4) *
                                   4;
#pragma unroll
  for (int r = 0; r < Shape::kWarpRowTiles; r++)
#pragma unroll
    for (int t = 0; t < Shape::kWarpTokens / 8; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        visit(at + ((t * 8 + (i & 1)) * kSumRow + r * kTileRows + (i >> 1) * 8) * 4, sums[r][t][i]);
}

__device__ __forceinline__ void store_four(float* to, const float4& v, int count, bool aligned) {
  if (aligned && count >= 4) {
    *reinterpret_cast<float4*>(to) = v;
    return;
  }
  const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < count) to[i] = values[i];
}

template <typename T>
__device__ __forceinline__ void store_four(T* to, const float4& v, int count, bool aligned) {
  const T values[4] = {narrow<T>(v.x), narrow<T>(v.y), narrow<T>(v.z), narrow<T>(v.w)};
  if (aligned && count >= 4) {
    uint2 words;
    memcpy(&words, values, sizeof(words));
    *reinterpret_cast<uint2*>(to) = words;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < count) to[i] = values[i];
}

// The block's sums to y or to a share of the workspace: a warp writes a row of x at a time.
template <typename Shape, typename Out>
__device__ __forceinline__ void write_sums(Out* y, int n, const TileBlock<Shape>& block,
                                           uint32_t buffer, int warp, int lane) {
  Out* to = y + static_cast<int64_t>(block.first_token) * n + block.first_row + lane * 4;
  const bool aligned = (reinterpret_cast<uintptr_t>(to) | n * sizeof(Out)) % (4 * sizeof(Out)) == 0;
#pragma unroll 4
  for (int token = warp; token < block.tokens; token += Shape::kWarps) {
    const uint4 v = load_shared4(buffer + (token * kSumRow + lane * 4) * 4);
    store_four(to + static_cast<int64_t>(token) * n,
               make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                           __uint_as_float(v.w)),
               block.rows - lane * 4, aligned);
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    tile_kernel(const __grid_constant__ TileParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = same_for_all(thread / 32);
  const int row_warp = warp % Shape::kRowWarps;
  const int token_warp = warp / Shape::kRowWarps % Shape::kTokenWarps;
  const int k_warp = warp / (Shape::kRowWarps * Shape::kTokenWarps);
  const TileBlock<Shape> block(p, blockIdx.x, blockIdx.y);
  const int steps = (block.end_k_tile - block.first_k_tile) * Shape::kSteps;

  // Shared memory: table | slots of x | slots of records; sums in the end.
  const uint32_t table = shared_address(shared), x_slots = table + kTileTableBytes;
  Ring x_ring(x_slots, Shape::kXSlot, p.x_slots);
  Ring record_ring(x_slots + p.x_slots * Shape::kXSlot, Shape::kRecordSlot, p.record_slots);

  TableFill<Shape::kBits, Shape::kThreads, false, false> fill;
  fill.load(p.table + static_cast<int64_t>(block.part) * p.table_bytes, p.pair_table);

  // All slots are requested, in the order of use: a group has a step of x, and the records that
  // begin with it. Records of later tiles than all those steps are part of the last group.
  XSupply<Shape> x_supply(p, block, steps);
  RecordSupply<Shape> record_supply(p, block, warp);
  int record_requests = 0;
  for (int i = 0; i < p.x_slots; i++) {
    const int until = i + 1 < p.x_slots ? i / Shape::kSteps + 1 : p.record_slots;
    for (; record_requests < until; record_requests++) {
      record_supply.request(record_ring, lane);
      record_ring.advance();
    }
    x_supply.request(x_ring);
    x_ring.advance();
    commit_copies();
  }
  fill.store(table, p.pair_table);
  wait_for_copies(p.x_slots - 1);
  __syncthreads();

  // This lane's row for ldmatrix: of the first 8 rows of x, or of the second; left or right half
  // of 16 columns. The other 16 columns of the warp lie 32 bytes further, exchanged like the rest.
  const uint32_t x_lane = x_offset<Shape>(
      token_warp * Shape::kWarpTokens + lane / 16 * 8 + lane % 8, k_warp * 4 + lane / 8 % 2);
  constexpr int kNextX = 16 * Shape::kXRow;
  const uint32_t record_lane = row_warp * Shape::kWarpRowTiles * Shape::kRecord;
  using WarpWeights =
      Weights<Shape::kBits, typename Shape::T, Shape::kGroups, Shape::kSteps>[Shape::kWarpRowTiles];
  auto load_weights = [&](WarpWeights& weights) {
#pragma unroll
    for (int r = 0; r < Shape::kWarpRowTiles; r++)
      weights[r].load(record_ring.at() + record_lane + r * Shape::kRecord, lane,
                      k_warp * Shape::kSteps);
  };

  TileSums<Shape> sums = {};
  XColumns x_even, x_odd;
  WarpWeights weights, next_weights;  // of a k tile
  uint32_t a[4];                      // decoded one row tile ahead of its products
  // 16 columns of all row tiles. The first tile of the columns after them is decoded last.
  auto multiply_columns = [&](const XColumns& x, int pair, int odd, const WarpWeights& after,
                              int after_pair, int after_odd) {
#pragma unroll
    for (int r = 0; r < Shape::kWarpRowTiles; r++) {
      uint32_t ahead[4];
      if (r + 1 < Shape::kWarpRowTiles)
        weights[r + 1].decode(ahead, table, lane, pair, odd);
      else
        after[0].decode(ahead, table, lane, after_pair, after_odd);
#pragma unroll
      for (int t = 0; t < Shape::kWarpTokens / 8; t++)
        multiply<typename Shape::T>(sums[r][t], a, x.fragment[t]);
#pragma unroll
      for (int j = 0; j < 4; j++) a[j] = ahead[j];
    }
  };

  load_weights(weights);
  x_even.load(x_ring.at() + x_lane, kNextX);
  weights[0].decode(a, table, lane, 0, 0);
#pragma unroll 1
  for (int k_tile = block.first_k_tile; k_tile < block.end_k_tile; k_tile++) {
#pragma unroll
    for (int step = 0; step < Shape::kSteps; step++) {
      x_odd.load(x_ring.at() + (x_lane ^ 32), kNextX);
      multiply_columns(x_even, step, 0, weights, step, 1);

      // The next step has landed, and all that this one needs is in registers, in every warp: its
      // slots take new requests.
      wait_for_copies(p.x_slots - 2);
      __syncthreads();
      x_supply.request(x_ring);
      x_ring.advance();
      const bool last = step + 1 == Shape::kSteps;
      if (last) {
        record_supply.request(record_ring, lane);
        record_ring.advance();
      }
      commit_copies();
      // After the last k tile these read a slot in vain.
      if (last) load_weights(next_weights);
      x_even.load(x_ring.at() + x_lane, kNextX);
      multiply_columns(x_odd, step, 1, last ? next_weights : weights, last ? 0 : step + 1, 0);
    }
#pragma unroll
    for (int r = 0; r < Shape::kWarpRowTiles; r++) weights[r] = next_weights[r];
  }

  // Sum over the warps that split the columns, in pairs; all requests have landed.
#pragma unroll 1
  for (int half = Shape::kKWarps / 2; half > 0; half /= 2) {
    __syncthreads();
    const uint32_t buffer = table + k_warp % half * kSumBytes<Shape>;
    if (k_warp >= half && k_warp < 2 * half)
      for_each_sum<Shape>(sums, buffer, row_warp, token_warp, lane,
                          [](uint32_t at, float sum) { store_shared_float(at, sum); });
    __syncthreads();
    if (k_warp < half)
      for_each_sum<Shape>(sums, buffer, row_warp, token_warp, lane,
                          [](uint32_t at, float& sum) { sum += load_shared_float(at); });
  }
  __syncthreads();
  if (k_warp == 0)
    for_each_sum<Shape>(sums, table, row_warp, token_warp, lane,
                        [](uint32_t at, float sum) { store_shared_float(at, sum); });
  __syncthreads();
  if (p.splits > 1)
    write_sums(p.workspace + static_cast<int64_t>(blockIdx.y) * p.m * p.n, p.n, block, table, warp,
               lane);
  else
    write_sums(static_cast<typename Shape::T*>(p.y), p.n, block, table, warp, lane);
}

}  // namespace flute
