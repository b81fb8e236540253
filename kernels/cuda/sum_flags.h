// Flags by which the blocks of a launch tell each other that partial sums are in global memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flute {

constexpr int kSumFlags = 512;  // of a launch

// The flags for a launch on `stream` of the current device, all 0 and left so when it has ended.
// Launches that may run at the same time get different ones: every stream has its own, and every
// capture, as a graph may be replayed on any stream.
int sum_flags(int device, cudaStream_t stream, uint32_t** flags);

}  // namespace flute
