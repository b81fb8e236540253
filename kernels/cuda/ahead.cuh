// What a launch asks L2 to fetch while the GPU turns to the kernels that follow.
//
// Between two linear layers of a decoder run kernels that leave the memory idle: norms, attention,
// the activation. As its warps end, a GEMM asks for some of the next layer's weights, which then
// arrive meanwhile. A hint only: no result depends on whether, or what, L2 keeps.
#pragma once

#include "ptx.cuh"

namespace flute {

constexpr int kAheadChunk = 4096;  // bytes of one request

// Chunks spread evenly over the records of the next layer, so that all of its blocks gain alike:
// each block reads a share of its own, and the last one to end decides.
struct Ahead {
  const uint8_t* from;
  uint32_t chunks, stride;  // bytes from one chunk to the next
  int first_block;          // of those that ask: the last round of blocks

  // A warp's share; once, after its last request for weights of its own.
  __device__ __forceinline__ void ask(int block, int blocks, int warp, int warps, int lane) const {
#if FLUTE_HAS_BULK
    block -= first_block, blocks -= first_block;
    // Neighbouring chunks are asked for by different blocks at about the same time.
    const uint32_t chunk = (lane * warps + warp) * blocks + block;
    if (block >= 0 && chunk < chunks)
      prefetch_bulk(from + static_cast<uint64_t>(chunk) * stride, kAheadChunk);
#endif
  }
};

}  // namespace flute
