// Which tiles of y, and which k of them, a block of the prefill kernel computes.
//
// Where the number of tiles fills no whole number of rounds of all blocks, there are two ways to
// share what is left. The blocks of a cluster share a tile each and add up through each other's
// shared memory: the faster way where the count fits. Or k of the tiles left, and of one full round
// if there is one, is *spread*: cut into as many equal shares as there are places, in order. Then a
// tile is cut at most once or, without a full round, in as many pieces as there are blocks for a
// tile. The block with its first k adds what the others leave in global memory.
#pragma once

#include "layout.cuh"

namespace flute {

constexpr int kPrefillGroups = 2;  // warpgroups that multiply
constexpr int kPrefillStages = 8;  // at most, of weights and of x
constexpr int kLeastShare = 4;     // k tiles from a cut to the ends of its tile, at least

// What a launch needs; filled by sm90_prefill_launch.cuh.
struct PrefillParams {
  const uint8_t* records;
  const uint8_t* table;
  void* y;
  int m, n, k_tiles;
  int table_bytes;          // of one part
  int row_tiles;            // 16-row tiles of a block
  int x_tiles;              // tiles of x, each kColumns rows
  int side;                 // of them, next to each other in the order of tiles of y
  int tiles;                // of y
  int whole;                // of them, computed by one block each
  int splits_log2;          // blocks of a cluster that share one of the others
  int members;              // if not 0, the others are spread: blocks of a place, each with a tile
                            // of x of its own, so that they need the same weights at the same time
  int each, more;           // k tiles of a place, and one more for the first `more` places
  float* sums;              // spread: [blocks][kPrefillGroups][64 * columns]
  uint32_t* flags;          // [blocks][kPrefillGroups]: these sums are there
  int slots, x_stages;      // of weights, for each warpgroup, and of x
  int staged_at, slots_at;  // from the start of shared memory
  int first_block[FLUTE_MAX_PARTS + 1];
  Parts parts;
};

// Spreads the k of the tiles that fill no round, and of one full round if there is one: of the rest
// alone each tile would be cut in many pieces. Blocks with the same rows of w stay together where
// all bands of tiles are equally wide. Returns the blocks of the launch.
inline int spread_k(PrefillParams& params, int multiprocessors, float* sums, uint32_t* flags) {
  const bool together = params.x_tiles % params.side == 0 && params.side <= multiprocessors;
  const int members = together ? params.side : 1;
  const int places = multiprocessors / members, blocks = places * members;
  params.whole = params.tiles;
  if (params.tiles % blocks == 0) return blocks;
  params.whole = params.tiles > blocks ? (params.tiles / blocks - 1) * blocks : 0;
  const int64_t k_tiles = int64_t{(params.tiles - params.whole) / members} * params.k_tiles;
  params.members = members, params.sums = sums, params.flags = flags;
  params.each = static_cast<int>(k_tiles / places);
  params.more = static_cast<int>(k_tiles % places);
  return blocks;
}

// k tiles before the share of `place`, over all tiles that are spread. No share begins or ends
// within a few k tiles of a tile's ends, or between the k tiles of a request.
__device__ __forceinline__ int spread_begin(const PrefillParams& p, int place) {
  const int at = place * p.each + min(place, p.more), in_tile = at % p.k_tiles;
  if (in_tile < kLeastShare) return at - in_tile;
  if (p.k_tiles - in_tile < kLeastShare) return at - in_tile + p.k_tiles;
  return at - (in_tile & 1);
}

// What this block does in one round of all blocks: a tile of y, or a share of its k.
//
// Blocks that run at once share some rows of x and some of w, so that L2 holds both: `side` tiles
// of x side by side, then the next rows of w; at last the next tiles of x.
struct Work {
  int block, column0;  // rows of w as BlockRows counts them, first row of x
  int begin, end;      // k tiles
  int place, member;   // of the blocks that share k, if it is spread
  bool exists, shared, spread;

  __device__ __forceinline__ Work(const PrefillParams& p, int round, int columns) {
    int index = round * gridDim.x + blockIdx.x;
    spread = p.members > 0 && index >= p.whole;
    shared = p.splits_log2 > 0 && index >= p.whole;
    begin = 0, end = p.k_tiles, place = member = 0;
    if (spread) {
      // Backwards: a block waits for the sums of blocks that the device started before it, so
      // nothing is waited for that cannot come, whatever else the device runs. That blocks start
      // in the order of their numbers is what devices do, not what CUDA promises.
      const int backwards = gridDim.x - 1 - blockIdx.x;
      place = backwards / p.members, member = backwards - place * p.members;
      const int from = spread_begin(p, place), to = spread_begin(p, place + 1);
      const int tile = from / p.k_tiles + (round - p.whole / gridDim.x);
      begin = max(from - tile * p.k_tiles, 0), end = min(to - tile * p.k_tiles, p.k_tiles);
      index = begin < end ? p.whole + tile * p.members + member : p.tiles;
    } else if (shared) {
      const int rank = blockIdx.x & ((1 << p.splits_log2) - 1);
      begin = p.k_tiles * rank >> p.splits_log2, end = p.k_tiles * (rank + 1) >> p.splits_log2;
      index += (blockIdx.x >> p.splits_log2) - blockIdx.x;
    }
    exists = index < p.tiles, block = column0 = 0;
    if (!exists) return;
    const int blocks = p.first_block[p.parts.count];
    const int band = index / (p.side * blocks), first = band * p.side;
    const int side = min(p.side, p.x_tiles - first), in_band = index - first * blocks;
    block = in_band / side;
    column0 = (first + in_band - block * side) * columns;
  }
};

// Where the sums of a spread tile pass from block to block, for one warpgroup.
struct SpreadSums {
  const PrefillParams& p;
  const Work& work;
  int group, size;  // floats of a warpgroup's sums

  __device__ __forceinline__ int slot(int place) const {
    return (place * p.members + work.member) * kPrefillGroups + group;
  }
  __device__ __forceinline__ float* sums(int place) const { return p.sums + slot(place) * size; }
  __device__ __forceinline__ uint32_t* flag(int place) const { return p.flags + slot(place); }

  // The places that have the rest of this block's tile, in the order of k.
  template <typename Visit>
  __device__ __forceinline__ void for_each_other(Visit visit) const {
    int left = p.k_tiles - work.end;
    if (left <= 0) return;
    int from = spread_begin(p, work.place + 1);
    for (int place = work.place + 1; left > 0; place++) {
      const int next = spread_begin(p, place + 1);
      if (next > from) visit(place);
      left -= next - from, from = next;
    }
  }
};

}  // namespace flute
