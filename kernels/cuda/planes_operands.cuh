// What a warp of the bit-plane kernel multiplies: planes of codes as A operands, planes of x as B
// operands, of binary tensor-core products.
//
// Let c_0 .. c_(b-1) be the bits of a code c. Any table T of 2^b values is a sum over the subsets S
// of these bits,
//
//   T[c] = sum over S of a_S * product over i in S of c_i,
//   a_S = sum over R within S of (-1)^(|S| - |R|) T[the code with the bits R]     (Moebius)
//
// and x, in fixed point, a sum over its bits, q = -2^14 q_14 + sum over j < 14 of 2^j q_j. So
//
//   sum over k of T[c_k] q_k = a_0 * sum of q_k
//                            + sum over S, j of a_S (+-2^j) popcount(plane_S & plane_j of x)
//
// where plane_S has a bit for each k: the product of its code's bits in S, one AND for each 32
// weights. mma.m16n8k128 counts 16 x 8 of these over 128 k at once: no weight is ever looked up,
// and no instruction is spent on single weights. Counts are exact. A column is a digit of two bits
// of x: what the lower one gives, and twice what the upper one does, by adding that two times.
//
// x takes 15 bits, with a unit for each row and 128 columns, a power of two, at most 2^-13 of the
// largest of them: bfloat16 is exact down to 2^-6 of it, and the rest is off by half a unit. Where
// that is much beside the others, as one of them is far larger, what is missing becomes a second
// number of 15 bits, and the tile is multiplied twice: 2^-28 of the largest is left then.
#pragma once

#include <type_traits>

#include "lut.cuh"

namespace flute {

constexpr int kXBits = 16;  // planes of x, the last one empty: two for each of eight digits

__device__ __forceinline__ float power_of_two(int biased_exponent) {
  return __uint_as_float(static_cast<uint32_t>(biased_exponent) << 23);
}

// The a_S of a table, S as a number, as if its largest value were 2^120 to 2^121: counts are used
// as floats of 2^-149 (multiply_planes).
template <int Bits>
struct Moebius {
  static constexpr int kCodes = 1 << Bits;
  float of[kCodes];
  float unit;  // what they are then to be multiplied by, and by 2^-120

  template <typename T>
  __device__ __forceinline__ void load(const void* table) {
    const uint32_t* pairs = static_cast<const uint32_t*>(table);
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kCodes / 2; i++) {
      const float2 two = widen<T>(__ldg(pairs + i));
      of[2 * i] = two.x, of[2 * i + 1] = two.y;
      largest = fmaxf(largest, fmaxf(fabsf(two.x), fabsf(two.y)));
    }
    const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 1), 253);
    unit = power_of_two(exponent);
    const float scale = power_of_two(254 - exponent);
#pragma unroll
    for (int i = 0; i < kCodes; i++) of[i] = of[i] * scale * 0x1p120f;
#pragma unroll
    for (int bit = 1; bit < kCodes; bit *= 2)
#pragma unroll
      for (int s = 0; s < kCodes; s++)
        if (s & bit) of[s] -= of[s ^ bit];
  }
};

// Planes of the codes of a tile: bit n of word [s][i] is the product of bits S of the code of row
// g + 8 * i and a column of lanes with t: 32 * pair + 16 * odd + 8 * upper + 2 * t + e, where n is,
// bit by bit from the highest, odd, upper, pair (two bits), e.
template <int Bits>
struct Planes {
  static_assert(Bits == 2);
  static constexpr int kCodes = 1 << Bits;
  uint32_t word[kCodes][2];  // [0] is not used

  // A byte of a lane's words has four pairs of bits: of row g and of row g + 8 bit 0, then bit 1.
  __device__ __forceinline__ explicit Planes(const Codes<Bits>& codes) {
    const uint32_t* w = codes.word;
    constexpr uint32_t kLow = 0x0f0f0f0fu, kEven = 0x33333333u;
    const uint32_t a0 = select_bits(w[0], w[2] << 4, kLow), a1 = select_bits(w[0] >> 4, w[2], kLow);
    const uint32_t b0 = select_bits(w[1], w[3] << 4, kLow), b1 = select_bits(w[1] >> 4, w[3], kLow);
    word[1][0] = select_bits(a0, b0 << 2, kEven), word[1][1] = select_bits(a0 >> 2, b0, kEven);
    word[2][0] = select_bits(a1, b1 << 2, kEven), word[2][1] = select_bits(a1 >> 2, b1, kEven);
    word[3][0] = word[1][0] & word[2][0], word[3][1] = word[1][1] & word[2][1];
  }
};

