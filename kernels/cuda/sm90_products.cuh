// What a warpgroup of the Hopper kernel does with 64 rows of w: bring the records, decode them into
// wgmma's A registers, multiply, write sums.
#pragma once

#include "ring.cuh"
#include "wgmma.cuh"

namespace flute {

constexpr int kWarpgroups = 4;

template <int Bits_, typename T_, int Columns_, int Groups_>
struct Sm90Shape {
  using T = T_;
  static constexpr int kBits = Bits_;
  static constexpr int kColumns = Columns_;  // rows of x of a block: 16, 32, 64, 128
  static constexpr int kGroups = Groups_;    // groups of a record: 1, 2, 4
  static constexpr int kThreads = kWarpgroups * 128;
  // k tiles of a step, and of a request of weights: a bulk copy holds up shared memory for some
  // clocks whatever its size.
  static constexpr int kDepth = 2;
  static constexpr int kRecord = record_bytes(Bits_, Groups_);
  static constexpr int kSlot = kDepth * kRecord;
  static constexpr int kBoxBytes = Columns_ * kSwizzleRowBytes;  // x of 64 columns
  static constexpr int kXStage = kTileK / kSwizzleColumns * kBoxBytes;
  // With few columns and one group, sums of a k tile take fewer multiplications than its weights.
  static constexpr bool kScaleSums = Columns_ <= 32 && Groups_ == 1;
};

#if FLUTE_HAS_WGMMA
// The records of one warp on their way, in the order of use: along k, then the next 64 rows.
template <typename Shape>
struct RecordRing {
  uint32_t barriers, slots_at;
  const uint8_t* next;  // to request next
  int64_t row_step;     // from the end of a row of tiles to the begin of this warp's next
  int k_tiles, k_left;  // of a row of tiles
  int rows_left;
  uint64_t policy;

  __device__ __forceinline__ uint32_t barrier(int stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t slot(int stage) const {
    return slots_at + stage * Shape::kSlot;
  }
  __device__ __forceinline__ void request(int stage, int lane) {
    if (rows_left <= 0) return;
    const int bytes = k_left < Shape::kDepth ? Shape::kRecord : Shape::kSlot;
    if (lane == 0) bulk_copy(slot(stage), next, bytes, barrier(stage), policy);
    next += bytes, k_left -= Shape::kDepth;
    if (k_left <= 0) next += row_step, k_left = k_tiles, rows_left--;
  }
};

// What a warpgroup accumulates, and the products under way: at any time at most two groups of them,
// one of each half of `a`.
template <typename Shape>
struct Products {
  static constexpr int kCount = Shape::kColumns / 2;
  using T = typename Shape::T;
  float sums[kCount];
  float part[2][Shape::kScaleSums ? kCount : 1];  // of the tile in hand and the one before
  float2 scale;                                   // of the tile in hand
  uint32_t a[kFragments][4];                      // the decoded weights
  Codes<Shape::kBits> codes;                      // of the next tile
  uint32_t word[Shape::kGroups];  // its scales: rows g (low half) and g + 8 of each group

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; i++) sums[i] = 0;
  }

  // Scales first: when the codes have arrived, they have.
  __device__ __forceinline__ void load(uint32_t record, int lane) {
    const uint32_t scales_at = record + code_bytes(Shape::kBits) + (lane / 4) * Shape::kGroups * 4;
#pragma unroll
    for (int i = 0; i < Shape::kGroups; i++) word[i] = load_shared(scales_at + i * 4);
    codes.load(record, lane);
  }

  // sums += scale * part
  template <int Tile>
  __device__ __forceinline__ void fold() {
    pin(part[Tile]);
#pragma unroll
    for (int i = 0; i < kCount; i++) sums[i] += (i & 2 ? scale.y : scale.x) * part[Tile][i];
  }

