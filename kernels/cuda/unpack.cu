// The internal layout as a dense matrix w [n, k] = round(table[code] * scale), for torch's GEMM.
//
// A warp decodes a record into a tile of shared memory, then writes the tile's rows: 256 bytes
// each.
#include <cuda_runtime.h>

#include "errors.h"
#include "lut.cuh"

namespace flute {
namespace {

constexpr int kWarps = 8;
constexpr int kRowBytes = kTileK * 2 + 16;  // the pad keeps the 4-byte stores free of conflicts

__device__ __forceinline__ void load_codes(Codes<4>& codes, const uint8_t* record, int lane) {
#pragma unroll
  for (int v = 0; v < 2; v++) {
    const uint4 q = __ldg(reinterpret_cast<const uint4*>(record + v * 512) + lane);
    codes.word[4 * v] = q.x, codes.word[4 * v + 1] = q.y;
    codes.word[4 * v + 2] = q.z, codes.word[4 * v + 3] = q.w;
  }
}
__device__ __forceinline__ void load_codes(Codes<3>& codes, const uint8_t* record, int lane) {
  const uint4 q = __ldg(reinterpret_cast<const uint4*>(record) + lane);
  const uint2 r = __ldg(reinterpret_cast<const uint2*>(record + 512) + lane);
  codes.word[0][0] = q.x, codes.word[0][1] = q.y, codes.word[0][2] = r.x;
  codes.word[1][0] = q.z, codes.word[1][1] = q.w, codes.word[1][2] = r.y;
}
__device__ __forceinline__ void load_codes(Codes<2>& codes, const uint8_t* record, int lane) {
  const uint4 q = __ldg(reinterpret_cast<const uint4*>(record) + lane);
  codes.word[0] = q.x, codes.word[1] = q.y, codes.word[2] = q.z, codes.word[3] = q.w;
}

// Index into the pair table, of register j of fragment f.
template <int Bits>
__device__ __forceinline__ uint32_t pair_index(const Codes<Bits>& codes, int f, int j) {
  if constexpr (Bits == 2) {
    const uint32_t byte = codes.word[f / 2] >> (16 * (f & 1) + 8 * (j >> 1));
    return code_of_byte<2>(byte, 0, j & 1) << 2 | code_of_byte<2>(byte, 1, j & 1);
  } else {
    const uint32_t byte = codes.bytes(f) >> (8 * j);
    return code_of_byte<Bits>(byte, 0, false) << Bits | code_of_byte<Bits>(byte, 1, false);
  }
}

template <int Bits, typename T>
__global__ void __launch_bounds__(kWarps * 32)
    unpack_kernel(const uint8_t* __restrict__ records, const uint16_t* __restrict__ table,
                  T* __restrict__ w, int k, int groups, int k_tiles, bool pair_table, Parts parts) {
  __shared__ uint32_t pairs[1 << (2 * Bits)];
  __shared__ __align__(16) uint8_t tiles[kWarps][kTileRows * kRowBytes];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile = blockIdx.x, part = parts.part_of_tile(tile);
  const uint16_t* values = table + part * (pair_table ? 2 << (2 * Bits) : 1 << Bits);
  for (int i = threadIdx.x; i < 1 << (2 * Bits); i += kWarps * 32) {
    const uint32_t low = pair_table ? values[2 * i] : values[i >> Bits];
    const uint32_t high = pair_table ? values[2 * i + 1] : values[i & ((1 << Bits) - 1)];
    pairs[i] = low | high << 16;
  }
  __syncthreads();

  const int first_row = parts.row[part] + (tile - parts.tile[part]) * kTileRows;
  const int rows = min(kTileRows, parts.row[part + 1] - first_row);
  const int bytes = record_bytes(Bits, groups), g = lane / 4, t = lane % 4;
  uint8_t* staged = tiles[warp];
  for (int k_tile = blockIdx.y * kWarps + warp; k_tile < k_tiles; k_tile += gridDim.y * kWarps) {
    const uint8_t* record = records + (static_cast<int64_t>(tile) * k_tiles + k_tile) * bytes;
    Codes<Bits> codes;
    load_codes(codes, record, lane);
    const auto* scales = reinterpret_cast<const uint32_t*>(record + code_bytes(Bits));
#pragma unroll
    for (int f = 0; f < kFragments; f++) {
      const uint32_t scale = __ldg(scales + g * groups + f * groups / kFragments);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t s = permute_bytes(scale, scale, j & 1 ? 0x3232 : 0x1010);
        const uint32_t value = multiply_pairs<T>(pairs[pair_index<Bits>(codes, f, j)], s);
        const int row = g + 8 * (j & 1), column = 16 * f + 2 * t + 8 * (j >> 1);
        *reinterpret_cast<uint32_t*>(staged + row * kRowBytes + column * 2) = value;
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTileRows / 2; i++) {
      const int row = 2 * i + lane / 16, column = k_tile * kTileK + lane % 16 * 8;
      const uint4 v = *reinterpret_cast<const uint4*>(staged + row * kRowBytes + lane % 16 * 16);
      if (row < rows && column < k)  // k is a multiple of 32: all eight are inside, or none
        *reinterpret_cast<uint4*>(w + static_cast<int64_t>(first_row + row) * k + column) = v;
    }
    __syncwarp();
  }
}

template <int Bits, typename T>
cudaError_t unpack(const FluteMatrix& m, const void* records, const void* table, void* w,
                   cudaStream_t stream) {
  const Parts parts(m);
  const int k_tiles = ceil_div(m.k, kTileK);
  const dim3 grid(parts.tiles(), min(ceil_div(k_tiles, 2 * kWarps), 65535));
  unpack_kernel<Bits, T><<<grid, kWarps * 32, 0, stream>>>(
      static_cast<const uint8_t*>(records), static_cast<const uint16_t*>(table), static_cast<T*>(w),
      m.k, groups_in_tile(m.group_size), k_tiles, m.pair_table != 0, parts);
  return cudaGetLastError();
}

}  // namespace
}  // namespace flute

extern "C" int flute_dequantize(const FluteMatrix* m, const void* records, const void* table,
                                void* w, void* stream) {
  if (flute_record_words(m) < 0 || reinterpret_cast<uintptr_t>(w) % 16) return flute::kBadShape;
  auto* s = static_cast<cudaStream_t>(stream);
  const auto run = [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    return m->dtype == FLUTE_BFLOAT16
               ? flute::unpack<kBits, __nv_bfloat16>(*m, records, table, w, s)
               : flute::unpack<kBits, __half>(*m, records, table, w, s);
  };
  return m->bits == 4   ? run(flute::Constant<4>{})
         : m->bits == 3 ? run(flute::Constant<3>{})
                        : run(flute::Constant<2>{});
}
