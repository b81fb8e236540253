// What a warp of the decode kernel multiplies: x as B operands, codes and scales of w as A
// operands.
#pragma once

#include "decode_share.cuh"

namespace flute {

constexpr int kXRow = kTileK * 2 + 16;  // bytes; the pad keeps ldmatrix free of bank conflicts
// A small block's table follows the barriers, at a place that the compiler knows.
constexpr int kSmallTable = (kSharedReserved + kWarpsOfSmall * kBarrierBytes + 255) / 256 * 256;

template <int Bits_, typename T_, int XTiles_, int Groups_, int Warps_, int Rows_>
struct DecodeShape {
  using T = T_;
  static constexpr int kBits = Bits_;
  static constexpr int kXTiles = XTiles_;  // 8-row tiles of x: 1, 2, 4
  static constexpr int kGroups = Groups_;  // groups in a tile: 1, 2, 4
  static constexpr int kWarps = Warps_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr bool kSmall = Warps_ == kWarpsOfSmall;
  static constexpr int kBlocks = kSmall ? 2 : 1;  // of a multiprocessor
  // Row tiles of a warp, at most. All of them are written out in the main loop: the fewer, the
  // sooner its first instructions have been fetched.
  static constexpr int kMaxRows = Rows_;
  // x in registers: a whole tile, or half a tile at a time where that would be too many.
  static constexpr int kHalves = XTiles_ == 4 ? 2 : 1;
  static constexpr int kXFragments = kFragments / kHalves;
  // k tiles that a warp requests and multiplies in one step: two were 15 % faster than one where
  // memory is not the limit, as each request has its price, four no faster than two (NOTES.md).
  static constexpr int kDepth = XTiles_ == 1 ? 2 : 1;
  static constexpr int kRecord = record_bytes(Bits_, Groups_);
  static constexpr int kSlot = kDepth * kRecord;
  static constexpr int kStride = slot_stride(kSlot, kRecord);            // from slot to slot
  static constexpr int kPartialTile = XTiles_ * 8 * kPartialColumn * 4;  // bytes
  static __host__ __device__ constexpr int partial_tile(int) { return kPartialTile; }
};

// Where a step's x lies in shared memory, from the first row of its first k tile. A small block
// keeps it within its table, in the half of every 256-byte row that no code leads to: a row of x
// takes two, its 16-byte chunks exchanged by the row's number to be free of bank conflicts.
template <typename Shape>
struct XPlace {
  static constexpr int kRowsOfStep = Shape::kDepth * Shape::kXTiles * 8;
  static constexpr int kRow = Shape::kSmall ? 512 : kXRow;

  static __device__ __forceinline__ uint32_t of_chunk(int row, int chunk) {
    if constexpr (Shape::kSmall) return row * kRow + chunk / 8 * 256 + (chunk ^ row) % 8 * 16;
    return row * kRow + chunk * 16;
  }
  static __device__ __forceinline__ uint32_t tile_bytes(int m) {
    return (Shape::kSmall ? Shape::kXTiles * 8 : m) * kRow;
  }
};

// One k tile of x: requested while the previous one is multiplied, then held in registers.
template <typename Shape>
struct XTile {
  using Place = XPlace<Shape>;
  uint32_t fragment[Shape::kXFragments][Shape::kXTiles][2];

