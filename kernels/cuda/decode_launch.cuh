// From a problem and a configuration to a launch of a decode kernel. Included by the decode_w*.cu
// and planes_w2.cu.
#pragma once

#include "decode.cuh"
#include "errors.h"
#include "launch_common.cuh"
#include "planes.cuh"

namespace flute {

template <typename Shape>
constexpr bool kIsPlanes = false;
template <int Bits, typename T>
constexpr bool kIsPlanes<PlaneShape<Bits, T>> = true;

// Shared memory of a launch; total is -1 where the configuration does not fit.
struct SharedPlan {
  int x_bytes, x_offset, region_bytes, first_region, low_regions, high_region, full_regions;
  int room_offset, total;
};

inline int whole_lines(int bytes) {
  return ceil_div(bytes, kLine) * kLine;
}

// A small block: its barriers, the table with x in it, a region for each warp. Where not all of
// them have room for `slots` requests, the last ones have one less. `room`: for sums of others.
template <typename Shape>
SharedPlan plan_small(const FluteDecodeConfig& config, int room, int limit) {
  SharedPlan plan{};
  plan.high_region = kSmallTable - kSharedReserved + table_bytes(true);
  plan.region_bytes = config.slots * Shape::kStride;
  const int lacking =
      plan.high_region + Shape::kWarps * plan.region_bytes + room - limit + Shape::kStride - 1;
  const int shorter = lacking < Shape::kStride ? 0 : lacking / Shape::kStride;
  plan.full_regions = Shape::kWarps - shorter;
  plan.room_offset =
      plan.high_region + Shape::kWarps * plan.region_bytes - shorter * Shape::kStride;
  plan.total = plan.room_offset + room;
  const int least = plan.region_bytes - (shorter > 0 ? Shape::kStride : 0);
  if (shorter >= Shape::kWarps || least < Shape::kStride) plan.total = -1;
  return plan;
}

// Barriers | x of the block's k tiles | partial sums | rings.
template <typename Shape>
SharedPlan plan_planes(const FluteDecodeConfig& config, int m, int k_tiles, int room, int limit) {
  SharedPlan plan{};
  plan.total = limit + 1;
  if (k_tiles / config.splits > limit / PlaneX::kBytes) return plan;  // bytes of x fit an int below
  const int rows_each = ceil_div(config.row_tiles, config.row_warps);
  plan.x_offset = whole_lines(Shape::kWarps * kBarrierBytes);
  plan.high_region = plan.x_offset + ceil_div(k_tiles, config.splits) * PlaneX::kBytes;
  plan.first_region =
      whole_lines(plan.high_region + Shape::kWarps * rows_each * Shape::partial_tile(m));
  plan.region_bytes = config.slots * Shape::kStride;
  plan.room_offset = plan.first_region + Shape::kWarps * plan.region_bytes;
  plan.total = plan.room_offset + room;
  return plan;
}

// Barriers, zeros, x and some regions | the table | the other regions. x goes behind the table
// where there is no room before it. At last room for the sums of a cluster of 2^`ranks_log2`.
template <typename Shape>
SharedPlan plan_shared(const FluteDecodeConfig& config, int m, int k_tiles, int ranks_log2,
                       bool wide, int limit) {
  const int room = ranks_log2 == 0 ? 0
                                   : kClusterBarrierBytes +
                                         cluster_room(m * config.row_tiles * kTileRows,
                                                      Shape::kThreads, sizeof(float), ranks_log2);
  if constexpr (kIsPlanes<Shape>) {
    SharedPlan plan = plan_planes<Shape>(config, m, k_tiles, room, limit);
    if (plan.total > limit) plan.total = -1;
    return plan;
  } else if constexpr (Shape::kSmall) {
    return plan_small<Shape>(config, room, limit);
  } else {
    const int rows_each = ceil_div(config.row_tiles, config.row_warps);
    const int ring = config.slots * Shape::kStride, partial = rows_each * Shape::kPartialTile;
    SharedPlan plan{};
    plan.x_bytes = Shape::kDepth * m * kXRow;
    plan.region_bytes = ring > partial ? ring : partial;
    const int before = table_alignment(wide) - kSharedReserved;  // the table's offset
    const int x_total = Shape::kWarps / config.row_warps * plan.x_bytes;
    plan.x_offset = Shape::kWarps * kBarrierBytes + kXRow;
    plan.high_region = before + table_bytes(wide);
    if (plan.x_offset + x_total <= before) {
      plan.first_region = plan.x_offset + x_total;
    } else {
      plan.first_region = plan.x_offset;
      plan.x_offset = plan.high_region;
      plan.high_region += x_total;
    }
    plan.first_region = whole_lines(plan.first_region);
    plan.high_region = whole_lines(plan.high_region);
    plan.low_regions = (before - plan.first_region) / plan.region_bytes;
    if (plan.low_regions > Shape::kWarps) plan.low_regions = Shape::kWarps;
    plan.room_offset = plan.high_region + (Shape::kWarps - plan.low_regions) * plan.region_bytes;
    plan.total = plan.room_offset + room;
    if (plan.total > limit) plan.total = -1;
    return plan;
  }
}

template <typename Shape>
auto kernel_of() {
  if constexpr (kIsPlanes<Shape>)
    return planes_kernel<Shape>;
  else
    return decode_kernel<Shape>;
}

template <typename Shape>
int launch_shape(const FluteMatrix& matrix, FluteDecodeConfig config, int m, const void* x,
                 const void* records, const void* table, void* y, const FluteAhead* ahead,
                 cudaStream_t stream) {
  DeviceLimits device;
  if (const int error = device.load()) return error;
  int limit = device.shared_limit;
  if (Shape::kBlocks == 2)
    if (const int error = device.half_limit(&limit)) return error;
  if (config.splits < 1 || config.overlap < 0) return kBadConfig;
  const int rows_each = ceil_div(config.row_tiles, config.row_warps);
  if (rows_each > Shape::kMaxRows || config.row_tiles > 128 || Shape::kWarps % config.row_warps ||
      config.splits > 8 || (config.splits & (config.splits - 1)))
    return kBadConfig;

  static std::atomic<int> versions[kMaxDevices];
  if (const int error = device.prepare(kernel_of<Shape>(), versions)) return error;
  const int version = device.ptx_version;
  const bool wide = has_wide_table(version), hopper = version >= 90;
  const bool gated = is_gated(matrix);
  const int ranks_log2 = log2_of(config.splits) + gated;
  if ((ranks_log2 > 0 && !hopper) || (gated && !can_gate(matrix, config.splits))) return kBadConfig;
  if (Shape::kSmall && !(hopper && wide)) return kBadConfig;
  if (kIsPlanes<Shape> && (!hopper || matrix.pair_table)) return kBadConfig;

  SharedPlan plan;
  const int k_tiles = ceil_div(matrix.k, kTileK);
  const int least_slots = Shape::kHalves == 1 ? 1 : rows_each + 1;
  // About 70 KiB in flight fill the memory system; beyond 100 KiB a block, bandwidth drops by a
  // third (NOTES.md).
  if (config.slots <= 0) {
    config.slots = kIsPlanes<Shape> ? 3 : 80 * 1024 / (Shape::kWarps * Shape::kSlot) + 1;
    if (config.slots > kMaxSlots) config.slots = kMaxSlots;
    if (config.slots < least_slots + 1) config.slots = least_slots + 1;
    do {
      config.slots--;
      plan = plan_shared<Shape>(config, m, k_tiles, ranks_log2, wide, limit);
    } while (plan.total < 0 && config.slots > least_slots);
  } else {
    plan = plan_shared<Shape>(config, m, k_tiles, ranks_log2, wide, limit);
  }
  if (plan.total < 0 || config.slots > kMaxSlots || config.slots < least_slots) return kBadConfig;

  const int table_entry = matrix.pair_table ? (2 << (2 * matrix.bits)) : (1 << matrix.bits);
  DecodeParams params{static_cast<const uint8_t*>(records),
                      static_cast<const uint8_t*>(table),
                      x,
                      y,
                      m,
                      gated ? matrix.n / 2 : matrix.n,
                      matrix.k,
                      k_tiles,
                      matrix.activation,
                      table_entry * 2,
                      matrix.pair_table != 0,
                      config.row_tiles,
                      config.row_warps,
                      Shape::kWarps / config.row_warps,
                      config.splits,
                      config.slots,
                      log2_of(Shape::kWarps / config.row_warps),
                      log2_of(config.splits),
                      rows_each,
                      inverse_of(config.row_tiles),
                      inverse_of(rows_each),
                      config.overlap < config.slots ? config.overlap : config.slots,
                      plan.x_bytes,
                      plan.region_bytes,
                      plan.x_offset,
                      plan.first_region,
                      plan.low_regions,
                      plan.high_region,
                      plan.full_regions,
                      ranks_log2,
                      plan.room_offset,
                      {},
                      Parts(matrix)};
  for (int i = 0; i < matrix.parts; i++)
    params.first_block[i + 1] =
        params.first_block[i] +
        ceil_div(ceil_div(matrix.part_rows[i], kTileRows), config.row_tiles);
  const int blocks = params.first_block[matrix.parts];
  params.ahead = make_ahead(ahead, blocks * config.splits, device.multiprocessors * Shape::kBlocks);

  return launch_kernel(kernel_of<Shape>(), dim3(blocks * config.splits), Shape::kThreads,
                       plan.total, 1 << ranks_log2, config.overlap && hopper, stream, params);
}

// One function for each bit width, each in a file of its own so that they build side by side.
#define FLUTE_DECODE_ARGUMENTS                                                      \
  const FluteMatrix &matrix, const FluteDecodeConfig &config, int m, const void *x, \
      const void *records, const void *table, void *y, const FluteAhead *ahead,     \
      cudaStream_t stream
int decode_w4(FLUTE_DECODE_ARGUMENTS);
int decode_w3(FLUTE_DECODE_ARGUMENTS);
int decode_w2(FLUTE_DECODE_ARGUMENTS);
int planes_w2(FLUTE_DECODE_ARGUMENTS);  // of bit planes, planes_w2.cu

template <int Bits, typename T, int XTiles, int Warps, int Rows>
int launch_groups(FLUTE_DECODE_ARGUMENTS) {
#define FLUTE_CASE(GROUPS)                                                  \
  case GROUPS:                                                              \
    return launch_shape<DecodeShape<Bits, T, XTiles, GROUPS, Warps, Rows>>( \
        matrix, config, m, x, records, table, y, ahead, stream)
  switch (groups_in_tile(matrix.group_size)) {
    FLUTE_CASE(1);
#ifndef FLUTE_FEW_SHAPES  // for quick builds while developing: bf16, groups of 128
    FLUTE_CASE(2);
    FLUTE_CASE(4);
#endif
  }
#undef FLUTE_CASE
  return kBadShape;
}

template <int Bits, typename T>
int launch_x_tiles(FLUTE_DECODE_ARGUMENTS) {
  const bool small = config.warps == kWarpsOfSmall;
  if (!(small ? m <= 8 : config.warps == 16)) return kBadConfig;
  if (config.row_tiles < 1 || config.row_warps < 1) return kBadConfig;
  const int rows = ceil_div(config.row_tiles, config.row_warps);  // launch_shape judges the rest
  const auto launch = small && rows <= 4 ? launch_groups<Bits, T, 1, kWarpsOfSmall, 4>
                      : small            ? launch_groups<Bits, T, 1, kWarpsOfSmall, 8>
                      : m > 16           ? launch_groups<Bits, T, 4, 16, 2>
                      : m > 8            ? launch_groups<Bits, T, 2, 16, 4>
                      : rows <= 2        ? launch_groups<Bits, T, 1, 16, 2>
                      : rows <= 4        ? launch_groups<Bits, T, 1, 16, 4>
                                         : launch_groups<Bits, T, 1, 16, 8>;
  return launch(matrix, config, m, x, records, table, y, ahead, stream);
}

template <int Bits>
int launch_bits(FLUTE_DECODE_ARGUMENTS) {
#ifndef FLUTE_FEW_SHAPES
  if (matrix.dtype == FLUTE_FLOAT16)
    return launch_x_tiles<Bits, __half>(matrix, config, m, x, records, table, y, ahead, stream);
#endif
  return launch_x_tiles<Bits, __nv_bfloat16>(matrix, config, m, x, records, table, y, ahead,
                                             stream);
}

}  // namespace flute
