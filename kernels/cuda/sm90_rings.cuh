// How weights and x stream into the shared memory of a block of the Hopper
// kernels.
#pragma once

#include "ring.cuh"
#include "wgmma.cuh"

namespace flute {

constexpr int kMaxXStages = 8;

#if FLUTE_HAS_WGMMA
// The records of one warp on their way, in the order of use: along k, then the
// next 64 rows.
template <typename Shape> struct RecordRing {
  uint32_t barriers, slots_at;
  const uint8_t *next; // to request next
  int64_t row_step;    // from the end of a row of tiles to the begin of this
                       // warp's next
  int k_tiles, k_left; // of a row of tiles
  int rows_left;
  uint64_t policy;

  __device__ __forceinline__ uint32_t barrier(int stage) const {
    return barriers + stage * 8;
  }
  __device__ __forceinline__ uint32_t slot(int stage) const {
    return slots_at + stage * Shape::kSlot;
  }
  __device__ __forceinline__ void request(int stage, int lane) {
    if (rows_left <= 0)
      return;
    const int bytes = k_left < Shape::kDepth ? Shape::kRecord : Shape::kSlot;
    if (lane == 0)
      bulk_copy(slot(stage), next, bytes, barrier(stage), policy);
    next += bytes, k_left -= Shape::kDepth;
    if (k_left <= 0)
      next += row_step, k_left = k_tiles, rows_left--;
  }
};

// x, as a warp that multiplies by it sees it, in stages of Shape::kXBoxes times
// 64 columns. One warp brings it.
template <typename Shape> struct XRing {
  uint32_t filled, emptied,
      at; // shared addresses: barriers, and the first stage
  const CUtensorMap *map;
  int stages, lag;
  int column, row;   // of the map: the first column and row of x
  int length;        // stages from the first column to the last
  int next, left;    // to request: which of them, and how many in all
  int stage, refill; // to use next, to fill next
  uint32_t phase, refill_phase;

  __device__ __forceinline__ void request(int to, int lane) {
    const uint32_t barrier = filled + to * 8, x = at + to * Shape::kXStage;
    if (lane == 0) {
      barrier_expect(barrier, Shape::kXStage);
#pragma unroll
      for (int i = 0; i < Shape::kXBoxes; i++)
        tensor_copy(x + i * Shape::kBoxBytes, map,
                    column + (next * Shape::kXBoxes + i) * kSwizzleColumns, row,
                    barrier);
    }
    left--;
    if (++next == length)
      next = 0;
  }
  __device__ __forceinline__ void start(int lane) {
    for (int i = 0; i < stages && left > 0; i++)
      request(i, lane);
  }
  // Waits for the next stage; returns it.
  __device__ __forceinline__ int take() {
    barrier_wait(filled + stage * 8, phase);
    const int taken = stage;
    if (++stage == stages)
      stage = 0, phase ^= 1;
    return taken;
  }
  __device__ __forceinline__ uint32_t address(int taken) const {
    return at + taken * Shape::kXStage;
  }
  // A warp has read a stage. The warp that brings x refills an earlier one, if
  // told to lag, so that it need not wait for the slowest warpgroup. All its
  // lanes wait: where one did, the compiler would take stages and addresses for
  // different in each lane.
  __device__ __forceinline__ void release(int taken, int lane, bool brings) {
    if (lane == 0)
      barrier_arrive(emptied + taken * 8);
    if (brings && lag-- <= 0 && left > 0) {
      barrier_wait(emptied + refill * 8, refill_phase);
      request(refill, lane);
      if (++refill == stages)
        refill = 0, refill_phase ^= 1;
    }
  }
};
#endif

} // namespace flute
