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
// g + 8 * i and column column(t, n).
template <int Bits>
struct Planes {
  static_assert(Bits == 2);
  static constexpr int kCodes = 1 << Bits;
  uint32_t word[kCodes][2];  // [0] is not used

  static __host__ __device__ constexpr int column(int t, int n) {
    const int e = n & 1, pair = n >> 1 & 3, upper = n >> 3 & 1, odd = n >> 4;
    return 16 * (2 * pair + odd) + 8 * upper + 2 * t + e;
  }

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

  // A warp makes a row. Lane n has 8 columns of x, from Planes<Bits>::column(0, n & ~1): it takes
  // bit n of all planes from every other one of them.
  template <typename T>
  static __device__ __forceinline__ void make(uint32_t at, uint4 x, int lane) {
    const uint32_t selector = lane & 1 ? 0x3232 : 0x1010;  // this lane's half of each word, twice
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
    float own[4];
    uint32_t top = 0;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const uint32_t both = permute_bytes(words[t], words[t], selector);
      top = max(top, both & 0x7fff), own[t] = widen<T>(both).x;
    }
    const int exponent = __float_as_uint(widen<T>(largest_of_lanes(top)).x) >> 23;
    const int scaled = max(exponent, 32);
    const float scale = power_of_two(267 - scaled);
#pragma unroll
    for (int t = 0; t < 4; t++) own[t] *= scale;
    const int size = make_number(at, at + 2 * kNumber + 4, own, lane);
    // What is missing, at most half a unit, in units of 2^-14.
    bool missing = false;
#pragma unroll
    for (int t = 0; t < 4; t++) missing |= own[t] != 0;
    float second = 0;
    if (size < kTileK * kSmallMean<T> && any_lane(missing)) {
      make_number(at + kNumber, at + 2 * kNumber + 12, own, lane);
      second = power_of_two(scaled - 27);
    }
    // What is no number makes the sum none.
    const float unit = exponent == 255 ? __uint_as_float(0x7fc00000u) : power_of_two(scaled - 13);
    if (lane == 0) {
      store_shared_float(at + 2 * kNumber, unit);
      store_shared_float(at + 2 * kNumber + 8, second);
    }
  }

 private:
  // Planes of v, rounded, and its sum; v becomes what is missing, times 2^14. Returns the sum of
  // sizes.
  static __device__ __forceinline__ int make_number(uint32_t at, uint32_t sum_at, float (&v)[4],
                                                    int lane) {
    uint32_t q[4];
    int sum = 0, size = 0;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: an integer stands in the low bits
      const float whole = v[t] + kMagic;
      q[t] = __float_as_uint(whole);
      v[t] = 0x1p14f * (v[t] - (whole - kMagic));
      const int number = static_cast<int>(q[t]) - 0x4b400000;
      sum += number, size += abs(number);
    }
    sum = sum_of_lanes(sum);
    if (lane == 0) store_shared_float(sum_at, static_cast<float>(sum));
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      // Lane l: bit l of the words of all lanes, which is plane l % 16 of t = 2 * pair + l / 16.
      const uint32_t bits =
          transpose_bits(permute_bytes(q[2 * pair], q[2 * pair + 1], 0x5410), lane);
      const int j = lane % kXBits, t = 2 * pair + lane / kXBits;
      store_shared(at + (j / 2 * 4 + t) * 8 + j % 2 * 4, j == kXBits - 1 ? 0 : bits);
    }
    return sum_of_lanes(size);
  }
  // Bit i of lane l's word becomes bit l of lane i's.
  static __device__ __forceinline__ uint32_t transpose_bits(uint32_t word, int lane) {
#pragma unroll
    for (int distance = 16, mask = 0x0000ffff; distance > 0;
         distance /= 2, mask ^= mask << distance) {
      // The half of the bits that stays is the lower one in lanes with a 0 there.
      const bool upper = lane & distance;
      const uint32_t other = lane_across(word, distance);
      const uint32_t moved = rotate_left(other, upper ? 32 - distance : distance);
      word = select_bits(word, moved, upper ? ~static_cast<uint32_t>(mask) : mask);
    }
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
