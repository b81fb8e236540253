// From codes to tensor-core operands through a table.
//
// A 16-bit table of values becomes a table of pairs in shared memory, so one 4-byte load makes two
// weights: exactly one A register. Entry i is repeated in 32 words, one for each bank; lane l reads
// only bank l, so no access conflicts whatever the codes are. Shared memory delivers 64 weights a
// clock this way; streaming 4.4 TB/s takes 34 (4 bits), 45 (3 bits) or 67 (2 bits) of an H200 SM.
//
// Rows of 256 bytes at a multiple of 64 KiB make the index a byte of the address: one PRMT both
// extracts it and adds the lane's offset. With shifts and masks instead, a 4-bit tile took 176
// instructions rather than 130, and instruction issue, not memory, was the limit (NOTES.md).
#pragma once

#include "layout.cuh"
#include "ptx.cuh"

namespace flute {

constexpr int kTableEntries = 256;
// The system's share at the start of a block's memory. Where tables lie is counted from its end, so
// no kernel that has one may have shared memory of its own besides what the launch gives it.
constexpr int kSharedReserved = 1024;

// Wide rows need 128 KiB of shared memory; sm_86, sm_89 and sm_120 have 100.
__host__ __device__ constexpr bool has_wide_table(int arch) {
  return arch == 80 || arch == 87 || (arch >= 90 && arch < 120);
}
#ifdef __CUDA_ARCH__
constexpr bool kWideTable = has_wide_table(__CUDA_ARCH__ / 10);
#else
constexpr bool kWideTable = true;  // host code asks has_wide_table
#endif
// The index is bits 8..15 of a wide table's address, 7..14 of a narrow one's: free in its start.
__host__ __device__ constexpr uint32_t table_alignment(bool wide) {
  return wide ? 0x10000 : 0x8000;
}
__host__ __device__ constexpr int table_row(bool wide) {
  return wide ? 256 : 128;
}
__host__ __device__ constexpr int table_bytes(bool wide) {
  return kTableEntries * table_row(wide);
}

// Writes the shared table, all threads together, from a part's global table. In two steps, so that
// other requests can be made while the global loads are under way.
//
// Eight threads write an entry, and then those Threads / 8 entries further. What this adds to an
// entry are bits that the first one lacks, so each code is that of the first entry plus a constant:
// few loads, at constant distances, and few instructions, which a kernel that starts must fetch
// first (NOTES.md). TwoPairs: an entry has the pairs of two registers, eight bytes.
template <int Bits, int Threads, bool Wide = kWideTable, bool TwoPairs = Bits == 2>
struct TableFill {
  static constexpr int kStores = kTableEntries * 8 / Threads;
  static_assert(Threads >= 128 && (Threads & (Threads - 1)) == 0);

  struct Pairs {
    uint32_t low[kStores], high[kStores];  // values; of a pair table only `high`: whole pairs
    __device__ __forceinline__ void load(const void* table, bool pairs, bool odd) {
      const uint32_t entry = threadIdx.x / 8, first = code_of_byte<Bits>(entry, 0, odd),
                     second = code_of_byte<Bits>(entry, 1, odd);
#pragma unroll
      for (int i = 0; i < kStores; i++) {
        const uint32_t low_on = code_of_byte<Bits>(i * Threads / 8, 0, odd),
                       on = code_of_byte<Bits>(i * Threads / 8, 1, odd);
        if (pairs) {
          high[i] = __ldg(static_cast<const uint32_t*>(table) + (first << Bits) + second +
                          (low_on << Bits) + on);
        } else {
          const uint16_t* values = static_cast<const uint16_t*>(table);
          low[i] = __ldg(values + first + low_on), high[i] = __ldg(values + second + on);
        }
      }
    }
    __device__ __forceinline__ uint32_t word(int i, bool pairs) const {
      return pairs ? high[i] : low[i] | high[i] << 16;
    }
  };
  Pairs first;
  Pairs second;  // of the other register

