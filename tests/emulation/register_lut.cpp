// Runs kernels/cuda/register_lut.cuh on the CPU: every code at every place of a nibble word, the
// bits above it at random, against the table itself. Exits with 0 when all agree.
#include <cuda_runtime.h>

#include <cstdio>
#include <random>

namespace flute {
uint8_t shared[1];
}

static dim3 threadIdx;

#include "register_lut.cuh"

namespace flute {

template <int Bits>
bool agrees(std::mt19937& rng) {
  constexpr int kCodes = 1 << Bits;
  alignas(4) uint16_t values[kCodes];
  for (uint16_t& value : values) value = rng();
  RegisterTable<Bits> table;
  table.load(values);
  for (int place = 0; place < 8; place++) {
    for (uint32_t code = 0; code < kCodes; code++) {
      const uint32_t nibbles = (rng() & ~((kCodes - 1u) << 4 * place)) | code << 4 * place;
      uint32_t a[4];
      table.decode(a, nibbles);
      for (int at = 0; at < 8; at++) {
        const uint16_t found = a[at / 2] >> (at % 2) * 16;
        if (found != values[nibbles >> 4 * at & (kCodes - 1)]) {
          printf("%d bits, nibbles %08x: place %d is %04x\n", Bits, nibbles, at, found);
          return false;
        }
      }
    }
  }
  return true;
}

}  // namespace flute

int main() {
  std::mt19937 rng(0);
  for (int i = 0; i < 100; i++)
    if (!flute::agrees<4>(rng) || !flute::agrees<3>(rng) || !flute::agrees<2>(rng)) return 1;
  return 0;
}