  // Warp `part` of `parts` that use the same tiles requests its share of the rows of `depth` tiles.
  static __device__ __forceinline__ void request(const void* x, int m, int k_end, uint32_t to,
                                                 uint32_t barrier, int k_tile, int depth, int part,
                                                 int parts, int lane) {
    // Half a warp copies a row. k is a multiple of 32, so 16 bytes are all inside or all outside.
    const int chunk = lane % 16;
    for (int d = 0; d < depth; d++, to += Place::tile_bytes(m)) {
      const int k = (k_tile + d) * kTileK + chunk * 8;
      const bool inside = k < k_end;
      const uint8_t* from = static_cast<const uint8_t*>(x) + (inside ? 2 * k : 0);
#pragma unroll 1
      for (int row = 2 * part + lane / 16; row < m; row += 2 * parts)
        copy16(to + Place::of_chunk(row, chunk), from + row * static_cast<int64_t>(2 * k_end),
               inside);
    }
    copies_arrive(barrier);
  }
  // `row[t]`: this lane's ldmatrix row of x tile t, or of zeros past the last row of x.
  __device__ __forceinline__ void load(const uint32_t (&row)[Shape::kXTiles],
                                       const uint32_t (&next)[Shape::kXTiles], int d, int half) {
#pragma unroll
    for (int t = 0; t < Shape::kXTiles; t++)
#pragma unroll
      for (int f = 0; f < Shape::kXFragments; f += 2) {
        const int chunk = (half * Shape::kXFragments + f) * 2;  // a multiple of four
        uint32_t r[4];
        if constexpr (Shape::kSmall)
          load_matrices(r, (row[t] ^ chunk % 8 * 16) + d * next[t] + chunk / 8 * 256);
        else
          load_matrices(r, row[t] + d * next[t] + chunk * 16);
        fragment[f][t][0] = r[0], fragment[f][t][1] = r[1];
        fragment[f + 1][t][0] = r[2], fragment[f + 1][t][1] = r[3];
      }
  }
};

// Scales of the rows that a lane's sums belong to (g and g + 8), for each group of a tile.
template <typename Shape>
struct Scales {
  uint32_t word[Shape::kGroups];
  __device__ __forceinline__ void load(uint32_t record, int lane) {
    load_words(word, record + code_bytes(Shape::kBits) + (lane / 4) * Shape::kGroups * 4);
  }
};

template <typename Shape>
using Sums = float[Shape::kXTiles][4];
template <typename Shape>
using TableDecoder = Decoder<Shape::kBits, Shape::kSmall ? kSmallTable : 0>;

// sums += tile * x, for all of a tile's columns or one half of them
template <typename Shape>
__device__ __forceinline__ void multiply_tile(Sums<Shape>& sums, const Codes<Shape::kBits>& codes,
                                              const Scales<Shape>& scales, const XTile<Shape>& x,
                                              const TableDecoder<Shape>& decoder, int half) {
  using T = typename Shape::T;
  constexpr int kFragmentsInGroup = kFragments / Shape::kGroups;
  constexpr int kInStep =
      kFragmentsInGroup < Shape::kXFragments ? kFragmentsInGroup : Shape::kXFragments;
  // Even and odd fragments apart: a chain of dependent products is half as long. With four x tiles
  // there are four chains already, with one, on Hopper, those of the next k tile (see decode.cuh).
  constexpr bool kTwoChains = Shape::kXTiles == 2 || (Shape::kXTiles == 1 && !FLUTE_HAS_BULK);
#pragma unroll
  for (int begin = 0; begin < Shape::kXFragments; begin += kInStep) {
    float even_part[Shape::kXTiles][4] = {}, odd_part[Shape::kXTiles][4] = {};
#pragma unroll
    for (int f = begin; f < begin + kInStep; f += 2) {
      uint32_t even[4], odd[4];
      decoder.decode(even, odd, codes, (half * Shape::kXFragments + f) / 2);
#pragma unroll
      for (int t = 0; t < Shape::kXTiles; t++) multiply<T>(even_part[t], even, x.fragment[f][t]);
#pragma unroll
      for (int t = 0; t < Shape::kXTiles; t++)
        multiply<T>(kTwoChains ? odd_part[t] : even_part[t], odd, x.fragment[f + 1][t]);
    }
    const float2 scale =
        widen<T>(scales.word[(half * Shape::kXFragments + begin) / kFragmentsInGroup]);
#pragma unroll
    for (int t = 0; t < Shape::kXTiles; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[t][i] += (i < 2 ? scale.x : scale.y) *
                      (kTwoChains ? even_part[t][i] + odd_part[t][i] : even_part[t][i]);
  }
}

// A row tile's sums of one warp, as columns of 16 floats: [row of x][row of w].
template <typename Shape>
__device__ __forceinline__ void store_partial(uint32_t to, const Sums<Shape>& sums, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < Shape::kXTiles; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      store_shared_float(
          to + ((tile * 8 + 2 * t + (i & 1)) * kPartialColumn + g + 8 * (i >> 1)) * 4,
          sums[tile][i]);
}

}  // namespace flute
