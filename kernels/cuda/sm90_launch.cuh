// From a problem and a configuration to a launch of sm90_gemm_kernel. Included by the sm90_w*.cu.
#pragma once

#include <atomic>

#include "errors.h"
#include "launch_common.cuh"
#include "sm90_gemm.cuh"
#include "sm90_prefill_launch.cuh"

namespace flute {

// Shared memory of a launch; total is -1 where the configuration does not fit.
struct Sm90Shared {
  int x_offset, region_bytes, low_regions, high_region, total;
};

// Barriers | some rings | the table | x and the other rings. The partial sums, of `columns`
// rows of x, and those of the cluster's other blocks come over all that but the barriers. At
// last the barriers of a cluster: before the rings they would move them off their lines.
template <typename Shape>
Sm90Shared plan_sm90_shared(const FluteSm90Config& config, int columns, int ranks_log2, int limit) {
  constexpr int kWarps = Shape::kWarpgroups * 4;
  const int k_groups = Shape::kWarpgroups / config.row_groups;
  Sm90Shared plan;
  const int before = table_alignment(true) - kSharedReserved;
  plan.x_offset = before + table_bytes(true);
  plan.region_bytes = config.stages * Shape::kSlot;
  plan.high_region = plan.x_offset + k_groups * config.x_stages * Shape::kXStage;
  plan.low_regions = (before - sm90_barrier_bytes(Shape::kWarpgroups)) / plan.region_bytes;
  if (plan.low_regions > kWarps) plan.low_regions = kWarps;
  plan.total = plan.high_region + (kWarps - plan.low_regions) * plan.region_bytes;
  const int sums = sm90_barrier_bytes(Shape::kWarpgroups) +
                   kWarps * sm90_partial_bytes(Shape::kColumns) +
                   cluster_room(columns * config.row_tiles * (kTileRows / 4), Shape::kThreads,
                                sizeof(float4), ranks_log2);
  if (sums > plan.total) plan.total = sums;
  if (ranks_log2 > 0) plan.total += kClusterBarrierBytes;
  if (plan.total > limit) plan.total = -1;
  return plan;
}

template <typename Shape>
int launch_sm90_shape(const FluteMatrix& matrix, const FluteSm90Config& config, int m,
                      const void* x, const void* records, const void* table, void* y,
                      const FluteAhead* ahead, cudaStream_t stream) {
  DeviceLimits device;
  if (const int error = device.load()) return error;
  const int groups = config.row_groups, splits = config.splits;
  if (config.row_tiles < 1 || groups < 1 || groups > Shape::kWarpgroups ||
      (groups & (groups - 1)) || splits < 1 || splits > 8 || (splits & (splits - 1)) ||
      config.overlap < 0 || config.stages < 1 || config.stages > kMaxSlots || config.x_stages < 2 ||
      config.x_stages > kMaxXStages)
    return kBadConfig;
  // Sums that several warpgroups or blocks share are added up once, at the end.
  if ((groups < Shape::kWarpgroups || splits > 1) && config.row_tiles > 4 * groups)
    return kBadConfig;

  // A gated launch needs all sums of a block at once.
  const bool gated = is_gated(matrix);
  if (gated && (!can_gate(matrix, splits) || config.row_tiles > 4 * groups)) return kBadConfig;

  static std::atomic<int> prepared[kMaxDevices];
  if (const int error = device.prepare(sm90_gemm_kernel<Shape>, prepared)) return error;
  if (device.ptx_version != 90) return kBadConfig;
  const Sm90Shared plan = plan_sm90_shared<Shape>(config, m < Shape::kColumns ? m : Shape::kColumns,
                                                  log2_of(splits) + gated, device.shared_limit);
  if (plan.total < 0) return kBadConfig;

  Sm90Params params{};
  params.parts = Parts(matrix);
  params.records = static_cast<const uint8_t*>(records);
  params.table = static_cast<const uint8_t*>(table);
  params.y = y;
  params.m = m, params.n = gated ? matrix.n / 2 : matrix.n;
  params.k_tiles = ceil_div(matrix.k, kTileK), params.activation = matrix.activation;
  params.table_bytes = 2 * (matrix.pair_table ? 2 << (2 * matrix.bits) : 1 << matrix.bits);
  params.pair_table = matrix.pair_table != 0;
  params.row_tiles = config.row_tiles;
  params.row_groups_log2 = log2_of(groups),
  params.k_groups_log2 = log2_of(Shape::kWarpgroups / groups);
  params.splits_log2 = log2_of(splits), params.ranks_log2 = log2_of(splits) + gated;
  params.row_tiles_inverse = inverse_of(config.row_tiles);
  params.stages = config.stages;
  params.early = config.overlap < config.stages ? config.overlap : config.stages;
  params.x_stages = config.x_stages;
  params.x_lag = groups > 1 && config.x_stages > 2 ? 1 : 0;
  params.x_offset = plan.x_offset, params.region_bytes = plan.region_bytes;
  params.low_regions = plan.low_regions, params.high_region = plan.high_region;
  params.cluster_barriers = plan.total - kClusterBarrierBytes;
  for (int i = 0; i < matrix.parts; i++)
    params.first_block[i + 1] =
        params.first_block[i] +
        ceil_div(ceil_div(matrix.part_rows[i], kTileRows), config.row_tiles);

  if (params.first_block[gated ? 1 : matrix.parts] > kMaxGridY) return kBadConfig;

  CUtensorMap x_map;
  if (const int error = map_rows(&x_map, x, m, matrix.k, matrix.dtype, Shape::kColumns))
    return error;
  const int cluster = gated ? 2 * splits : splits;
  const dim3 grid(ceil_div(m, Shape::kColumns) * cluster,
                  params.first_block[gated ? 1 : matrix.parts]);
  params.ahead = make_ahead(ahead, grid.x * grid.y, device.multiprocessors);
  return launch_kernel(sm90_gemm_kernel<Shape>, grid, Shape::kThreads, plan.total, cluster,
                       config.overlap > 0, stream, params, x_map);
}

// One function for each bit width, each in a file of its own so that they build side by side.
#define FLUTE_SM90_ARGUMENTS                                                                     \
  const FluteMatrix &matrix, const FluteSm90Config &config, int m, const void *x,                \
      const void *records, const void *table, void *y, void *workspace, const FluteAhead *ahead, \
      cudaStream_t stream
int sm90_w4(FLUTE_SM90_ARGUMENTS);
int sm90_w3(FLUTE_SM90_ARGUMENTS);
int sm90_w2(FLUTE_SM90_ARGUMENTS);

template <int Bits, typename T, int Columns, int Warpgroups, int Groups>
int launch_sm90_kernel(FLUTE_SM90_ARGUMENTS) {
  if constexpr (Warpgroups == kPrefillGroups)
    return launch_prefill_shape<PrefillShape<Bits, T, Columns, Groups>>(
        matrix, config, m, x, records, table, y, workspace, stream);
  else
    return launch_sm90_shape<Sm90Shape<Bits, T, Columns, Warpgroups, Groups>>(
        matrix, config, m, x, records, table, y, ahead, stream);
}

template <int Bits, typename T, int Columns, int Warpgroups>
int launch_sm90_groups(FLUTE_SM90_ARGUMENTS) {
#define FLUTE_CASE(GROUPS)                                           \
  case GROUPS:                                                       \
    return launch_sm90_kernel<Bits, T, Columns, Warpgroups, GROUPS>( \
        matrix, config, m, x, records, table, y, workspace, ahead, stream)
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
int launch_sm90_block(FLUTE_SM90_ARGUMENTS) {
#define FLUTE_CASE(COLUMNS, WARPGROUPS)                                                            \
  if (config.columns == COLUMNS && config.warpgroups == WARPGROUPS)                                \
  return launch_sm90_groups<Bits, T, COLUMNS, WARPGROUPS>(matrix, config, m, x, records, table, y, \
                                                          workspace, ahead, stream)
  FLUTE_CASE(16, 8);
  FLUTE_CASE(16, 4);
  FLUTE_CASE(32, 8);
  FLUTE_CASE(32, 4);
  FLUTE_CASE(64, 4);
  FLUTE_CASE(128, 4);
  FLUTE_CASE(192, 2);  // the prefill kernel
  FLUTE_CASE(256, 2);
#undef FLUTE_CASE
  return kBadConfig;
}

template <int Bits>
int launch_sm90_bits(FLUTE_SM90_ARGUMENTS) {
#ifndef FLUTE_FEW_SHAPES
  if (matrix.dtype == FLUTE_FLOAT16)
    return launch_sm90_block<Bits, __half>(matrix, config, m, x, records, table, y, workspace,
                                           ahead, stream);
#endif
  return launch_sm90_block<Bits, __nv_bfloat16>(matrix, config, m, x, records, table, y, workspace,
                                                ahead, stream);
}

}  // namespace flute
