// From a problem and a configuration to a launch of sm90_prefill_kernel.
#pragma once

#include "launch_common.cuh"
#include "sm90_prefill.cuh"
#include "sum_flags.h"

namespace flute {

constexpr int kPrefillSide = 8;  // tiles of x side by side, at most

// Bytes of the partial sums of a launch that spreads k.
inline int64_t prefill_workspace(const FluteSm90Config& config, int multiprocessors) {
  return int64_t{multiprocessors} * kPrefillGroups * 64 * config.columns * 4;
}

template <typename Shape>
int launch_prefill_shape(const FluteMatrix& matrix, const FluteSm90Config& config, int m,
                         const void* x, const void* records, const void* table, void* y,
                         void* workspace, cudaStream_t stream) {
  DeviceLimits device;
  if (const int error = device.load()) return error;
  static std::atomic<int> prepared[kMaxDevices];
  if (const int error = device.prepare(sm90_prefill_kernel<Shape>, prepared)) return error;
  if (device.ptx_version != 90) return kBadConfig;

  PrefillParams params{};
  params.staged_at = kPrefillBarrierBytes + config.x_stages * Shape::kXStage;
  params.slots_at = params.staged_at + kPrefillGroups * kStagedBytes;
  const int total = params.slots_at + kPrefillGroups * config.stages * Shape::kSlot;
  if (config.row_tiles != 4 * kPrefillGroups || config.row_groups != kPrefillGroups ||
      config.splits < 0 || config.splits > 2 || config.stages < 1 ||
      config.stages > kPrefillStages || config.x_stages < 3 || config.x_stages > kPrefillStages ||
      total > device.shared_limit || matrix.pair_table || matrix.activation ||
      (config.splits == 0 && workspace == nullptr))
    return kBadConfig;

  params.records = static_cast<const uint8_t*>(records);
  params.table = static_cast<const uint8_t*>(table);
  params.y = y;
  params.m = m, params.n = matrix.n, params.k_tiles = ceil_div(matrix.k, kTileK);
  params.table_bytes = 2 << matrix.bits;
  params.row_tiles = config.row_tiles;
  params.slots = config.stages, params.x_stages = config.x_stages;
  params.parts = Parts(matrix);
  for (int i = 0; i < matrix.parts; i++)
    params.first_block[i + 1] =
        params.first_block[i] +
        ceil_div(ceil_div(matrix.part_rows[i], kTileRows), config.row_tiles);
  params.x_tiles = ceil_div(m, Shape::kColumns);
  params.side = ceil_div(params.x_tiles, ceil_div(params.x_tiles, kPrefillSide));
  params.tiles = params.x_tiles * params.first_block[matrix.parts];

  CUtensorMap x_map;
  if (const int error = map_rows(&x_map, x, m, matrix.k, matrix.dtype, Shape::kColumns))
    return error;
  int cluster = config.splits, blocks = device.multiprocessors;
  if (config.splits == 0) {
    uint32_t* flags = nullptr;
    if (const int error = sum_flags(blocks * kPrefillGroups, stream, &flags)) return error;
    if (flags != nullptr) {
      blocks = spread_k(params, blocks, static_cast<float*>(workspace), flags);
      return launch_kernel(sm90_prefill_kernel<Shape>, dim3(blocks), kPrefillThreads, total, 1,
                           config.overlap > 0, stream, params, x_map);
    }
    cluster = 2;
  }
  // Tiles that do not fill the device in the last round are shared, if each finds a cluster.
  if (cluster > 1) {
    static std::atomic<int> known[kMaxDevices];
    int clusters = 0;
    if (const int error = device.clusters_at_once(sm90_prefill_kernel<Shape>, kPrefillThreads,
                                                  total, cluster, known[device.slot()], &clusters))
      return error;
    const int left = params.tiles % (clusters * cluster);
    if (left == 0 || left > clusters)
      cluster = 1;
    else
      blocks = clusters * cluster;
  }
  params.splits_log2 = log2_of(cluster);
  params.whole = params.tiles / blocks * blocks;
  const int most = params.whole > 0 ? blocks : params.tiles * cluster;
  return launch_kernel(sm90_prefill_kernel<Shape>, dim3(most < blocks ? most : blocks),
                       kPrefillThreads, total, cluster, config.overlap > 0, stream, params, x_map);
}

}  // namespace flute
