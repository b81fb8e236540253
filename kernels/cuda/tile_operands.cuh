// Operands of the tile kernel: 16 columns at a time, from codes and scales in shared memory to
// scaled weights (the A operand), and from x in shared memory to the B operand.
#pragma once

#include "lut.cuh"

namespace flute {

// What a lane needs of the codes of one or two pairs of fragments, 16 rows x 32 columns each:
// `first` is the first pair, a multiple of Pairs and the same for all lanes.
template <int Bits, int Pairs>
struct PairCodes;

template <int Pairs>
struct PairCodes<4, Pairs> {
  uint32_t word[2 * Pairs];
  __device__ __forceinline__ void load(uint32_t record, int lane, int first) {
    load_words(word, record + (first >> 1) * 512 + lane * 16 + (first & 1) * 8);
  }
  __device__ __forceinline__ uint32_t bytes(int pair, int odd) const {
    return word[2 * pair + odd];
  }
};

// At 3 and 2 bits the rest of a byte is another fragment's or register's; the table does not depend
// on it.
template <>
struct PairCodes<3, 2> {
  uint32_t word[3];
  __device__ __forceinline__ void load(uint32_t record, int lane, int first) {
    load_half_of_3(word, record, first >> 1, lane);
  }
  __device__ __forceinline__ uint32_t bytes(int pair, int odd) const {
    return pair * 2 + odd < 3 ? word[pair * 2 + odd] : spare_bytes(word);
  }
};

template <>
struct PairCodes<3, 1> {
  uint32_t even, odd;
  __device__ __forceinline__ void load(uint32_t record, int lane, int first) {
    uint32_t word[3];
    load_half_of_3(word, record, first >> 1, lane);
    even = first & 1 ? word[2] : word[0], odd = first & 1 ? spare_bytes(word) : word[1];
  }
  __device__ __forceinline__ uint32_t bytes(int, int second) const { return second ? odd : even; }
};

template <int Pairs>
struct PairCodes<2, Pairs> {
  uint32_t word[Pairs];
  __device__ __forceinline__ void load(uint32_t record, int lane, int first) {
    load_words(word, record + lane * 16 + first * 4);
  }
  __device__ __forceinline__ uint32_t bytes(int pair, int odd) const {
    return bytes_of_2(word[pair], odd);
  }
};

// Codes and scales of 16 rows, and A operands from them. The table is a narrow one: that leaves
// room for two more steps of x than a wide one, and one kind of table serves every device. Its
// address is added rather than merged, so that it needs no alignment, which would cut shared memory
// in two.
template <int Bits, typename T, int Groups, int Pairs>
struct Weights {
  static constexpr int kScales = Groups == 4 ? Pairs : 1;  // two pairs have one group or two
  PairCodes<Bits, Pairs> codes;
  uint32_t scales[kScales];  // of rows g (low half) and g + 8

  __device__ __forceinline__ void load(uint32_t record, int lane, int first) {
    codes.load(record, lane, first);
    load_words(scales, record + code_bytes(Bits) + (lane / 4 * Groups + (first * Groups >> 2)) * 4);
  }
  __device__ __forceinline__ void decode(uint32_t (&a)[4], uint32_t table, int lane, int pair,
                                         int odd) const {
    const uint32_t bytes = codes.bytes(pair, odd);
    const uint32_t both = scales[pair % kScales];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t at = j == 0 ? bytes << 7 : bytes >> (8 * j - 7);
      const uint32_t scale = permute_bytes(both, both, j & 1 ? 0x3232 : 0x1010);
      a[j] = multiply_pairs<T>(load_table(and_or(at, 0x7f80, lane * 4) + table), scale);
    }
  }
};

// 16 columns of 64 rows of x: for each 8 rows the two registers of a B operand.
struct XColumns {
  uint32_t fragment[8][2];

  // `at`: this lane's ldmatrix row. Rows 16 further lie `next` bytes further.
  __device__ __forceinline__ void load(uint32_t at, int next) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t r[4];
      load_matrices(r, at + i * next);
      fragment[2 * i][0] = r[0], fragment[2 * i][1] = r[1];
      fragment[2 * i + 1][0] = r[2], fragment[2 * i + 1][1] = r[3];
    }
  }
};

}  // namespace flute
