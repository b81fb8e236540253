// What a warpgroup of the Hopper kernels does with 64 rows of w: decode them into wgmma's A
// registers, multiply, write sums.
#pragma once

#include "sm90_rings.cuh"

namespace flute {

template <int Bits_, typename T_, int Columns_, int Warpgroups_, int Groups_>
struct Sm90Shape {
  using T = T_;
  static constexpr int kBits = Bits_;
  static constexpr int kColumns = Columns_;  // rows of x of a block: 16, 32, 64, 128
  static constexpr int kGroups = Groups_;    // groups of a record: 1, 2, 4
  // Few columns need few registers: eight warpgroups fit, each of which waits for its products
  // before it decodes on, as the others fill the gaps. Four overlap the halves of a tile by
  // themselves; they start and end sooner, which is what counts where each has few k tiles.
  static constexpr int kWarpgroups = Warpgroups_;  // of a block: 4, or 8 for up to 32 columns
  static constexpr int kThreads = kWarpgroups * 128;
  static constexpr int kBuffers = kWarpgroups == 8 ? 1 : 2;  // decoded halves of a tile at a time
  // k tiles of a step, and of a request of weights: a bulk copy holds up shared memory for some
  // clocks whatever its size. With eight warpgroups two requests of two would be too much in
  // flight.
  static constexpr int kDepth = kWarpgroups == 8 ? 1 : 2;
  static constexpr int kRecord = record_bytes(Bits_, Groups_);
  static constexpr int kSlot = kDepth * kRecord;
  static constexpr int kBoxBytes = Columns_ * kSwizzleRowBytes;  // x of 64 columns
  static constexpr int kXBoxes = 2;                              // of a stage
  static constexpr int kXStage = kXBoxes * kBoxBytes;
  // With few columns, the sums of a group take fewer multiplications than its weights, but
  // registers of their own. A group is a k tile or, with 16 columns, may be half of one.
  static constexpr bool kScaleHalves = Columns_ == 16 && Groups_ == 2;
  static constexpr bool kScaleSums = (Columns_ <= 32 && Groups_ == 1) || kScaleHalves;
};

#if FLUTE_HAS_WGMMA
// Scales four fragments, first, first + 1, .. of a tile. A word holds the scales of rows g (low
// half) and g + 8 of a group.
template <typename T, int Groups>
__device__ __forceinline__ void apply_scales(uint32_t (&a)[4][4], const uint32_t (&word)[Groups],
                                             int first) {
#pragma unroll
  for (int f = 0; f < 4; f++) {
    const uint32_t w = word[(first + f) * Groups / kFragments];
    const uint32_t low = permute_bytes(w, w, 0x1010), high = permute_bytes(w, w, 0x3232);
#pragma unroll
    for (int j = 0; j < 4; j++) a[f][j] = multiply_pairs<T>(a[f][j], j & 1 ? high : low);
  }
}

// d += a * x for the 64 columns of k that begin at the matrix descriptor `x`; asynchronous.
template <typename T, int Columns>
__device__ __forceinline__ void multiply_box(float (&d)[Columns / 2], uint32_t (&a)[4][4],
                                             uint32_t x, bool accumulate) {
  pin(d);
#pragma unroll
  for (int f = 0; f < 4; f++) pin(a[f]);
  wgmma_begin();
#pragma unroll
  for (int f = 0; f < 4; f++)
    wgmma<T, Columns>(d, a[f], x + f * kDescriptorStep, f > 0 || accumulate);
  wgmma_commit();
  pin(d);
}

// Sums of a 16-row tile of w to y [columns, n], of which `rows` and `columns` are inside.
// Neighbouring lanes exchange values, so that each writes two rows of w at once where `pairs` says
// that all rows of y and of w begin and end at even places.
template <typename T, int Count>
__device__ __forceinline__ void write_sums(const float (&sums)[Count], T* y, int64_t n, int rows,
                                           int columns, bool pairs, int lane) {
  const int g = lane / 4, t = lane % 4, odd = g & 1;
  if (pairs) {
    T* to = y + (2 * t + odd) * n + g - odd;  // moved along, as all addresses at once would spill
    int left = columns - 2 * t - odd;
#pragma unroll
    for (int i = 0; i < Count; i += 4, to += 8 * n, left -= 8) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {  // rows g, then g + 8
        const float low = sums[i + j], high = sums[i + j + 1];
        const float received = __shfl_xor_sync(~0u, odd ? low : high, 4);
        const uint32_t word = odd ? narrow_pair<T>(received, high) : narrow_pair<T>(low, received);
        if (left > 0 && g + 4 * j < rows) *reinterpret_cast<uint32_t*>(to + 4 * j) = word;
      }
    }
    return;
  }
  T* to = y + 2 * t * n + g;
  int left = columns - 2 * t;
#pragma unroll
  for (int i = 0; i < Count; i += 4, to += 8 * n, left -= 8) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (left > (j & 1) && g + 4 * (j & 2) < rows)
        to[(j & 1) * n + 4 * (j & 2)] = narrow<T>(sums[i + j]);
  }
}

