// Canonical tensors to the internal layout, and back to dense weights.
#include <cuda_runtime.h>

#include "errors.h"
#include "layout.cuh"
#include "ptx.cuh"

namespace flute {
namespace {

constexpr int kThreads = 128;

// Code k of a row of the canonical little-endian bit stream.
__device__ __forceinline__ uint32_t canonical_code(const uint32_t* row, int bits, int k) {
  const int start = k * bits, word = start / 32, shift = start % 32;
  uint32_t value = row[word] >> shift;
  if (shift + bits > 32) value |= row[word + 1] << (32 - shift);
  return value & ((1u << bits) - 1);
}

// One block writes one record, bit by bit in shared memory: this runs once, at load, and leaves all
// knowledge of the layout in `code_bit`.
__global__ void __launch_bounds__(kThreads)
    repack_kernel(const uint32_t* qweight, const uint16_t* scales, uint32_t* records, int k,
                  int bits, int group_size, int groups, int k_tiles, Parts parts) {
  __shared__ uint32_t record[record_bytes(4, 4) / 4];
  const int tile = blockIdx.x / k_tiles, k_tile = blockIdx.x % k_tiles;
  const int words = record_bytes(bits, groups) / 4;
  const int part = parts.part_of_tile(tile);
  const int first_row = parts.row[part] + (tile - parts.tile[part]) * kTileRows;
  const int end_row = parts.row[part + 1];
  const int64_t row_words = static_cast<int64_t>(k) / 32 * bits;
  const int row_groups = group_size > 0 ? k / group_size : 1;

  for (int i = threadIdx.x; i < words; i += kThreads) record[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kFragments * 8; i += kThreads) {
    const int lane = i / (kFragments * 8), fragment = i / 8 % kFragments, n = i % 8;
    const int row = first_row + code_row(lane, n);
    const int column = k_tile * kTileK + code_column(lane, fragment, n);
    if (row >= end_row || column >= k) continue;
    const uint32_t code = canonical_code(qweight + row * row_words, bits, column);
    for (int b = 0; b < bits; b++) {
      const int bit = code_bit(bits, lane, fragment, n, b);
      if (code >> b & 1) atomicOr(&record[bit / 32], 1u << (bit % 32));
    }
  }
  uint16_t* record_scales = reinterpret_cast<uint16_t*>(record + code_bytes(bits) / 4);
  for (int i = threadIdx.x; i < kTileRows * groups; i += kThreads) {
    const int row = first_row + i / groups, group = i % groups;
    const int column = k_tile * kTileK + group * (kTileK / groups);
    if (row >= end_row || column >= k) continue;
    const int at = group_size > 0 ? column / group_size : 0;
    record_scales[scale_index(groups, i / groups, group)] =
        scales[static_cast<int64_t>(row) * row_groups + at];
  }
  __syncthreads();
  uint32_t* to = records + static_cast<int64_t>(blockIdx.x) * words;
  for (int i = threadIdx.x; i < words; i += kThreads) to[i] = record[i];
}

int check(const FluteMatrix& m) {
  const bool group = m.group_size == -1 || m.group_size == 32 || m.group_size == 64 ||
                     m.group_size == 128 || m.group_size == 256;
  if (m.n <= 0 || m.k <= 0 || m.k % 32 || m.bits < 2 || m.bits > 4 || !group || m.parts < 1 ||
      m.parts > FLUTE_MAX_PARTS || (m.group_size > 0 && m.k % m.group_size) ||
      (m.dtype != FLUTE_FLOAT16 && m.dtype != FLUTE_BFLOAT16))
    return kBadShape;
  int64_t rows = 0;
  for (int i = 0; i < m.parts; i++) {
    if (m.part_rows[i] <= 0) return kBadShape;
    rows += m.part_rows[i];
  }
  return rows == m.n ? 0 : kBadShape;
}

}  // namespace
}  // namespace flute

extern "C" {

int64_t flute_record_words(const FluteMatrix* m) {
  if (flute::check(*m)) return -1;
  const int64_t records =
      static_cast<int64_t>(flute::Parts(*m).tiles()) * flute::ceil_div(m->k, flute::kTileK);
  const int bytes = flute::record_bytes(m->bits, flute::groups_in_tile(m->group_size));
  // Kernels count places in 16 bytes, with 32 bits.
  return records * (bytes / 16) >> 32 ? -1 : records * (bytes / 4);
}

int flute_repack(const FluteMatrix* m, const void* qweight, const void* scales, void* records,
                 void* stream) {
  if (int error = flute::check(*m)) return error;
  const flute::Parts parts(*m);
  const int k_tiles = flute::ceil_div(m->k, flute::kTileK);
  flute::repack_kernel<<<parts.tiles() * k_tiles, flute::kThreads, 0,
                         static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint32_t*>(qweight), static_cast<const uint16_t*>(scales),
      static_cast<uint32_t*>(records), m->k, m->bits, m->group_size,
      flute::groups_in_tile(m->group_size), k_tiles, parts);
  return cudaGetLastError();
}

}  // extern "C"
