// Runs kernels/cuda/cluster_sums.cuh on the CPU: for random numbers of sums and clusters of 2, 4
// and 8 blocks, every sum is finished once, with the part of each block; every part is sent once,
// to a place of its own in the other block's room; and what a block expects is what comes. Exits
// with 0 when all agree.
#include "cluster_sums.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <random>

namespace flute {

inline float part_of(int rank, int i, float) {
  return rank * 65536.f + i;
}
inline float4 part_of(int rank, int i, float4) {
  const float v = rank * 65536.f + i;
  return make_float4(v, v + .25f, v + .5f, v + .75f);
}
inline bool equal(float a, float b) {
  return a == b;
}
inline bool equal(float4 a, float4 b) {
  return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w;
}

template <typename Value, int Threads>
bool holds(int count, int ranks_log2) {
  const int ranks = 1 << ranks_log2;
  std::vector<int> finished(count);
  wrong = false;
  for (Member& block : members) block = Member();
  auto each_thread = [&](auto visit) {
    for (running = 0; running < ranks; running++) {
      const ClusterSums<Value, Threads> sums{kBarrier, kRoom, count, ranks_log2, running};
      for (threadIdx.x = 0; threadIdx.x < Threads; threadIdx.x++) visit(sums);
    }
  };
  each_thread(
      [&](const auto& sums) { sums.send([&](int i) { return part_of(running, i, Value()); }); });
  each_thread([&](const auto& sums) {
    sums.finish([&](int i, auto part) {
      finished[i]++;
      for (int from = 0; from < ranks; from++)
        if (from != running) wrong |= !equal(part(from), part_of(from, i, Value()));
    });
  });
  const uint32_t end = kRoom + cluster_room(count, Threads, sizeof(Value), ranks_log2);
  for (const Member& block : members)
    for (const auto& [at, value] : block.words) wrong |= at < kRoom || at + 4 > end;
  for (int times : finished) wrong |= times != 1;
  return !wrong;
}

}  // namespace flute

int main() {
  std::mt19937 rng(0);
  for (int i = 0; i < 150; i++) {
    const int count = 1 + rng() % 5000, ranks_log2 = 1 + rng() % 3;
    if (flute::holds<float, 512>(count, ranks_log2) &&
        flute::holds<float, 256>(count, ranks_log2) &&
        flute::holds<float4, 512>(count, ranks_log2) &&
        flute::holds<float4, 1024>(count, ranks_log2))
      continue;
    printf("%d sums, 2^%d blocks\n", count, ranks_log2);
    return 1;
  }
  return 0;
}
