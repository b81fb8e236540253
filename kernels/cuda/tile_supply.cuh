// How x and the weights of a block reach shared memory, ahead of their use.
//
// Two rings of slots. A slot of x has one step: kTokens rows of kStepColumns columns. A slot of
// records has one k tile of the block's 8 row tiles, which is one or two steps. All threads copy
// a share of each; what a thread requests at one step is one group of its asynchronous copies.
#pragma once

#include "layout.cuh"
#include "ptx.cuh"

namespace flute {

constexpr int kMaxXSlots = 5;
constexpr int kMaxRecordSlots = 8;

struct TileParams {
  const uint8_t* records;
  const uint8_t* table;
  const uint8_t* x;
  void* y;           // used without splits
  float* workspace;  // [splits, m, n], used with splits
  int m, n, k, k_tiles;
  int table_bytes;  // of one part
  bool pair_table;
  int row_blocks, token_blocks, splits;
  int x_slots, record_slots;
  int first_block[FLUTE_MAX_PARTS + 1];  // of each part
  Parts parts;
};

// A warp multiplies 64 rows of w with 64 rows of x. The eight warps of a block cover 128 rows of w
// and all its rows of x, and split the columns of a k tile. A step has 32 columns for each warp; in
// two steps those of a warp are neighbours, so that it loads its codes at once.
template <int Bits_, typename T_, int Tokens_, int Groups_>
struct TileShape {
  using T = T_;
  static constexpr int kBits = Bits_;
  static constexpr int kTokens = Tokens_;  // rows of x in a block: 64, 128
  static constexpr int kGroups = Groups_;  // groups in a tile: 1, 2, 4
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRowTiles = 8;  // 16-row tiles of w in a block
  static constexpr int kRows = kRowTiles * kTileRows;
  static constexpr int kWarpTokens = 64;
  static constexpr int kWarpRowTiles = 4;
  static constexpr int kRowWarps = kRowTiles / kWarpRowTiles;
  static constexpr int kTokenWarps = kTokens / kWarpTokens;
  static constexpr int kKWarps = kWarps / (kRowWarps * kTokenWarps);  // 4, 2
  static constexpr int kStepColumns = 32 * kKWarps;
  static constexpr int kSteps = kTileK / kStepColumns;  // of a k tile: 1, 2
  static constexpr int kXRow = kStepColumns * 2;        // bytes
  static constexpr int kXSlot = kTokens * kXRow;
  static constexpr int kRecord = record_bytes(Bits_, Groups_);
  static constexpr int kRecordSlot = kRowTiles * kRecord;
};

// Where the 16 bytes `chunk` of row `token` of a step of x lie in its slot. Eight rows of the same
// columns lie in different banks, which is what ldmatrix reads, and so do the chunks of a row.
template <typename Shape>
__device__ __forceinline__ uint32_t x_offset(int token, int chunk) {
  return token * Shape::kXRow + (chunk ^ (token % 8)) * 16;
}

// What a block computes: rows of one part, some rows of x, a share of k.
template <typename Shape>
struct TileBlock {
  // Neighbouring blocks share x and weights: kPatch token blocks, then the next rows of w.
  static constexpr int kPatch = 8;
  int part, first_tile, tiles;  // tiles counted over the whole matrix
  int first_row, rows;          // in y
  int first_token, tokens;      // likewise
  int first_k_tile, end_k_tile;

  __device__ __forceinline__ TileBlock(const TileParams& p, int index, int split) {
    const int patch = index / (p.row_blocks * kPatch), in_patch = index % (p.row_blocks * kPatch);
    const int width = min(kPatch, p.token_blocks - patch * kPatch);
    const int row_block = in_patch / width;
    first_token = (patch * kPatch + in_patch % width) * Shape::kTokens;
    tokens = min(Shape::kTokens, p.m - first_token);
    part = 0;
    while (row_block >= p.first_block[part + 1]) part++;
    const int in_part = (row_block - p.first_block[part]) * Shape::kRowTiles;
    first_tile = p.parts.tile[part] + in_part;
    tiles = min(Shape::kRowTiles, p.parts.tile[part + 1] - first_tile);
    first_row = p.parts.row[part] + in_part * kTileRows;
    rows = min(tiles * kTileRows, p.parts.row[part + 1] - first_row);
    first_k_tile = static_cast<int64_t>(p.k_tiles) * split / p.splits;
    end_k_tile = static_cast<int64_t>(p.k_tiles) * (split + 1) / p.splits;
  }
};

struct Ring {
  uint32_t slots_at;
  int slot_bytes, slots;
  int slot = 0;