// A row's 128 columns of x as one or two numbers. In shared memory: for each number and lane the
// planes 2 g and 2 g + 1, g = lane / 4, of the columns that a warp's lanes with its t hold; then
// the first one's unit and sum, and the second one's, whose unit is 0 where there is none.
struct PlaneX {
  static constexpr int kNumber = 256, kBytes = 2 * kNumber + 16;
  // The mean size, in units, below which a second number is made; the largest is 2^13 or more. What
  // is missing without it, .29 units, is then beside the others a third or less of what rounding
  // the products' sums to bfloat16 costs, or as much as float16's.
  template <typename T>
  static constexpr int kSmallMean = std::is_same_v<T, __half> ? 1536 : 512;
  uint32_t plane[2];
  float unit, sum, second_unit, second_sum;

  __device__ __forceinline__ void load(uint32_t at, int lane) {
    const uint2 planes = load_shared2(at + lane * 8);
    const float4 numbers = load_shared_float4(at + 2 * kNumber);
    plane[0] = planes.x, plane[1] = planes.y;
    unit = numbers.x, sum = numbers.y, second_unit = numbers.z, second_sum = numbers.w;
  }
  __device__ __forceinline__ void load_second(uint32_t at, int lane) {
    const uint2 planes = load_shared2(at + kNumber + lane * 8);
    plane[0] = planes.x, plane[1] = planes.y;
    unit = second_unit, sum = second_sum;
  }
};

// One 16-bit float of a word of two, by the selector of its bytes.
template <typename T>
constexpr uint32_t kLowerHalf = std::is_same_v<T, __nv_bfloat16> ? 0x1044 : 0x4410;
template <typename T>
constexpr uint32_t kUpperHalf = std::is_same_v<T, __nv_bfloat16> ? 0x3244 : 0x4432;
template <typename T>
__device__ __forceinline__ float widen_half(uint32_t word, uint32_t half) {
  const uint32_t bits = permute_bytes(word, 0, half);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(bits);
  return widen<T>(bits).x;
}

// Makes rows of x into planes, a warp together. Lane 4 * i + t, i = 2 * pair + e, has four columns
// of the 32 of lanes with t, those of both values of odd and upper; and in the end planes i and
// i + 8 of all 32.
template <typename T>
class PlaneMaker {
 public:
  __device__ __forceinline__ explicit PlaneMaker(int lane_) : lane(lane_) {
    const int i = lane / 4;
    half = i & 1 ? kUpperHalf<T> : kLowerHalf<T>;
    first = (i / 2 * 4 + lane % 4) * 8 + i % 2 * 4;
    last = i == kXBits / 2 - 1 ? 0 : ~0u;
    uint32_t mask = 0x0f0f0f0f;
#pragma unroll
    for (int bit = 0, distance = 4; bit < 3; bit++, distance /= 2, mask ^= mask << distance) {
      const bool upper = i & distance;
      turn[bit] = upper ? 32 - distance : distance, keep[bit] = upper ? ~mask : mask;
      computed_once(turn[bit], lane), computed_once(keep[bit], lane);
    }
    computed_once(half, lane), computed_once(first, lane), computed_once(last, lane);
  }

  // What a lane has of a row's columns: words of two each, the first of them from column() on.
  struct Columns {
    uint32_t word[4];
  };
  static __device__ __forceinline__ int column(int lane) {
    return 32 * (lane / 8) + 2 * (lane % 4);
  }
  static __device__ __forceinline__ Columns load(const void* x) {
    const uint8_t* at = static_cast<const uint8_t*>(x);
    return {load_global(at), load_global(at + 16), load_global(at + 32), load_global(at + 48)};
  }

  __device__ __forceinline__ void make(uint32_t at, const Columns& x) const {
    float own[4];
#pragma unroll
    for (int n = 0; n < 4; n++) own[n] = widen_half<T>(x.word[n], half);
    float largest = fabsf(own[0]), size = fabsf(own[0]);
#pragma unroll
    for (int n = 1; n < 4; n++) largest = larger_size(largest, own[n]), size += fabsf(own[n]);
    const int exponent = largest_of_lanes(__float_as_uint(largest)) >> 23;
    const int scaled = max(exponent, 32);
    const float scale = power_of_two(267 - scaled);
    float whole[4];
    float4 numbers = make_float4(power_of_two(scaled - 13), 0, 0, 0);
    numbers.y = make_number(at, own, scale, whole);
    const uint32_t sizes = sum_of_lanes(__float_as_uint(fmaf(size, scale, kMagic)));
    if (sizes - 32 * kMagicBits < kTileK * PlaneX::kSmallMean<T>) {
      float rest[4];  // at most half a unit
      bool missing = false;
#pragma unroll
      for (int n = 0; n < 4; n++)
        rest[n] = fmaf(own[n], scale, kMagic - whole[n]), missing |= rest[n] != 0;
      if (any_lane(missing)) {
        numbers.z = power_of_two(scaled - 27);
        numbers.w = make_number(at + PlaneX::kNumber, rest, 0x1p14f, whole);
      }
    }
    // What is no number makes the sum none.
    if (exponent == 255) numbers.x = __uint_as_float(0x7fc00000u);
    if (lane == 0) store_shared_float4(at + 2 * PlaneX::kNumber, numbers);
  }