  // Four fragments of a tile by x at `x`, 64 columns of k.
  __device__ __forceinline__ void multiply(float (&d)[kCount], int half, uint32_t x,
                                           bool accumulate) {
    pin(d);
#pragma unroll
    for (int f = 4 * half; f < 4 * half + 4; f++) pin(a[f]);
    wgmma_begin();
#pragma unroll
    for (int f = 0; f < 4; f++)
      wgmma<T, Shape::kColumns>(d, a[4 * half + f], x_descriptor(x) + f * kDescriptorStep,
                                f > 0 || accumulate);
    wgmma_commit();
    pin(d);
  }

  __device__ __forceinline__ void apply_scales(int half) {
#pragma unroll
    for (int f = 4 * half; f < 4 * half + 4; f++) {
      const uint32_t w = word[f * Shape::kGroups / kFragments];
      const uint32_t low = permute_bytes(w, w, 0x1010), high = permute_bytes(w, w, 0x3232);
#pragma unroll
      for (int j = 0; j < 4; j++) a[f][j] = multiply_pairs<T>(a[f][j], j & 1 ? high : low);
    }
  }

  // k tile `Tile` of a step. `previous_done` runs when the tile before has been multiplied,
  // `decoded` when the codes have been used.
  template <int Tile, typename PreviousDone, typename Decoded>
  __device__ __forceinline__ void tile(uint32_t x, const Decoder<Shape::kBits>& decoder,
                                       PreviousDone previous_done, Decoded decoded) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      wgmma_wait<1>();  // the products that use this half of `a` are done
      if (half == 1) {
        if constexpr (Shape::kScaleSums) {
          if constexpr (Tile > 0) fold<Tile - 1>();
          scale = widen<T>(word[0]);
        }
        previous_done();
      }
#pragma unroll
      for (int f = 4 * half; f < 4 * half + 4; f += 2) decoder.decode(a[f], a[f + 1], codes, f / 2);
      if constexpr (!Shape::kScaleSums) apply_scales(half);
      if (half == 1) decoded();
      if constexpr (Shape::kScaleSums)
        multiply(part[Tile], half, x + half * Shape::kBoxBytes, half == 1);
      else
        multiply(sums, half, x + half * Shape::kBoxBytes, true);
    }
  }

  // After the last tile of a step. Products may not be under way across a turn of the loop: ptxas
  // then lets none overlap.
  template <int Tile>
  __device__ __forceinline__ void settle() {
    wgmma_wait<0>();
    if constexpr (Shape::kScaleSums)
      fold<Tile>();
    else
      pin(sums);
  }

  // As columns of 16 + kPad rows of floats: [row of x][row of w].
  template <int Pad>
  __device__ __forceinline__ void store(uint32_t to, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int column = i / 4 * 8 + 2 * t + (i & 1), row = g + 4 * (i & 2);
      store_shared_float(to + (column * (kTileRows + Pad) + row) * 4, sums[i]);
    }
  }

  // To y [columns, n] at its 16-row tile; `rows` of w are inside, columns of x too. Neighbouring
  // lanes exchange values, so that each writes two rows of w at once where `pairs` allows.
  __device__ __forceinline__ void write(T* y, int64_t n, int rows, int columns, bool pairs,
                                        int lane) const {
    const int g = lane / 4, t = lane % 4, odd = g & 1;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const int column = i / 4 * 8 + 2 * t, row = g + 4 * (i & 2);
      if (pairs) {
        const float received = __shfl_xor_sync(~0u, odd ? sums[i] : sums[i + 1], 4);
        const uint32_t word =
            odd ? narrow_pair<T>(received, sums[i + 1]) : narrow_pair<T>(sums[i], received);
        if (column + odd < columns && row < rows)
          *reinterpret_cast<uint32_t*>(y + (column + odd) * n + row - odd) = word;
      } else if (row < rows) {
        if (column < columns) y[column * n + row] = narrow<T>(sums[i]);
        if (column + 1 < columns) y[(column + 1) * n + row] = narrow<T>(sums[i + 1]);
      }
    }
  }
};
#endif

}  // namespace flute
