// y[n] = x[k] * w[n, k]^T for one row of x and scalar tables of 4 values, by binary products of bit
// planes: planes_operands.cuh.
//
// The decode kernel (decode.cuh) makes every weight a 16-bit float from a table in shared memory,
// which delivers 64 of them a clock and is the limit at 2 and 3 bits. Here no weight is looked up:
// shared memory has only codes, scales and planes of x. At 3 bits seven planes take longer than the
// table, and so does on most layers a second row of x at 2 bits (NOTES.md).
//
// A block computes a few 16-row tiles of w over its range of k, a cluster may split k, and warps
// form groups along the rows, all as in decode.cuh. But a warp takes one row tile after another,
// each over all of the warp's k, so that it has few sums in registers, and a multiprocessor 32
// warps. All x of the block's range is made into planes at the start: no warp waits for another
// until the end.
#pragma once

#include "decode_sums.cuh"
#include "planes_operands.cuh"

namespace flute {

template <int Bits_, typename T_>
struct PlaneShape {
  using T = T_;
  static constexpr int kBits = Bits_;
  static constexpr int kWarps = 32;
  static constexpr int kThreads = kWarps * 32;
  // What decode_launch.cuh asks of both kernels.
  static constexpr int kBlocks = 1, kHalves = 1, kMaxRows = 128;
  static constexpr bool kSmall = false;
  static constexpr int kDepth = 4;  // k tiles of a request and a step: whole lines of memory
  static constexpr int kRecord = record_bytes(Bits_, 1);
  static constexpr int kSlot = kDepth * kRecord;
  static constexpr int kStride = slot_stride(kSlot, kRecord);
  static __host__ __device__ constexpr int partial_tile(int m) { return m * kPartialColumn * 4; }
};

#if FLUTE_HAS_BULK
// The records of one warp on their way to shared memory, in the order of use: row tile by row tile,
// each along the warp's k tiles. Slots and barriers as in TileRing.
template <typename Shape>
struct RowRing {
  static constexpr uint32_t kUnits = Shape::kRecord / 16;
  static_assert(Shape::kSlot % kLine == 0);
  uint32_t barriers, slots_at;
  const uint8_t* records;
  uint32_t next;      // to request next, in 16 bytes from the first record
  uint32_t to_next;   // from a row tile's last step to the next row tile
  int k_tiles, left;  // of a row tile, and what is left of the one that is requested
  int rows;           // tiles not yet requested in full
  int slots, slot;
  uint32_t phase;
  uint32_t at_line, line;  // as in TileRing: the same for all requests, each of whole lines
  uint64_t policy;

