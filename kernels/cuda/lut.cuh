// From codes to tensor-core operands through a table.
//
// A 16-bit table of values becomes a table of pairs in shared memory, so one 4-byte load makes two
// weights: exactly one A register. Entry i is repeated in 32 words, one for each bank; lane l reads
// only bank l, so no access conflicts whatever the codes are. Shared memory delivers 64 weights a
// clock this way; streaming 4.4 TB/s takes 34 (4 bits), 45 (3 bits) or 67 (2 bits) of an H200 SM.
#pragma once

#include "layout.cuh"
#include "ptx.cuh"

namespace flute {

constexpr int kTableRow = 128;           // bytes: 32 copies of a pair
constexpr int kTableAlignment = 0x8000;  // the index bits 7..14 of a table address must be free

// Bits of a table index that a code pair can set: low code in bits 0..3, high code in bits 4..7.
template <int Bits>
constexpr uint32_t kIndexMask = Bits == 4 ? 0xff : Bits == 3 ? 0x77 : 0x33;

template <int Bits>
constexpr int kTableBytes = (kIndexMask<Bits> / 4 + 1) * 4 * kTableRow;

// All threads: writes the pair table at shared address `to` from part's global table.
template <int Bits, int Threads>
__device__ __forceinline__ void fill_table(uint32_t to, const void* table, bool pairs) {
  constexpr int kEntries = kTableBytes<Bits> / kTableRow;
  constexpr uint32_t kCode = (1u << Bits) - 1;
  const uint16_t* values = static_cast<const uint16_t*>(table);
  // A 16-byte store repeats an entry four times; a warp writes four whole rows without conflict.
#pragma unroll 4
  for (int i = threadIdx.x; i < kEntries * 8; i += Threads) {
    const uint32_t index = i / 8;
    const uint32_t first = index & kCode, second = (index >> 4) & kCode;
    const uint32_t pair =
        pairs ? __ldg(static_cast<const uint32_t*>(table) + (first << Bits | second))
              : __ldg(values + first) | static_cast<uint32_t>(__ldg(values + second)) << 16;
    store_shared4(to + i * 16, make_uint4(pair, pair, pair, pair));
  }
}

// The codes of one tile that a lane holds, read from a record in shared memory.
template <int Bits>
struct Codes;

template <>
struct Codes<4> {
  uint32_t word[8];
  __device__ __forceinline__ void load(uint32_t record, int lane) {
#pragma unroll
    for (int v = 0; v < 2; v++) {
      const uint4 q = load_shared4(record + v * 512 + lane * 16);
      word[4 * v] = q.x, word[4 * v + 1] = q.y, word[4 * v + 2] = q.z, word[4 * v + 3] = q.w;
    }
  }
  __device__ __forceinline__ uint32_t nibbles(int f) const { return word[f]; }
};

template <>
struct Codes<2> {
  uint32_t word[4];
  __device__ __forceinline__ void load(uint32_t record, int lane) {
    const uint4 q = load_shared4(record + lane * 16);
    word[0] = q.x, word[1] = q.y, word[2] = q.z, word[3] = q.w;
  }
  // bits 2 and 3 of each nibble are another fragment's
  __device__ __forceinline__ uint32_t nibbles(int f) const {
    return f & 1 ? word[f / 2] >> 2 : word[f / 2];
  }
};

template <>
struct Codes<3> {
  uint32_t low[4], high[2];
  __device__ __forceinline__ void load(uint32_t record, int lane) {
    const uint4 q = load_shared4(record + lane * 16);
    const uint2 h = load_shared2(record + 512 + lane * 8);
    low[0] = q.x, low[1] = q.y, low[2] = q.z, low[3] = q.w, high[0] = h.x, high[1] = h.y;
  }
  // bit 3 of each nibble is another fragment's
  __device__ __forceinline__ uint32_t nibbles(int f) const {
    const uint32_t l = f & 1 ? low[f / 2] >> 2 : low[f / 2];
    const uint32_t h = high[f / 4];
    const int i = f & 3;
    const uint32_t placed = i == 0 ? h << 2 : i == 1 ? h << 1 : i == 2 ? h : h >> 1;
    return select_bits(l, placed, 0x33333333u);
  }
};

// The four A registers of a fragment. `lane_table` is the table's address plus 4 * lane.
template <int Bits>
__device__ __forceinline__ void decode(uint32_t (&a)[4], uint32_t nibbles, uint32_t lane_table) {
  constexpr uint32_t kMask = kIndexMask<Bits> << 7;
  a[0] = load_table(and_or(nibbles << 7, kMask, lane_table));
  a[1] = load_table(and_or(nibbles >> 1, kMask, lane_table));
  a[2] = load_table(and_or(nibbles >> 9, kMask, lane_table));
  a[3] = load_table(and_or(nibbles >> 17, kMask, lane_table));
}

}  // namespace flute