 private:
  // An integer stands in the low bits of its sum with 1.5 * 2^23, which is taken off sums of them.
  static constexpr float kMagic = 12582912.f;
  static constexpr uint32_t kMagicBits = 0x4b400000;
  int lane;
  uint32_t half;              // of a word, this lane's
  uint32_t first, last;       // where plane i goes; the bits of plane i + 8, the last one empty
  uint32_t turn[3], keep[3];  // another lane's bits to their place, and which of its own stay

  // Planes of v * scale, rounded; returns its sum over all lanes. `whole`: the numbers plus kMagic.
  __device__ __forceinline__ float make_number(uint32_t at, const float (&v)[4], float scale,
                                               float (&whole)[4]) const {
    uint32_t q[4], sum = 0;
#pragma unroll
    for (int n = 0; n < 4; n++)
      whole[n] = fmaf(v[n], scale, kMagic), q[n] = __float_as_uint(whole[n]), sum += q[n];
    // Bytes of all four: bits 0 to 7, bits 8 to 15. Then bits of eight lanes, for a bit of each.
    const uint32_t even = permute_bytes(q[0], q[1], 0x5140),
                   odd = permute_bytes(q[2], q[3], 0x5140);
    store_shared(at + first, transpose(permute_bytes(even, odd, 0x5410)));
    store_shared(at + first + 128, transpose(permute_bytes(even, odd, 0x7632)) & last);
    const uint32_t all = sum_of_lanes(static_cast<int>(sum));
    return static_cast<float>(static_cast<int>(all - 4 * 32 * kMagicBits));
  }
  // Bit j of each byte of lane 4 * i + t becomes bit i of lane 4 * j + t's.
  __device__ __forceinline__ uint32_t transpose(uint32_t word) const {
#pragma unroll
    for (int bit = 0, distance = 16; bit < 3; bit++, distance /= 2)
      word = select_bits(word, rotate_left(lane_across(word, distance), turn[bit]), keep[bit]);
    return word;
  }
};

// Sums of a row tile and a row of x, for rows g and g + 8 of w: this lane's share of the planes of
// x, and x alone.
struct PlaneSums {
  float planes[2] = {}, constant[2] = {};

  // The row tile's products with x, in all lanes. Digits 2 t and 2 t + 1 were this lane's.
  template <int Bits>
  __device__ __forceinline__ void finish(float (&y)[2], const Moebius<Bits>& moebius, int t) const {
    const float weight = static_cast<float>(1 << 4 * t);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float sum = weight * planes[i];
      sum += lane_across(sum, 1);
      sum += lane_across(sum, 2);
      y[i] = 0x1p29f * (sum + 0x1p-149f * moebius.of[0] * constant[i]) * moebius.unit;
    }
  }
};

// sums += tile * x, where a tile has one group; `scales`: of rows g and g + 8. `top`: 4, but -4
// in lanes whose second digit is the sign.
template <typename Shape>
__device__ __forceinline__ void multiply_planes(PlaneSums& sums, const Planes<Shape::kBits>& planes,
                                                uint32_t scales, const PlaneX& x, float top,
                                                const Moebius<Shape::kBits>& moebius) {
  float part[2] = {};
#pragma unroll
  for (int s = 1; s < Planes<Shape::kBits>::kCodes; s++) {
    int count[4] = {};
    multiply_bits(count, planes.word[s], x.plane[0]);
    multiply_bits(count, planes.word[s], x.plane[1]);
    multiply_bits(count, planes.word[s], x.plane[1]);
    // A count is below 2^23, so its bits are those of a float, count * 2^-149: multiplied at full
    // speed, where a conversion would cost as much as two of them.
    auto as_float = [](int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); };
#pragma unroll
    for (int i = 0; i < 2; i++)
      part[i] = fmaf(moebius.of[s], fmaf(top, as_float(count[2 * i + 1]), as_float(count[2 * i])),
                     part[i]);
  }
  const float2 scale = widen<typename Shape::T>(scales);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float factor = x.unit * (i == 0 ? scale.x : scale.y);
    sums.planes[i] += factor * part[i];
    sums.constant[i] += factor * x.sum;
  }
}

}  // namespace flute
