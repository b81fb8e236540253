// The internal layout of a quantized matrix on the GPU: where every code and scale lies.
//
// A record holds 16 rows x 128 columns: the codes, then the scales of those rows and columns, so
// that one contiguous copy brings all that the tensor cores need. Records are ordered
// [row tile][k tile]; every part of a fused matrix begins a new row tile, so a tile has one table.
// Rows past the end of a part have scale 0, as have groups past k; columns past k in the last group
// (of rows with one scale) have code 0, and meet an x of 0.
//
//   record = codes (256 * bits bytes) | scales (32 bytes for each group in the tile, at least one)
//
// Codes are in the order of mma.m16n8k16's A operand, which is wgmma's too. Fragment f = 0..7 of a
// tile is 16 x 16; lane (g = lane / 4, t = lane % 4) holds in register j, half e
//
//   row = g + 8 * (j & 1),   k = 16 * f + 2 * t + 8 * (j >> 1) + e.
//
// The two codes of a lane, fragment and register, e = 0 and 1, lie in one byte, an index into a
// table of pairs. A lane's words are
//
//   4 bits: a word for each fragment, in two 16-byte vectors, f < 4, then f >= 4; register j in
//   byte j, whose low nibble is the code of e = 0. 3 bits: the same for f = 0, 1, 4, 5 in a 16-byte
//   vector, for f = 2, 6 in an 8-byte vector. Bit 3 of their nibbles is for f = 3 and 7: bit b of a
//   code lies in the word of fragment f - 3 + b. 2 bits: one 16-byte vector. Word f / 2 holds
//   fragment f in bytes 2 * (f & 1) + (j >> 1), where bit 4 b + 2 (j & 1) + e is bit b of code e:
//   four weights that follow each other in the registers of a fragment come from one byte, and a
//   few instructions gather one bit of 32 codes in a word (planes_operands.cuh).
//
// Scales: word g * groups + i holds the scales of rows g (low half) and g + 8 of group i.
#pragma once

#include <cstdint>

#include "flute/launch.h"

namespace flute {

constexpr int kTileRows = 16;
constexpr int kTileK = 128;
constexpr int kFragments = kTileK / 16;

__host__ __device__ constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Shared memory for a request of records: a copy that has the same place in a 128-byte line there
// as in global memory is faster by up to 6 % (NOTES.md).
constexpr int kLine = 128;
constexpr int slot_stride(int request_bytes, int record_bytes) {
  const int step = record_bytes & -record_bytes;  // requests begin at multiples of it: see launch.h
  return ceil_div(request_bytes + (step < kLine ? kLine - step : 0), kLine) * kLine;
}

// Groups of scales in one tile. A group longer than a tile is stored once for each of its tiles:
// 3 % more bytes at most, and no second kind of record.
__host__ __device__ constexpr int groups_in_tile(int group_size) {
  return group_size > 0 && group_size < kTileK ? kTileK / group_size : 1;
}
__host__ __device__ constexpr int code_bytes(int bits) {
  return kTileRows * kTileK * bits / 8;
}
__host__ __device__ constexpr int record_bytes(int bits, int groups) {
  return code_bytes(bits) + groups * kTileRows * 2;
}

// Bit position, within a record, of bit `b` of code n = 2 * j + e of (lane, fragment).
__host__ __device__ constexpr int code_bit(int bits, int lane, int fragment, int n, int b) {
  const int j = n >> 1, e = n & 1;
  if (bits == 4) {
    const int byte = (fragment >> 2) * 512 + lane * 16 + (fragment & 3) * 4 + j;
    return byte * 8 + 4 * e + b;
  }
  if (bits == 2) {
    const int byte = lane * 16 + (fragment >> 1) * 4 + 2 * (fragment & 1) + (j >> 1);
    return byte * 8 + 4 * b + 2 * (j & 1) + e;
  }
  const int half = fragment >> 2, spare = (fragment & 3) == 3, word = spare ? b : fragment & 3;
  const int byte = word < 2 ? lane * 16 + half * 8 + word * 4 : 512 + lane * 8 + half * 4;
  return (byte + j) * 8 + 4 * e + (spare ? 3 : b);
}

// Code e of an index byte, at 2 bits that of an even or odd register.
template <int Bits>
__host__ __device__ constexpr uint32_t code_of_byte(uint32_t byte, int e, bool odd) {
  if (Bits > 2) return byte >> (4 * e) & ((1u << Bits) - 1);
  const int first = 2 * odd + e;
  return (byte >> first & 1) | (byte >> (4 + first) & 1) << 1;
}

// Row and column, within a tile, of (lane, fragment, n).
__host__ __device__ constexpr int code_row(int lane, int n) {
  return lane / 4 + 8 * ((n >> 1) & 1);
}
__host__ __device__ constexpr int code_column(int lane, int fragment, int n) {
  return 16 * fragment + 2 * (lane % 4) + 8 * (n >> 2) + (n & 1);
}
// Index of the 16-bit scale of (row, group) among the scales of a record.
__host__ __device__ constexpr int scale_index(int groups, int row, int group) {
  return 2 * ((row % 8) * groups + group) + row / 8;
}

// Kernels read x in 16 bytes, and tables in words.
inline bool operands_aligned(const void* x, const void* table) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(table) % 4 == 0;
}

// The parts of a matrix as a kernel sees them, by value.
struct Parts {
  int count;
  int row[FLUTE_MAX_PARTS + 1];   // first row of each part; row[count] = n
  int tile[FLUTE_MAX_PARTS + 1];  // first row tile of each part

  Parts() = default;
  __host__ explicit Parts(const FluteMatrix& matrix) : count(matrix.parts) {
    row[0] = tile[0] = 0;
    for (int i = 0; i < count; i++) {
      row[i + 1] = row[i] + matrix.part_rows[i];
      tile[i + 1] = tile[i] + ceil_div(matrix.part_rows[i], kTileRows);
    }
  }
  __host__ __device__ int tiles() const { return tile[count]; }
  __device__ int part_of_tile(int index) const {
    int part = 0;
    while (index >= tile[part + 1]) part++;
    return part;
  }
};

}  // namespace flute
