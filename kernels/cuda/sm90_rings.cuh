// How weights and x stream into the shared memory of a block of the Hopper kernels.
#pragma once

#include "ring.cuh"
#include "wgmma.cuh"

namespace flute {

constexpr int kMaxXStages = 8;

#if FLUTE_HAS_WGMMA
// The records of one warp on their way, in the order of use: the k tiles of a row tile, some a
// request, then those of the next round's. A slot takes one request.
template <typename Shape>
struct RecordRing {
  uint32_t barriers, slots_at;
  // Places are in 16 bytes from the first record: few enough registers to keep them uniform.
  uint32_t next;        // of the next k tiles
  uint32_t round_step;  // from behind the last k tile to the next round's first
  int k_tiles, k_left;  // of a row tile
  int rounds_left;      // to request
  int tile, tile_step;  // the block's 64-row tile that holds the row tile, how far to the next
  int whole;            // 64-row tiles that hold rows of this warp; the last may not
  int slots, slot;      // how many, and which is next to use
  uint32_t phase;
  uint64_t policy;

  __device__ __forceinline__ uint32_t barrier(int at) const { return barriers + at * 8; }
  __device__ __forceinline__ void request(const uint8_t* records, int at) {
    if (rounds_left <= 0) return;
    // Conditions on the lane come last: inside them the compiler takes all values for different in
    // each lane, and no longer keeps addresses in uniform registers.
    const int bytes = k_left < Shape::kDepth ? Shape::kRecord : Shape::kSlot;
    if (tile < whole) {
      const uint8_t* from = records + static_cast<uint64_t>(next) * 16;
      if (elect_one()) bulk_copy(slots_at + at * Shape::kSlot, from, bytes, barrier(at), policy);
    } else {
      if (elect_one()) barrier_arrive(barrier(at));  // a missing row tile takes its turn, too
    }
    next += bytes / 16, k_left -= Shape::kDepth;
    if (k_left <= 0) next += round_step, k_left = k_tiles, rounds_left--, tile += tile_step;
  }
  // Waits for the next slot; returns its address.
  __device__ __forceinline__ uint32_t take() const {
    barrier_wait(barrier(slot), phase);
    return slots_at + slot * Shape::kSlot;
  }
  // After all codes of the next slot have been used.
  __device__ __forceinline__ void free(const uint8_t* records) {
    __syncwarp();
    request(records, slot);
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

// x, as a warp that multiplies by it sees it, in stages of Shape::kXBoxes times 64 columns. One
// warp brings it.
template <typename Shape>
struct XRing {
  uint32_t filled, emptied, at;  // shared addresses: barriers, and the first stage
  uint32_t first_descriptor;     // of the first stage
  const CUtensorMap* map;
  int stages, lag;
  int column, row;    // of the map: the first column and row of x
  int length;         // stages from the first column to the last
  int next, left;     // to request: which of them, and how many in all
  int stage, refill;  // to use next, to fill next
  uint32_t phase, refill_phase;

  __device__ __forceinline__ void request(int to) {
    const uint32_t barrier = filled + to * 8, x = at + to * Shape::kXStage;
    if (elect_one()) {
      barrier_expect(barrier, Shape::kXStage);
#pragma unroll
      for (int i = 0; i < Shape::kXBoxes; i++)
        tensor_copy(x + i * Shape::kBoxBytes, map,
                    column + (next * Shape::kXBoxes + i) * kSwizzleColumns, row, barrier);
    }
    left--;
    if (++next == length) next = 0;
  }
  __device__ __forceinline__ void start() {
    for (int i = 0; i < stages && left > 0; i++) request(i);
  }
  // Waits for the next stage; returns it.
  __device__ __forceinline__ int take() {
    barrier_wait(filled + stage * 8, phase);
    const int taken = stage;
    if (++stage == stages) stage = 0, phase ^= 1;
    return taken;
  }
  __device__ __forceinline__ uint32_t descriptor(int taken) const {
    return first_descriptor + taken * (Shape::kXStage >> kDescriptorShift);
  }
  // A warp has read a stage. The warp that brings x refills an earlier one, if told to lag, so that
  // it need not wait for the slowest warpgroup. All its lanes wait: where one did, the compiler
  // would take stages and addresses for different in each lane.
  __device__ __forceinline__ void release(int taken, int lane, bool brings) {
    if (lane == 0) barrier_arrive(emptied + taken * 8);
    if (brings && lag-- <= 0 && left > 0) {
      barrier_wait(emptied + refill * 8, refill_phase);
      request(refill);
      if (++refill == stages) refill = 0, refill_phase ^= 1;
    }
  }
};
#endif

}  // namespace flute
