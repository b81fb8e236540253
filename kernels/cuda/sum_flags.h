// Flags by which blocks of a launch tell one another that partial sums are in global memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flute {

// `count` flags for a launch on `stream` of the current device: 0 before it, and left so by it.
// Launches that may run at the same time get different ones, as every stream has its own, and every
// capture, whose graph may be replayed on any stream. Null where there are no more: the launch must
// do without, and stderr has said so once. Returns 0 or a CUDA error.
//
// A stream is known by its handle (with cudaStreamGetId here, captures failed with CUDA error 900):
// one that is destroyed while it has work must not be followed by another with the same handle.
int sum_flags(int count, cudaStream_t stream, uint32_t** flags);

}  // namespace flute