  // At 3 bits the nibbles' fourth bits are another fragment's, at 2 bits, without TwoPairs, half of
  // the bits another register's: the entries do not depend on them.
  __device__ __forceinline__ void load(const void* table, bool pairs) {
    first.load(table, pairs, false);
    if constexpr (TwoPairs) second.load(table, pairs, true);
  }
  // A 16-byte store repeats an entry; eight lanes write a row.
  __device__ __forceinline__ void store(uint32_t to, bool pairs) const {
    to += threadIdx.x / 8 * table_row(Wide) + threadIdx.x % 8 * 16;
#pragma unroll
    for (int i = 0; i < kStores; i++) {
      const uint32_t one = first.word(i, pairs);
      const uint32_t two = TwoPairs ? second.word(i, pairs) : one;
      store_shared4(to + i * (Threads / 8) * table_row(Wide), make_uint4(one, two, one, two));
    }
  }
};

// One, two or four words side by side in shared memory.
template <int Words>
__device__ __forceinline__ void load_words(uint32_t (&word)[Words], uint32_t at) {
  if constexpr (Words == 1) {
    word[0] = load_shared(at);
  } else if constexpr (Words == 2) {
    const uint2 q = load_shared2(at);
    word[0] = q.x, word[1] = q.y;
  } else {
    const uint4 q = load_shared4(at);
    word[0] = q.x, word[1] = q.y, word[2] = q.z, word[3] = q.w;
  }
}

// Words of index bytes that are not stored as such. At 2 bits: of the first or second fragment of a
// word.
__device__ __forceinline__ uint32_t bytes_of_2(uint32_t word, bool second) {
  return permute_bytes(word, word >> 2, second ? 0x7362 : 0x5140);
}
// At 3 bits: of the fragment that lies in bit 3 of the nibbles of three others.
__device__ __forceinline__ uint32_t spare_bytes(const uint32_t (&word)[3]) {
  const uint32_t two = select_bits(word[0] >> 3, word[1] >> 2, 0x11111111u);
  return select_bits(two, word[2] >> 1, 0x33333333u);
}

__device__ __forceinline__ void load_half_of_3(uint32_t (&word)[3], uint32_t record, int half,
                                               int lane) {
  const uint2 q = load_shared2(record + lane * 16 + half * 8);
  word[0] = q.x, word[1] = q.y, word[2] = load_shared(record + 512 + lane * 8 + half * 4);
}

// The codes of one tile that a lane holds, read from a record in shared memory.
template <int Bits>
struct Codes;

template <>
struct Codes<4> {
  uint32_t word[8];
  __device__ __forceinline__ void load(uint32_t record, int lane) {
#pragma unroll
    for (int v = 0; v < 2; v++) {
      const uint4 q = load_shared4(record + v * 512 + lane * 16);
      word[4 * v] = q.x, word[4 * v + 1] = q.y, word[4 * v + 2] = q.z, word[4 * v + 3] = q.w;
    }
  }
  // Only fragments 4 * half .. 4 * half + 3.
  __device__ __forceinline__ void load_half(uint32_t record, int half, int lane) {
    const uint4 q = load_shared4(record + half * 512 + lane * 16);
    word[4 * half] = q.x, word[4 * half + 1] = q.y, word[4 * half + 2] = q.z;
    word[4 * half + 3] = q.w;
  }
  __device__ __forceinline__ uint32_t bytes(int f) const { return word[f]; }
};

template <>
struct Codes<2> {
  uint32_t word[4];
  __device__ __forceinline__ void load(uint32_t record, int lane) {
    const uint4 q = load_shared4(record + lane * 16);
    word[0] = q.x, word[1] = q.y, word[2] = q.z, word[3] = q.w;
  }
  __device__ __forceinline__ void load_half(uint32_t record, int half, int lane) {
    const uint2 q = load_shared2(record + lane * 16 + half * 8);
    word[2 * half] = q.x, word[2 * half + 1] = q.y;
  }
  __device__ __forceinline__ uint32_t bytes(int f) const { return bytes_of_2(word[f / 2], f & 1); }
};

template <>
struct Codes<3> {
  uint32_t word[2][3];
  __device__ __forceinline__ void load(uint32_t record, int lane) {
    const uint4 q = load_shared4(record + lane * 16);
    const uint2 r = load_shared2(record + 512 + lane * 8);
    word[0][0] = q.x, word[0][1] = q.y, word[0][2] = r.x;
    word[1][0] = q.z, word[1][1] = q.w, word[1][2] = r.y;
  }
  __device__ __forceinline__ void load_half(uint32_t record, int half, int lane) {
    load_half_of_3(word[half], record, half, lane);
  }
  __device__ __forceinline__ uint32_t bytes(int f) const {
    return f % 4 < 3 ? word[f / 4][f % 4] : spare_bytes(word[f / 4]);
  }
};

// Makes A operands, two fragments at a time. Taking some values from registers with PRMT instead,
// to relieve shared memory, gained nothing that a branch for pair tables left (NOTES.md). `At`:
// what the compiler knows of the table's address and adds in the load; the rest must have bits 8 to
// 15 free, as above.
template <int Bits, int At = 0>
struct Decoder {
  uint32_t lane_table;

  __device__ __forceinline__ Decoder(uint32_t table, int lane)
      // At 2 bits a row is 16 copies of two pairs: lanes l and l + 16 read in different passes.
      : lane_table(table + (Bits == 2 ? lane % 16 * 8 : lane * 4)) {}

  // Fragments 2 * p and 2 * p + 1.
  __device__ __forceinline__ void decode(uint32_t (&even)[4], uint32_t (&odd)[4],
                                         const Codes<Bits>& codes, int p) const {
    if constexpr (Bits == 2) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint2 both = load_table2<At>(address(codes.word[p], j));
        uint32_t* to = (j < 2 ? even : odd) + j % 2 * 2;
        to[0] = both.x, to[1] = both.y;
      }
    } else {
      const uint32_t first = codes.bytes(2 * p), second = codes.bytes(2 * p + 1);
#pragma unroll
      for (int j = 0; j < 4; j++) even[j] = load_table<At>(address(first, j));
#pragma unroll
      for (int j = 0; j < 4; j++) odd[j] = load_table<At>(address(second, j));
    }
  }

 private:
  // The table entry that register j's byte of a word names.
  __device__ __forceinline__ uint32_t address(uint32_t bytes, int j) const {
    if constexpr (kWideTable) return permute_bytes(bytes, lane_table, 0x7604 | j << 4);
    return and_or(j == 0 ? bytes << 7 : bytes >> (8 * j - 7), 0x7f80, lane_table);
  }
};

}  // namespace flute
