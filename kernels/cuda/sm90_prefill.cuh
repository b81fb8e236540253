// y[m, n] = x[m, k] * w[n, k]^T on Hopper for hundreds of rows of x and more, w in the internal
// layout.
//
// Here the tensor cores are the limit, and shared memory next to it: x is read from it for each 64
// rows of w, the table once for each weight and block. So a block computes as much as its registers
// hold, 256 rows of w by 128 or 192 of x: so often is each decoded weight used. Two warpgroups hold
// 128 rows of w each; while one half tile of 64 rows multiplies, the warpgroup decodes the next.
// Weights are rounded to 16 bits after scaling, as dequantize does.
#pragma once

#include "sm90_products.cuh"

namespace flute {

constexpr int kPrefillRows = 256;  // of w, in one round of a block
constexpr int kPrefillWarps = 8;
constexpr int kPrefillBarrierBytes = (kPrefillWarps * kMaxSlots + 2 * kMaxXStages) * 8;

// What a launch needs; filled by sm90_prefill_launch.cuh.
struct PrefillParams {
  const uint8_t* records;
  const uint8_t* table;
  void* y;
  int m, n, k_tiles;
  int table_bytes;  // of one part
  bool pair_table;
  int row_tiles;  // 16-row tiles of a block: 16 for each round
  int slots;      // requests of weights of a warp
  int x_stages;
  int x_offset;  // from the start of shared memory
  int first_block[FLUTE_MAX_PARTS + 1];
  Parts parts;
};

template <int Bits_, typename T_, int Columns_, int Groups_>
struct PrefillShape {
  using T = T_;
  static constexpr int kBits = Bits_;
  static constexpr int kColumns = Columns_;
  static constexpr int kGroups = Groups_;
  static constexpr int kThreads = kPrefillWarps * 32;
  static constexpr int kDepth = 2;  // k tiles of a request of weights
  static constexpr int kRows = 2;   // 64-row tiles of a warpgroup side by side
  static constexpr int kRecord = record_bytes(Bits_, Groups_);
  static constexpr int kSlot = kDepth * kRecord;
  static constexpr int kBoxBytes = Columns_ * kSwizzleRowBytes;
  static constexpr int kXBoxes = 1;
  static constexpr int kXStage = kBoxBytes;
};

#if FLUTE_HAS_WGMMA
// Two times 64 rows of w by kColumns rows of x.
template <typename Shape>
struct WideProducts {
  using T = typename Shape::T;
  float sums[2][Shape::kColumns / 2];
  uint32_t a[2][4][4];               // decoded, half a tile of each row
  uint32_t word[2][Shape::kGroups];  // scales

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 2; i++) sums[r][i] = 0;
  }

  // A k tile of both rows: `record(r)` says where its records are. `take` waits for the x of the
  // next half and returns its address, `multiplied` runs when the half before has been multiplied,
  // `decoded(r)` when the codes of a row have been used.
  template <typename Record, typename Take, typename Multiplied, typename Decoded>
  __device__ __forceinline__ void tile(const Decoder<Shape::kBits>& decoder, int lane,
                                       Record record, Take take, Multiplied multiplied,
                                       Decoded decoded) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t x = take();
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const uint32_t from = record(r);
        Codes<Shape::kBits> codes;
        if (half == 0) {
          const uint32_t at = from + code_bytes(Shape::kBits) + (lane / 4) * Shape::kGroups * 4;
#pragma unroll
          for (int i = 0; i < Shape::kGroups; i++) word[r][i] = load_shared(at + i * 4);
        }
        codes.load_half(from, half, lane);
        wgmma_wait<1>();  // the products that use a[r] are done
        if (r == 1) multiplied();
