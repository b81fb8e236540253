// From a problem and a configuration to a launch of sm90_prefill_kernel.
#pragma once

#include "launch_common.cuh"
#include "sm90_prefill.cuh"

namespace flute {

template <typename Shape>
int launch_prefill_shape(const FluteMatrix& matrix, const FluteSm90Config& config, int m,
                         const void* x, const void* records, const void* table, void* y,
                         cudaStream_t stream) {
  DeviceLimits device;
  if (const int error = device.load()) return error;
  static std::atomic<int> prepared[kMaxDevices];
  if (const int error = device.prepare(sm90_prefill_kernel<Shape>, prepared)) return error;
  if (device.ptx_version != 90) return kBadConfig;

  const int before = table_alignment(true) - kSharedReserved;
  const int rings = kPrefillBarrierBytes + kPrefillWarps * config.stages * Shape::kSlot;
  const int total = before + table_bytes(true) + config.x_stages * Shape::kXStage;
  if (config.row_tiles < 16 || config.row_tiles % 16 || config.row_groups != 2 ||
      config.splits < 1 || config.stages < 2 || config.stages > kMaxSlots || config.x_stages < 3 ||
      config.x_stages > kMaxXStages || rings > before || total > device.shared_limit)
    return kBadConfig;

  PrefillParams params{};
  params.records = static_cast<const uint8_t*>(records);
  params.table = static_cast<const uint8_t*>(table);
  params.y = y;
  params.m = m, params.n = matrix.n, params.k_tiles = ceil_div(matrix.k, kTileK);
  params.table_bytes = 2 * (matrix.pair_table ? 2 << (2 * matrix.bits) : 1 << matrix.bits);
  params.pair_table = matrix.pair_table != 0;
  params.row_tiles = config.row_tiles, params.slots = config.stages;
  params.x_stages = config.x_stages, params.x_offset = before + table_bytes(true);
  params.parts = Parts(matrix);
  for (int i = 0; i < matrix.parts; i++)
    params.first_block[i + 1] =
        params.first_block[i] +
        ceil_div(ceil_div(matrix.part_rows[i], kTileRows), config.row_tiles);

  CUtensorMap x_map;
  if (const int error = map_rows(&x_map, x, m, matrix.k, matrix.dtype, Shape::kColumns))
    return error;
  // Blocks that run at once share some rows of x and some of w, so that L2 holds both: `splits`
  // tiles of x side by side, then the next rows of w; at last the next tiles of x.
  const int x_tiles = ceil_div(m, Shape::kColumns);
  const int side = config.splits < x_tiles ? config.splits : x_tiles;
  const dim3 grid(side, params.first_block[matrix.parts], ceil_div(x_tiles, side));
  return launch_kernel(sm90_prefill_kernel<Shape>, grid, Shape::kThreads, total, 1,
                       config.overlap > 0, stream, params, x_map);
}

}  // namespace flute