// What a warpgroup accumulates, and the products under way: at any time at most kBuffers groups of
// them, one of each buffer of `a`.
template <typename Shape>
struct Products {
  static constexpr int kCount = Shape::kColumns / 2, kBuffers = Shape::kBuffers;
  using T = typename Shape::T;
  float sums[kCount];
  // Sums of the group in hand and, with two buffers, of the one before. Of whole tiles
  // part[Unit % kBuffers] and scale[0]; of half tiles part[half % kBuffers] and the scale of the
  // same number. Scales as below.
  float part[kBuffers][Shape::kScaleSums ? kCount : 1];
  uint32_t scale[kBuffers];
  uint32_t a[kBuffers][4][4];     // the decoded weights of half a tile each
  Codes<Shape::kBits> codes;      // of the next tile
  uint32_t word[Shape::kGroups];  // its scales: rows g (low half) and g + 8 of each group

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; i++) sums[i] = 0;
  }

  // The slot may be refilled once the products of the tile's first half have been issued: what a
  // warp reads from shared memory arrives in order, the scales before those table entries.
  __device__ __forceinline__ void load(uint32_t record, int lane) {
    const uint32_t scales_at = record + code_bytes(Shape::kBits) + (lane / 4) * Shape::kGroups * 4;
#pragma unroll
    for (int i = 0; i < Shape::kGroups; i++) word[i] = load_shared(scales_at + i * 4);
    codes.load(record, lane);
  }

  // sums += scale * part, of a group
  __device__ __forceinline__ void fold(float (&of_group)[Shape::kScaleSums ? kCount : 1],
                                       uint32_t scales) {
    const float2 of_rows = widen<T>(scales);
    pin(of_group);
#pragma unroll
    for (int i = 0; i < kCount; i++) sums[i] += (i & 2 ? of_rows.y : of_rows.x) * of_group[i];
  }

  // k tile `Unit` of a step. Its codes are loaded; `decoded` runs
  // when they have been used, `previous_done` when the tile before has been multiplied.
  // `Previous`: the tile before in this step, or -1.
  template <int Unit, int Previous, typename PreviousDone, typename Decoded>
  __device__ __forceinline__ void tile(uint32_t x, const Decoder<Shape::kBits>& decoder,
                                       PreviousDone previous_done, Decoded decoded) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int buffer = half % kBuffers;
      wgmma_wait<kBuffers - 1>();  // the products that use this buffer are done,
      const bool previous_over = half == kBuffers - 1;  // now or before all those of the last tile
      if constexpr (Shape::kScaleHalves) {
        const bool used = half >= kBuffers || Previous >= 0;
        if (used) fold(part[buffer], scale[buffer]);
        scale[buffer] = word[half];
      } else if constexpr (Shape::kScaleSums) {
        if (previous_over) {
          if constexpr (Previous >= 0) fold(part[Previous % kBuffers], scale[0]);
          scale[0] = word[0];
        }
      }
      if (previous_over) previous_done();
#pragma unroll
      for (int f = 0; f < 4; f += 2)
        decoder.decode(a[buffer][f], a[buffer][f + 1], codes, 2 * half + f / 2);
      if constexpr (!Shape::kScaleSums) apply_scales<T>(a[buffer], word, 4 * half);
      if (half == 1) decoded();
      const uint32_t box = x + half * (Shape::kBoxBytes >> kDescriptorShift);
      if constexpr (Shape::kScaleHalves)
        multiply_box<T, Shape::kColumns>(part[buffer], a[buffer], box, false);
      else if constexpr (Shape::kScaleSums)
        multiply_box<T, Shape::kColumns>(part[Unit % kBuffers], a[buffer], box, half == 1);
      else
        multiply_box<T, Shape::kColumns>(sums, a[buffer], box, true);
    }
  }

  // After the last tile of a step. Products may not be under way across a turn of the loop: ptxas
  // then lets none overlap.
  template <int Unit>
  __device__ __forceinline__ void settle() {
    wgmma_wait<0>();
    if constexpr (Shape::kScaleHalves) {
#pragma unroll
      for (int i = 0; i < kBuffers; i++) fold(part[i], scale[i]);
    } else if constexpr (Shape::kScaleSums) {
      fold(part[Unit % kBuffers], scale[0]);
    } else {
      pin(sums);
    }
  }

  // As columns of 16 + Pad floats: [row of x][row of w].
  template <int Pad>
  __device__ __forceinline__ void store(uint32_t to, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int column = i / 4 * 8 + 2 * t + (i & 1), row = g + 4 * (i & 2);
      store_shared_float(to + (column * (kTileRows + Pad) + row) * 4, sums[i]);
    }
  }
};
#endif

}  // namespace flute