#pragma unroll
        for (int f = 0; f < 4; f += 2)
          decoder.decode(a[r][f], a[r][f + 1], codes, 2 * half + f / 2);
        apply_scales<T>(a[r], word[r], 4 * half);
        if (half == 1) decoded(r);
        multiply_box<T, Shape::kColumns>(sums[r], a[r], x, true);
      }
    }
  }
};
#endif

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    sm90_prefill_kernel(const __grid_constant__ PrefillParams p,
                        const __grid_constant__ CUtensorMap x_map) {
#if FLUTE_HAS_WGMMA
  using T = typename Shape::T;
  extern __shared__ uint8_t shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = __shfl_sync(~0u, thread / 32, 0);
  const int group = warp / 4, quarter = warp % 4;
  const int column0 = (blockIdx.z * gridDim.x + blockIdx.x) * Shape::kColumns;
  if (column0 >= p.m) return;
  const BlockRows block(p, blockIdx.y);
  const int rounds = ceil_div(block.tiles, kPrefillRows / kTileRows);
  // Row tile r of this warp and round: 64 rows of each of the two warpgroups, then again.
  auto tile_of = [&](int round, int r) { return round * 16 + r * 8 + group * 4 + quarter; };

  const uint8_t* part_table = p.table + static_cast<int64_t>(block.part) * p.table_bytes;
  TableFill<Shape::kBits, Shape::kThreads> fill;
  fill.load(part_table, p.pair_table);

  // Shared memory: barriers, rings of weights | table | x.
  const uint32_t base = shared_address(shared);
  const uint32_t table = (base + table_alignment(true) - 1) & ~(table_alignment(true) - 1u);
  const uint32_t tile_step = p.k_tiles * (Shape::kRecord / 16);
  RecordRing<Shape> ring;
  ring.barriers = base + warp * kMaxSlots * 8;
  ring.slots_at = base + kPrefillBarrierBytes + warp * p.slots * Shape::kSlot;
  ring.next = (block.first_tile + tile_of(0, 0)) * tile_step;
  ring.row_step = 8 * tile_step, ring.round_step = 15 * tile_step;
  ring.k_tiles = ring.k_left = p.k_tiles;
  ring.row = ring.slot = 0, ring.rounds_left = rounds;
  ring.tile = group, ring.tile_step = 2, ring.whole = (block.tiles - quarter + 3) / 4;
  ring.slots = p.slots, ring.phase = 0;
  ring.policy = evict_first_policy();

  XRing<Shape> x;
  x.filled = base + kPrefillWarps * kMaxSlots * 8, x.emptied = x.filled + kMaxXStages * 8;
  x.at = base + p.x_offset;
  x.map = &x_map, x.stages = p.x_stages, x.lag = 1;
  x.column = 0, x.row = column0, x.length = 2 * p.k_tiles;
  x.next = x.stage = x.refill = 0, x.phase = x.refill_phase = 0, x.left = rounds * x.length;
  const bool brings_x = warp == 0;

  if (lane < p.slots) barrier_init(ring.barrier(lane), 1);
  if (brings_x && lane == 0) {
    tensor_map_prefetch(&x_map);
    for (int i = 0; i < p.x_stages; i++) {
      barrier_init(x.filled + i * 8, 1);
      barrier_init(x.emptied + i * 8, kPrefillWarps);
    }
  }
  barrier_init_fence();
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < p.slots; i++) ring.request(p.records, i, lane);
  allow_next_launch();
  wait_for_previous_launch();
  if (brings_x) x.start(lane);
  fill.store(table);
  __syncthreads();  // barriers of x, and the table

  const Decoder<Shape::kBits> decoder(table, lane);
  WideProducts<Shape> products;
  T* y = static_cast<T*>(p.y) + static_cast<int64_t>(column0) * p.n + block.first_row;
  const int columns = min(Shape::kColumns, p.m - column0);
  for (int round = 0; round < rounds; round++) {
    products.clear();
#pragma unroll 1
    for (int k_tile = 0; k_tile < p.k_tiles; k_tile += 2) {
      const uint32_t slot0 = ring.take(), slot1 = ring.take_second();
      int taken = 0, before = 0;
      bool first = true;
      auto take = [&] {
        before = taken, taken = x.take();
        return x.address(taken);
      };
      auto record = [&](int r) { return r ? slot1 : slot0; };
      products.tile(
          decoder, lane, record, take,
          [&] {
            if (!first) x.release(before, lane, brings_x);
            first = false;
          },
          [](int) {});
      auto free_slot = [&](int) { ring.free(p.records, lane); };
      if (k_tile + 1 < p.k_tiles) {
        products.tile(
            decoder, lane, [&](int r) { return record(r) + Shape::kRecord; }, take,
            [&] { x.release(before, lane, brings_x); }, free_slot);
      } else {
        free_slot(0);
        free_slot(1);
      }
      wgmma_wait<0>();
      pin(products.sums[0]);
      pin(products.sums[1]);
      x.release(taken, lane, brings_x);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = tile_of(round, r) * kTileRows;
      write_sums(products.sums[r], y + row, p.n, block.rows - row, columns,
                 ((p.n | block.first_row | block.rows) & 1) == 0, lane);
    }
  }
#endif
}

}  // namespace flute
