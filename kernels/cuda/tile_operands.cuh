// Operands of the tile kernel: 16 columns at a time, from codes and scales in shared memory to
// scaled weights (the A operand), and from x in shared memory to the B operand.
#pragma once

#include "lut.cuh"

namespace flute {

// What a lane needs of 16 rows x 32 columns, a pair of fragments, of a record: codes and scales.
// `pair` is 0..3 and the same for all lanes.
template <int Bits>
struct PairCodes;

template <>
struct PairCodes<4> {
  uint32_t word[2];
  __device__ __forceinline__ void load(uint32_t record, int lane, int pair) {
    const uint2 q = load_shared2(record + (pair >> 1) * 512 + lane * 16 + (pair & 1) * 8);
    word[0] = q.x, word[1] = q.y;
  }
  __device__ __forceinline__ uint32_t nibbles(int odd) const { return word[odd]; }
};

// At 3 and 2 bits the rest of a nibble is another fragment's; the table does not depend on it.
template <>
struct PairCodes<3> {
  uint32_t low, high;  // bit 2 of a nibble of `high` is that of the even fragment's code
  __device__ __forceinline__ void load(uint32_t record, int lane, int pair) {
    low = load_shared(record + lane * 16 + pair * 4);
    high = load_shared(record + 512 + lane * 8 + (pair >> 1) * 4) << (pair & 1 ? 0 : 2);
  }
  __device__ __forceinline__ uint32_t nibbles(int odd) const {
    return odd ? select_bits(low >> 2, high >> 1, 0x33333333u)
               : select_bits(low, high, 0x33333333u);
  }
};

template <>
struct PairCodes<2> {
  uint32_t word;
  __device__ __forceinline__ void load(uint32_t record, int lane, int pair) {
    word = load_shared(record + lane * 16 + pair * 4);
  }
  __device__ __forceinline__ uint32_t nibbles(int odd) const { return odd ? word >> 2 : word; }
};

// Makes A operands through a narrow table: it leaves room for two more steps of x than a wide one,
// and one kind of table serves every device. The table's address is added rather than merged, so
// that it needs no alignment, which would cut shared memory in two.
template <int Bits, typename T>
struct Weights {
  PairCodes<Bits> codes;
  uint32_t scales;  // of rows g (low half) and g + 8

  __device__ __forceinline__ void load(uint32_t record, int groups, int lane, int pair) {
    codes.load(record, lane, pair);
    scales =
        load_shared(record + code_bytes(Bits) + ((lane / 4) * groups + (pair * groups >> 2)) * 4);
  }
  __device__ __forceinline__ void decode(uint32_t (&a)[4], uint32_t table, int lane,
                                         int odd) const {
    const uint32_t nibbles = codes.nibbles(odd);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t at = j == 0 ? nibbles << 7 : nibbles >> (8 * j - 7);
      const uint32_t scale = permute_bytes(scales, scales, j & 1 ? 0x3232 : 0x1010);
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
