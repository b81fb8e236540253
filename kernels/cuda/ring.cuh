// What the GEMM kernels share: which rows a block computes, and how weights stream into its shared
// memory.
#pragma once

#include "lut.cuh"

namespace flute {

constexpr int kMaxSlots = 16;

// An integer division takes a tenth of a microsecond at the start or end of a block. With an
// inverse of d = 1 .. 128 the quotient is exact for dividends below 4096 (tests/test_tuning.py):
// the inverse is too large by less than d / 2^19, and 4095 * 127 < 2^19.
constexpr int kInverseShift = 19;

inline uint32_t inverse_of(int d) {
  return static_cast<uint32_t>(ceil_div(1 << kInverseShift, d));
}
__device__ __forceinline__ int divide(int dividend, uint32_t inverse) {
  return static_cast<uint32_t>(dividend) * inverse >> kInverseShift;
}

// The row tiles that a block computes; they all belong to one part.
struct BlockRows {
  int part, first_tile, tiles;  // tiles counted over the whole matrix
  int first_row, rows;          // in y

  template <typename Params>
  __device__ __forceinline__ BlockRows(const Params& p, int block) {
    part = 0;
    while (block >= p.first_block[part + 1]) part++;
    const int in_part = (block - p.first_block[part]) * p.row_tiles;
    first_tile = p.parts.tile[part] + in_part;
    tiles = min(p.row_tiles, p.parts.tile[part + 1] - first_tile);
    first_row = p.parts.row[part] + in_part * kTileRows;
    rows = min(tiles * kTileRows, p.parts.row[part + 1] - first_row);
  }
};

// The tiles of one warp on their way to shared memory, in the order of use: step by step along k,
// and in each step the row tiles. A slot takes the kDepth k tiles of a row tile and step.
template <typename Shape>
struct TileRing {
  uint32_t barriers, slots_at;  // shared addresses: one barrier and one slot after another
  const uint8_t* records;       // the first, of all
  uint32_t next;                // to request next, in 16 bytes from the first record
  uint32_t row_step;            // from one row tile to the next
  uint32_t back;                // from behind the last row tile to the next k tiles of the first
  int rows, row, k_left, slots;
  int slot;
  uint32_t phase;
  // A slot's records begin where they do within a line of global memory, whose first record begins
  // one (api.cu sees to that): `at_line` bytes into it in the current step. Row tiles that are no
  // whole lines apart would take too many instructions; `line` is then 0.
  uint32_t at_line, line;
#if FLUTE_HAS_BULK
  uint64_t policy;
#endif

  __device__ __forceinline__ void request(int at, int lane) {
    if (k_left <= 0) return;
    const uint32_t barrier = barriers + at * 8;
    const uint8_t* from = records + static_cast<uint64_t>(next) * 16;
    const uint32_t to = slots_at + at * Shape::kStride + (next * 16 & line);
    const int bytes = Shape::kDepth == 1 || k_left == 1 ? Shape::kRecord : Shape::kSlot;
#if FLUTE_HAS_BULK
    if (elect_one()) bulk_copy(to, from, bytes, barrier, policy);
#else
    for (int i = lane * 16; i < bytes; i += 512) copy16(to + i, from + i);
    copies_arrive(barrier);
#endif
    next += row_step;
    if (++row == rows) row = 0, next += back, k_left -= Shape::kDepth;
  }
  __device__ __forceinline__ void start_at(uint32_t first) {
    next = first, line = row_step % (kLine / 16) == 0 ? kLine - 1 : 0;
    at_line = first * 16 & line;
  }
  // Fills slots `from` .. `to` - 1.
  __device__ __forceinline__ void start(int from, int to, int lane) {
#pragma unroll 1
    for (int i = from; i < to; i++) request(i, lane);
  }
  // For the records of the current step.
  __device__ __forceinline__ uint32_t wait() const {
    barrier_wait(barriers + slot * 8, phase);
    return slots_at + slot * Shape::kStride + at_line;
  }
  // After the last row tile of a step.
  __device__ __forceinline__ void next_step() { at_line = (at_line + Shape::kSlot) & line; }
  // To the next slot; the current one stays as it is.
  __device__ __forceinline__ void skip() {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
  // After all lanes have used the current slot: it is free for another request. Not sooner, a copy
  // may overtake reads that are under way.
  __device__ __forceinline__ void advance(int lane) {
    __syncwarp();
    request(slot, lane);
    skip();
  }
};

}  // namespace flute
