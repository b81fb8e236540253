// From a problem and a configuration to a launch of tile_kernel. Included by the tile_w*.cu.
#pragma once

#include <atomic>

#include "errors.h"
#include "tile.cuh"

namespace flute {

#define FLUTE_TILE_ARGUMENTS                                                      \
  const FluteMatrix &matrix, const FluteTileConfig &config, int m, const void *x, \
      const void *records, const void *table, void *y, void *workspace, cudaStream_t stream

// One function for each bit width, each in a file of its own so that they build side by side.
int tile_w4(FLUTE_TILE_ARGUMENTS);
int tile_w3(FLUTE_TILE_ARGUMENTS);
int tile_w2(FLUTE_TILE_ARGUMENTS);

template <typename Shape>
int tile_shared_bytes(const FluteTileConfig& config) {
  const int total =
      kTileTableBytes + config.x_slots * Shape::kXSlot + config.record_slots * Shape::kRecordSlot;
  const int sums = Shape::kKWarps / 2 * kSumBytes<Shape>;
  return total > sums ? total : sums;
}

// The kernel may use all shared memory of a block; asked for once on each device.
template <typename Shape>
cudaError_t prepare_tile_kernel(int& limit) {
  constexpr int kDevices = 64;
  static std::atomic<int> limits[kDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  limit = device < kDevices ? limits[device].load(std::memory_order_relaxed) : 0;
  if (limit > 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(tile_kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 limit);
  if (error == cudaSuccess && device < kDevices)
    limits[device].store(limit, std::memory_order_relaxed);
  return error;
}

template <typename Shape>
int launch_tile(FLUTE_TILE_ARGUMENTS) {
  const int k_tiles = ceil_div(matrix.k, kTileK);
  // Records must be requested no later than the step of x that uses them, see tile_kernel.
  if (config.x_slots < 2 || config.x_slots > kMaxXSlots || config.record_slots < 1 ||
      config.record_slots > kMaxRecordSlots ||
      config.x_slots - 1 > (config.record_slots - 1) * Shape::kSteps || config.splits < 1 ||
      config.splits > k_tiles || config.splits > 65535)
    return kBadConfig;
  int limit = 0;
  cudaError_t error = prepare_tile_kernel<Shape>(limit);
  if (error != cudaSuccess) return error;
  const int shared_bytes = tile_shared_bytes<Shape>(config);
  if (shared_bytes > limit) return kBadConfig;

  const int table_entries = matrix.pair_table ? 2 << (2 * matrix.bits) : 1 << matrix.bits;
  TileParams params{static_cast<const uint8_t*>(records),
                    static_cast<const uint8_t*>(table),
                    static_cast<const uint8_t*>(x),
                    y,
                    static_cast<float*>(workspace),
                    m,
                    matrix.n,
                    matrix.k,
                    k_tiles,
                    table_entries * 2,
                    matrix.pair_table != 0,
                    0,
                    ceil_div(m, Shape::kTokens),
                    config.splits,
                    config.x_slots,
                    config.record_slots,
                    {},
                    Parts(matrix)};
  for (int i = 0; i < matrix.parts; i++)
    params.first_block[i + 1] = params.first_block[i] + ceil_div(matrix.part_rows[i], Shape::kRows);
  params.row_blocks = params.first_block[matrix.parts];
  const int64_t blocks = static_cast<int64_t>(params.row_blocks) * params.token_blocks;
  if (blocks > INT32_MAX) return kBadShape;

  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(config.splits));
  tile_kernel<Shape><<<grid, Shape::kThreads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

template <int Bits, typename T, int Tokens>
int launch_tile_groups(FLUTE_TILE_ARGUMENTS) {
#define FLUTE_CASE(GROUPS)                                                                       \
  case GROUPS:                                                                                   \
    return launch_tile<TileShape<Bits, T, Tokens, GROUPS>>(matrix, config, m, x, records, table, \
                                                           y, workspace, stream)
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
int launch_tile_tokens(FLUTE_TILE_ARGUMENTS) {
  if (config.tokens != 64 && config.tokens != 128) return kBadConfig;
  const auto launch =
      config.tokens == 64 ? launch_tile_groups<Bits, T, 64> : launch_tile_groups<Bits, T, 128>;
  return launch(matrix, config, m, x, records, table, y, workspace, stream);
}

template <int Bits>
int launch_tile_bits(FLUTE_TILE_ARGUMENTS) {
#ifndef FLUTE_FEW_SHAPES
  if (matrix.dtype == FLUTE_FLOAT16)
    return launch_tile_tokens<Bits, __half>(matrix, config, m, x, records, table, y, workspace,
                                            stream);
#endif
  return launch_tile_tokens<Bits, __nv_bfloat16>(matrix, config, m, x, records, table, y, workspace,
                                                 stream);
}

}  // namespace flute