  __device__ __forceinline__ RowRing(const DecodeParams& p, const WarpShare<Shape>& share,
                                     const BlockRows& block, uint32_t barriers_, uint32_t at)
      : barriers(barriers_), slots_at(at), records(p.records), slots(p.slots), slot(0), phase(0) {
    const uint32_t row_step = p.k_tiles * kUnits;
    k_tiles = left = share.end - share.begin;
    rows = k_tiles > 0 ? share.rows : 0;
    next = ((block.first_tile + share.first) * p.k_tiles + share.begin) * kUnits;
    to_next = row_step - share.steps * Shape::kDepth * kUnits;
    line = row_step % (kLine / 16) == 0 ? kLine - 1 : 0;
    at_line = next * 16 & line;
    policy = evict_first_policy();
  }
  __device__ __forceinline__ void request(int at) {
    if (rows == 0) return;
    if (elect_one())
      bulk_copy(slots_at + at * Shape::kStride + (next * 16 & line),
                records + static_cast<uint64_t>(next) * 16,
                min(left, Shape::kDepth) * Shape::kRecord, barriers + at * 8, policy);
    next += Shape::kDepth * kUnits, left -= Shape::kDepth;
    if (left <= 0) left = k_tiles, next += to_next, rows--;
  }
  __device__ __forceinline__ void start(int from, int to) {
#pragma unroll 1
    for (int i = from; i < to; i++) request(i);
  }
  __device__ __forceinline__ uint32_t wait() const {
    barrier_wait(barriers + slot * 8, phase);
    return slots_at + slot * Shape::kStride + at_line;
  }
  // After all lanes have used the slot.
  __device__ __forceinline__ void advance() {
    __syncwarp();
    request(slot);
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

// x over a block's k tiles, as planes in shared memory; the warps share the work.
template <typename Shape>
__device__ __forceinline__ void make_planes(const DecodeParams& p, uint32_t to, int first_tile,
                                            int k_tiles, int warp, int lane) {
  using Maker = PlaneMaker<typename Shape::T>;
  constexpr int kAtOnce = 2;  // k tiles that a warp has under way
  typename Maker::Columns x[kAtOnce];
  auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int tile = first + i * Shape::kWarps;
      const int k = (first_tile + tile) * kTileK + Maker::column(lane);
      x[i] = {};
      if (tile < k_tiles && k < p.k) x[i] = Maker::load(static_cast<const uint8_t*>(p.x) + 2 * k);
    }
  };
  load(warp);
  const Maker maker(lane);  // while x is on its way
#pragma unroll 1
  for (int first = warp; first < k_tiles; first += kAtOnce * Shape::kWarps) {
    if (first != warp) load(first);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int tile = first + i * Shape::kWarps;
      if (tile < k_tiles) maker.make(to + tile * PlaneX::kBytes, x[i]);
    }
  }
}
#endif

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    planes_kernel(const __grid_constant__ DecodeParams p) {
#if FLUTE_HAS_BULK
  extern __shared__ uint8_t shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = same_for_all(thread / 32);
  const int half = half_of_block(p, blockIdx.x >> p.splits_log2);
  const BlockRows block(p, row_block(p, blockIdx.x >> p.splits_log2));
  const WarpShare<Shape> share(p, block, warp);

  // Shared memory: barriers | x | partial sums | rings | room for sums of others.
  const uint32_t base = shared_address(shared);
  const uint32_t barriers = base + warp * kBarrierBytes, x_at = base + p.x_offset;
  auto partials_of = [&](int w) {
    return base + p.high_region + w * p.rows_each * Shape::partial_tile(p.m);
  };
  if (lane < p.slots) barrier_init(barriers + lane * 8, 1);
  barrier_init_fence();
  __syncwarp();
  // Weights and tables do not depend on the previous kernel, which may still run.
  RowRing<Shape> ring(p, share, block, barriers, base + p.first_region + warp * p.region_bytes);
  const int early = min(p.early_slots, p.slots);
  ring.start(0, early);
  Moebius<Shape::kBits> moebius;
  moebius.template load<typename Shape::T>(p.table +
                                           static_cast<int64_t>(block.part) * p.table_bytes);
  if (p.ranks_log2 > 0) {
    if (thread == 0) barrier_init(base + p.room_offset, 1);
    barrier_init_fence();
    cluster_arrive();
  }
  wait_for_previous_launch();
  allow_next_launch();
  const int split = blockIdx.x & (p.splits - 1);
  const int block_begin = p.k_tiles * split >> p.splits_log2;
  const int block_end = p.k_tiles * (split + 1) >> p.splits_log2;
  make_planes<Shape>(p, x_at, block_begin, block_end - block_begin, warp, lane);
  ring.start(early, p.slots);
  __syncthreads();

  const uint32_t x_first = x_at + (share.begin - block_begin) * PlaneX::kBytes;
  const int g = lane / 4, t = lane % 4;
  const float top = t == 3 ? -4 : 4;
#pragma unroll 1
  for (int r = 0; r < share.rows; r++) {
    PlaneSums sums;
    uint32_t x_tile = x_first;
    auto multiply_tile = [&](uint32_t record) {
      Codes<Shape::kBits> codes;
      codes.load(record, lane);
      const uint32_t scales = load_shared(record + code_bytes(Shape::kBits) + g * 4);
      const Planes<Shape::kBits> planes(codes);
      PlaneX x;
      x.load(x_tile, lane);
      multiply_planes<Shape>(sums, planes, scales, x, top, moebius);
      if (x.second_unit != 0) {
        x.load_second(x_tile, lane);
        multiply_planes<Shape>(sums, planes, scales, x, top, moebius);
      }
      x_tile += PlaneX::kBytes;
    };
#pragma unroll 1
    for (int left = share.end - share.begin; left > 0; left -= Shape::kDepth) {
      const uint32_t slot = ring.wait();
      if (left >= Shape::kDepth) {
#pragma unroll
        for (int d = 0; d < Shape::kDepth; d++) multiply_tile(slot + d * Shape::kRecord);
      } else {
#pragma unroll 1
        for (int d = 0; d < left; d++) multiply_tile(slot + d * Shape::kRecord);
      }
      ring.advance();
    }
    float y[2];
    sums.finish(y, moebius, t);
    if (t < 2)
      store_shared_float(partials_of(warp) + r * Shape::partial_tile(1) + (g + 8 * t) * 4,
                         t == 0 ? y[0] : y[1]);
  }
  p.ahead.ask(blockIdx.x, gridDim.x, warp, Shape::kWarps, lane);
  __syncthreads();
  finish_rows<Shape>(p, block, half, base, partials_of);
#endif
}

}  // namespace flute
