// Runs the decoding of lut.cuh on the CPU: records filled bit by bit as layout.cuh says, read by
// Codes and decoded through the shared table that TableFill writes; and the same codes as nibble
// words, for the table in registers. Exits with 0 when every weight is the table's.
#include <cuda_runtime.h>

#include <cstdio>
#include <random>

static dim3 threadIdx;

#include "register_lut.cuh"

namespace flute {

constexpr uint32_t kTableAt = 0x10000, kRecordAt = 2 * kTableAt;
uint8_t shared[kRecordAt + 2048];

std::mt19937 rng(0);

template <int Bits>
bool agrees(bool pairs) {
  constexpr int kCodes = 1 << Bits, kThreads = 128;
  alignas(4) uint16_t values[2 * kCodes * kCodes];
  for (uint16_t& value : values) value = rng();
  shared_size = sizeof(shared);
  for (threadIdx.x = 0; threadIdx.x < kThreads; threadIdx.x++) {
    TableFill<Bits, kThreads, true> fill;
    fill.load(values, pairs);
    fill.store(kTableAt, pairs);
  }

  static uint32_t code[32][kFragments][8];
  uint8_t* bytes = at_shared(kRecordAt, 1);
  memset(bytes, 0, code_bytes(Bits));
  for (int lane = 0; lane < 32; lane++)
    for (int f = 0; f < kFragments; f++)
      for (int n = 0; n < 8; n++) {
        code[lane][f][n] = rng() % kCodes;
        for (int b = 0; b < Bits; b++) {
          const int bit = code_bit(Bits, lane, f, n, b);
          const int set = code[lane][f][n] >> b & 1;
          if (bytes[bit / 8] >> bit % 8 & 1) {
            printf("%d bits: two codes share bit %d\n", Bits, bit);
            return false;
          }
          bytes[bit / 8] |= set << bit % 8;
        }
      }

  for (int lane = 0; lane < 32; lane++) {
    Codes<Bits> codes, halves;
    codes.load(kRecordAt, lane);
    for (int half = 0; half < 2; half++) halves.load_half(kRecordAt, half, lane);
    const Decoder<Bits> decoder(kTableAt, lane);
    const Nibbles<Bits> nibbles[2] = {{codes, 0}, {codes, 1}};
    const Nibbles<Bits> of_halves[2] = {{halves, 0}, {halves, 1}};
    for (int f = 0; f < kFragments; f++) {
      uint32_t a[2][4];
      decoder.decode(a[0], a[1], codes, f / 2);
      for (int n = 0; n < 8; n++) {
        const uint32_t* of = code[lane][f];
        const uint32_t low = of[n & ~1], high = of[n | 1];
        const uint16_t wanted = pairs ? values[2 * (low << Bits | high) + n % 2] : values[of[n]];
        const uint16_t found = a[f % 2][n / 2] >> n % 2 * 16;
        if (found != wanted || (nibbles[f / 4].word[f % 4] >> 4 * n & (kCodes - 1)) != of[n] ||
            (of_halves[f / 4].word[f % 4] >> 4 * n & (kCodes - 1)) != of[n]) {
          printf("%d bits, lane %d, fragment %d, code %d\n", Bits, lane, f, n);
          return false;
        }
      }
    }
  }
  return true;
}

}  // namespace flute

int main() {
  for (int i = 0; i < 6; i++)
    if (!flute::agrees<4>(i % 2) || !flute::agrees<3>(i % 2) || !flute::agrees<2>(i % 2)) return 1;
  return 0;
}
