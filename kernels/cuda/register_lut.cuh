// From codes to tensor-core operands through a table that lies in registers.
//
// Eight bytes are what one PRMT can choose from, so the values are kept as low bytes and high
// bytes: a lookup of four codes takes a PRMT for each half of a table of 16 values and each kind of
// byte, a choice between the halves by the codes' top bits, and two PRMTs that join the bytes. At 4
// bits that is ten integer instructions for four weights, where the table in shared memory
// (lut.cuh) takes two PRMTs and two loads; it needs no shared memory, which the prefill kernel
// spends on x instead, and nothing to be filled at the start.
#pragma once

#include "lut.cuh"

namespace flute {

// Selectors for PRMT: half of a tile's codes as nibbles.
template <int Bits>
struct Nibbles {
  uint32_t word[4];

  __device__ __forceinline__ Nibbles(const Codes<Bits>& codes, int half) {
#pragma unroll
    for (int f = 0; f < 4; f++) {
      if constexpr (Bits > 2) {
        word[f] = codes.bytes(4 * half + f);
      } else {
        // Bit 4 b + 2 odd + e of a byte to 4 e + 2 odd + b.
        const uint32_t stored = codes.word[2 * half + f / 2];
        const uint32_t differ = (stored ^ stored >> 3) & 0x0a0a0a0au;
        word[f] = bytes_of_2(stored ^ differ ^ differ << 3, f & 1);
      }
    }
  }
};

// A scalar table of 2^Bits values of 16 bits.
template <int Bits>
struct RegisterTable {
  static constexpr int kWords = (1 << Bits) / 4;
  uint32_t low[kWords], high[kWords];  // bytes of values 4 i .. 4 i + 3

  // The address must look different in each lane. Where the compiler knows that it is not, it keeps
  // half of the table in uniform registers and moves it back for every PRMT: one instruction in
  // seven of the main loop.
  __device__ __forceinline__ void load(const void* table) {
    const uint32_t* pairs = static_cast<const uint32_t*>(table) + zero_in_each_lane();
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      const uint32_t first = __ldg(pairs + 2 * i), second = __ldg(pairs + 2 * i + 1);
      low[i] = permute_bytes(first, second, 0x6420);
      high[i] = permute_bytes(first, second, 0x7531);
    }
  }

  // The four registers of a fragment from its word of nibbles. Bits of a nibble above the code may
  // be anything.
  __device__ __forceinline__ void decode(uint32_t (&a)[4], uint32_t nibbles) const {
    const uint32_t selectors = nibbles & (Bits == 2 ? 0x33333333u : 0x77777777u);
    const uint32_t shifted = Bits == 4 ? nibbles << 4 : 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t selector = half ? selectors >> 16 : selectors;
      uint32_t lows, highs;
      if constexpr (Bits == 4) {
        // A byte of ones for each code of 8 and more: PRMT's sign mode spreads the top bits.
        const uint32_t upper = permute_bytes(shifted, nibbles, half ? 0xfbea : 0xd9c8);
        lows = select_bits(permute_bytes(low[2], low[3], selector),
                           permute_bytes(low[0], low[1], selector), upper);
        highs = select_bits(permute_bytes(high[2], high[3], selector),
                            permute_bytes(high[0], high[1], selector), upper);
      } else {
        lows = permute_bytes(low[0], low[kWords - 1], selector);
        highs = permute_bytes(high[0], high[kWords - 1], selector);
      }
      a[2 * half] = permute_bytes(lows, highs, 0x5140);
      a[2 * half + 1] = permute_bytes(lows, highs, 0x7362);
    }
  }
};

}  // namespace flute