  __device__ __forceinline__ Ring(uint32_t slots_at, int slot_bytes, int slots)
      : slots_at(slots_at), slot_bytes(slot_bytes), slots(slots) {}
  __device__ __forceinline__ uint32_t at() const { return slots_at + slot * slot_bytes; }
  __device__ __forceinline__ void advance() {
    if (++slot == slots) slot = 0;
  }
};

// Waits for all groups of copies but the newest `pending`, or for more: the instruction takes
// constants, and those that occur are 0, 1 and 3.
__device__ __forceinline__ void wait_for_copies(int pending) {
  if (pending >= 3)
    wait_copies<3>();
  else if (pending >= 1)
    wait_copies<1>();
  else
    wait_copies<0>();
}

// This thread's share of the copies of x. Rows past the last one are not copied: what lies in
// their place reaches only sums that nobody writes. Columns past k are zeros: codes there need not
// stand for zero.
template <typename Shape>
struct XSupply {
  static constexpr int kChunks = Shape::kXRow / 16;
  static constexpr int kRowsAtOnce = Shape::kThreads / kChunks;
  static constexpr int kCopies = Shape::kTokens / kRowsAtOnce;
  static_assert(kRowsAtOnce % 8 == 0, "x_offset must advance evenly");
  const uint8_t *from, *start;  // `start`: first column, where columns past k point to
  int64_t row_bytes;
  int columns;  // from this thread's column to k
  int step = 0;
  int copies, steps;
  uint32_t offset;

  __device__ __forceinline__ XSupply(const TileParams& p, const TileBlock<Shape>& block, int steps)
      : row_bytes(int64_t(p.k) * 2), steps(steps) {
    const int chunk = threadIdx.x % kChunks, token = threadIdx.x / kChunks;
    const int column = block.first_k_tile * kTileK + chunk / 4 * 32 * Shape::kSteps + chunk % 4 * 8;
    copies = (block.tokens - token + kRowsAtOnce - 1) / kRowsAtOnce;
    start = p.x + (copies > 0 ? block.first_token + token : 0) * row_bytes;
    from = start + column * 2;
    columns = p.k - column;
    offset = x_offset<Shape>(token, chunk);
  }
  // The next step, if there is one, to the ring's current slot. k is a multiple of 32, so that 16
  // bytes are all inside or all outside.
  __device__ __forceinline__ void request(const Ring& ring) {
    if (step == steps) return;
    const bool inside = columns > 0;
    const uint8_t* source = inside ? from : start;
#pragma unroll
    for (int i = 0; i < kCopies; i++)
      if (i < copies)
        copy16(ring.at() + offset + i * kRowsAtOnce * Shape::kXRow,
               source + i * kRowsAtOnce * row_bytes, inside);
    step++;
    const int next = step % Shape::kSteps ? 32 : kTileK - 32 * (Shape::kSteps - 1);
    from += next * 2, columns -= next;
  }
};

// This warp's share of the copies of records: one row tile. A tile that the block does not have
// stays as it is, for the same reason as rows of x.
template <typename Shape>
struct RecordSupply {
  static_assert(Shape::kWarps == Shape::kRowTiles, "a warp copies one row tile");
  const uint8_t* from;
  int k_tiles;
  bool copies;
  uint32_t offset;

  __device__ __forceinline__ RecordSupply(const TileParams& p, const TileBlock<Shape>& block,
                                          int warp)
      : k_tiles(block.end_k_tile - block.first_k_tile), copies(warp < block.tiles) {
    const int64_t tile = block.first_tile + (copies ? warp : 0);
    from = p.records + (tile * p.k_tiles + block.first_k_tile) * Shape::kRecord;
    offset = warp * Shape::kRecord;
  }
  __device__ __forceinline__ void request(const Ring& ring, int lane) {
    if (k_tiles <= 0) return;
    if (copies) {
#pragma unroll
      for (int i = 0; i < Shape::kRecord; i += 512)
        if (i + lane * 16 < Shape::kRecord)
          copy16(ring.at() + offset + i + lane * 16, from + i + lane * 16);
    }
    from += Shape::kRecord, k_tiles--;
  }
};

}  // namespace flute
