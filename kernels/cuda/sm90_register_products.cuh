// What a warpgroup does with 64 rows of w where the table lies in registers: decode some fragments
// while the tensor cores multiply those before.
#pragma once

#include "register_lut.cuh"
#include "sm90_products.cuh"

namespace flute {

#if FLUTE_HAS_WGMMA
// 64 rows of w by kColumns rows of x. Weights are rounded to 16 bits after scaling, as dequantize
// does.
template <typename Shape>
struct RegisterProducts {
  using T = typename Shape::T;
  static constexpr int kBatch = Shape::kBatch;
  static constexpr int kUnits = kFragments / kBatch;  // products of a k tile
  static constexpr int kHalf = kUnits / 2;            // of 64 columns of k
  float sums[Shape::kColumns / 2];
  uint32_t a[2][kBatch][4];       // decoded fragments: of this product and of the one before
  uint32_t word[Shape::kGroups];  // scales
  RegisterTable<Shape::kBits> table;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; i++) sums[i] = 0;
  }

  // KTiles k tiles, product by product: while one is under way, the next is decoded. `record(i)`
  // waits for the codes of k tile i and says where they are, `decoded` gives a request of them
  // back; `take` waits for the x of the next half of a k tile and returns its address, `release(i)`
  // gives that of half i back.
  template <int KTiles, typename Record, typename Decoded, typename Take, typename Release>
  __device__ __forceinline__ void step(int lane, Record record, Decoded decoded, Take take,
                                       Release release) {
    constexpr int kCount = kUnits * KTiles;
    uint32_t from = 0, x = 0;
    Codes<Shape::kBits> codes;
    for_constants<kCount>([&](auto constant) {
      constexpr int unit = decltype(constant)::value, first = unit % kUnits * kBatch;
      constexpr bool begins = first % 4 == 0;  // a half
      if constexpr (first == 0) {
        from = record(unit / kUnits);
        const uint32_t at = from + code_bytes(Shape::kBits) + (lane / 4) * Shape::kGroups * 4;
#pragma unroll
        for (int i = 0; i < Shape::kGroups; i++) word[i] = load_shared(at + i * 4);
      }
      if constexpr (begins) codes.load_half(from, first / 4, lane);
      wgmma_wait<1>();  // all products are done but the last one
      if constexpr (unit >= 2 && (unit - 1) % kHalf == 0) release((unit - 2) / kHalf);
      auto& fragments = a[unit % 2];
#pragma unroll
      for (int f = 0; f < kBatch; f++) table.decode(fragments[f], codes.nibbles(first + f));
      apply_scales<T>(fragments, word, first);
      if constexpr (first + kBatch == kFragments &&
                    (unit / kUnits % Shape::kDepth == Shape::kDepth - 1 || unit == kCount - 1))
        decoded();
      if constexpr (begins) x = take();
      multiply_box<T, Shape::kColumns>(sums, fragments, x, true, first % 4);
    });
    // Products may not be under way across a turn of the loop: ptxas then lets none overlap.
    wgmma_wait<0>();
    pin(sums);
#pragma unroll
    for (int i = (kCount - 2) / kHalf; i < 2 * KTiles; i++) release(i);
  }
};
#endif

}  // namespace flute
