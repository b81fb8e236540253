// Runs kernels/cuda/sm90_prefill_work.cuh on the CPU: for random problems and launches that spread
// k, every k tile of every tile of y belongs to one block; each block that does not begin its tile
// gives its sums once, to the block that does, which the device starts later. Exits with 0 when all
// agree.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <random>

#undef __device__
#undef __forceinline__
#define __device__
#define __forceinline__ inline
static dim3 gridDim, blockIdx;

namespace flute {
using std::max;
using std::min;
}  // namespace flute

#include "sm90_prefill_work.cuh"

namespace flute {

bool holds(std::mt19937& rng) {
  auto any = [&](int from, int to) { return from + static_cast<int>(rng() % (to - from + 1)); };
  constexpr int kColumns = 256;
  PrefillParams p{};
  const int blocks_of_rows = any(1, 200);
  p.k_tiles = any(1, 100), p.x_tiles = any(1, 20),
  p.side = ceil_div(p.x_tiles, ceil_div(p.x_tiles, 8));
  p.parts.count = 1, p.first_block[1] = blocks_of_rows;
  p.tiles = p.x_tiles * blocks_of_rows;
  uint32_t flags = 0;
  gridDim.x = spread_k(p, any(8, 140), nullptr, &flags);
  std::map<std::pair<int, int>, int> computed;  // of (tile of y, k tile)
  std::map<int, int> given, taken;              // block that gives sums -> block with the tile
  for (unsigned b = 0; b < gridDim.x; b++) {
    blockIdx.x = b;
    for (int round = 0;; round++) {
      const Work work(p, round, kColumns);
      if (!work.exists) break;
      const int tile = work.block * p.x_tiles + work.column0 / kColumns;
      if (work.begin >= work.end || work.block >= blocks_of_rows) return false;
      for (int k = work.begin; k < work.end; k++)
        if (computed[{tile, k}]++) return false;
      if (!work.spread) continue;
      const SpreadSums sums{p, work, 0, 1};
      if (work.begin > 0) {
        if (!given.emplace(sums.slot(work.place), tile).second) return false;
        continue;
      }
      int last = work.place;
      bool good = true;
      sums.for_each_other([&](int place) {
        good &= place > last && taken.emplace(sums.slot(place), tile).second;
        last = place;
      });
      if (!good) return false;
    }
  }
  return computed.size() == static_cast<size_t>(p.tiles) * p.k_tiles && given == taken;
}

}  // namespace flute

int main() {
  std::mt19937 rng(0);
  for (int i = 0; i < 400; i++) {
    if (flute::holds(rng)) continue;
    printf("case %d\n", i);
    return 1;
  }
  return 0;
}
