// y[m, n] = x[m, k] * w[n, k]^T on Hopper for 9 to a few hundred rows of x, w in the internal
// layout.
//
// As in decode.cuh, a block computes a few 16-row tiles of w, its warps stream their own records,
// and a cluster of blocks may split k. What differs is the product: a warpgroup multiplies 64 rows
// of w, decoded into registers, by up to 128 rows of x that wgmma reads from shared memory by
// itself. So x costs no instruction and no register; with mma.sync, loading it into every warp was
// the limit from 16 rows on (benchmarks/NOTES.md).
//
// A warpgroup decodes one half of a 64 x 128 tile while the tensor cores multiply the other; the
// others of the block, four or eight in all, fill the gaps. They form row groups, and within one
// they split k. All sums are in a fixed order.
#pragma once

#include "activation.cuh"
#include "ahead.cuh"
#include "cluster_sums.cuh"
#include "sm90_products.cuh"

namespace flute {

constexpr int kPartialPad = 4;  // floats after a column of 16 sums; avoids bank conflicts

// Barriers of a block: of each warp's ring, then of each k group's x, filled and emptied.
constexpr int sm90_x_barriers(int warpgroups) {
  return warpgroups * 4 * kMaxSlots * 8;
}
constexpr int sm90_barrier_bytes(int warpgroups) {
  return sm90_x_barriers(warpgroups) + warpgroups * kMaxXStages * 2 * 8;
}

// Bytes of a warp's sums in shared memory.
constexpr int sm90_partial_bytes(int columns) {
  return columns * (kTileRows + kPartialPad) * 4;
}

// What a launch needs; filled by sm90_launch.cuh from FluteMatrix and FluteSm90Config.
struct Sm90Params {
  const uint8_t* records;
  const uint8_t* table;
  void* y;
  int m, n, k_tiles;  // n: columns of y
  int activation;     // of a gated launch, else 0
  int table_bytes;    // of one part
  bool pair_table;
  int row_tiles;                       // 16-row tiles of a block
  int row_groups_log2, k_groups_log2;  // of warpgroups
  int splits_log2;
  int ranks_log2;                 // blocks of a cluster
  uint32_t row_tiles_inverse;     // see divide
  int stages, early;              // of weights; requested before the previous kernel ends
  int x_stages, x_lag;            // of x; refilled so many k tiles after their use
  int x_offset;                   // of the first stage of x, behind the table
  int region_bytes, low_regions;  // rings of the warps below the table, then those
  int high_region;                // behind x, from the start of shared memory
  int cluster_barriers;           // behind all: others have room for sums, theirs have come
  int first_block[FLUTE_MAX_PARTS + 1];
  Parts parts;
  Ahead ahead;
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    sm90_gemm_kernel(const __grid_constant__ Sm90Params p,
                     const __grid_constant__ CUtensorMap x_map) {
#if FLUTE_HAS_WGMMA
  using T = typename Shape::T;
  extern __shared__ uint8_t shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = same_for_all(thread / 32);
  const int group = warp / 4, quarter = warp % 4;
  const int splits = 1 << p.splits_log2, split = blockIdx.x & (splits - 1);
  // In x: the blocks that split k, within the halves of a gated launch, within the columns of x.
  const int half = half_of_block(p, blockIdx.x >> p.splits_log2);
  const int column0 =  // first row of x
      (blockIdx.x >> (p.splits_log2 + (p.activation ? 1 : 0))) * Shape::kColumns;
  const BlockRows block(p, blockIdx.y + half * p.first_block[1]);
  const int first_row = block.first_row - half * p.n;  // in y

  // This warpgroup's share: in each round the block's 64-row tile round * row_groups + row_group,
  // and `k_tiles` k tiles from `begin`.
  const int row_groups = 1 << p.row_groups_log2, k_groups = 1 << p.k_groups_log2;
  const int row_group = group >> p.k_groups_log2, k_group = group & (k_groups - 1);
  const int block_rows = ceil_div(block.tiles, 4);
  auto rounds_of = [&](int tiles, int first) {  // in which there is a tile first + i * row_groups
    return (max(0, tiles - first) + row_groups - 1) >> p.row_groups_log2;
  };
  const int rounds = rounds_of(block_rows, 0), rows = rounds_of(block_rows, row_group);
  const int whole = (block.tiles - quarter + 3) / 4;  // 64-row tiles that hold rows of this warp
  const int block_begin = p.k_tiles * split >> p.splits_log2;
  const int block_length = (p.k_tiles * (split + 1) >> p.splits_log2) - block_begin;
  // Passed through a shuffle, as the compiler would compute both anew from the launch's parameters
  // for each k tile.
  const int begin = same_for_all(block_begin + (block_length * k_group >> p.k_groups_log2));
  const int k_tiles =
      same_for_all(block_begin + (block_length * (k_group + 1) >> p.k_groups_log2) - begin);

  // Shared memory: barriers | some warps' rings | table | x, the other rings. Where sums are
  // shared, all of it but the barriers is used anew: each warp's sums | room for those of other
  // blocks.
  const uint32_t base = shared_address(shared);
  const uint32_t table = (base + table_alignment(true) - 1) & ~(table_alignment(true) - 1u);
  RecordRing<Shape> ring;
  ring.barriers = base + warp * kMaxSlots * 8;
  ring.slots_at =
      base + warp * p.region_bytes +
      (warp < p.low_regions ? static_cast<uint32_t>(sm90_barrier_bytes(Shape::kWarpgroups))
                            : p.high_region - p.low_regions * p.region_bytes);
  const uint32_t tile_step = p.k_tiles * (Shape::kRecord / 16);
  ring.next =
      (block.first_tile + 4 * row_group + quarter) * tile_step + begin * (Shape::kRecord / 16);
  ring.round_step = 4 * row_groups * tile_step - k_tiles * (Shape::kRecord / 16);
  ring.k_tiles = ring.k_left = k_tiles;
  ring.slot = 0, ring.rounds_left = k_tiles > 0 ? rows : 0;
  ring.tile = row_group, ring.tile_step = row_groups, ring.whole = whole;
  ring.slots = p.stages, ring.phase = 0;
  ring.policy = evict_first_policy();

  XRing<Shape> x;
  x.filled = base + sm90_x_barriers(Shape::kWarpgroups) + k_group * kMaxXStages * 16;
  x.emptied = x.filled + kMaxXStages * 8;
  x.at = base + p.x_offset + k_group * p.x_stages * Shape::kXStage;
  x.first_descriptor = x_descriptor(x.at);
  x.map = &x_map, x.stages = p.x_stages, x.lag = p.x_lag;
  x.column = begin * kTileK, x.row = column0, x.length = k_tiles;
  x.next = x.stage = x.refill = 0, x.phase = x.refill_phase = 0, x.left = rounds * k_tiles;
  const bool brings_x = row_group == 0 && quarter == 0;

  if (lane < p.stages) barrier_init(ring.barrier(lane), 1);
  if (brings_x && lane == 0) {
    tensor_map_prefetch(&x_map);
    const int readers = 4 * min(row_groups, block_rows);
    for (int i = 0; i < p.x_stages; i++) {
      barrier_init(x.filled + i * 8, 1);
      barrier_init(x.emptied + i * 8, readers);
    }
  }
  barrier_init_fence();
  __syncwarp();
  // Weights do not depend on the previous kernel. The others follow x, which is needed first.
#pragma unroll 1
  for (int i = 0; i < p.early; i++) ring.request(p.records, i);
  TableFill<Shape::kBits, Shape::kThreads> fill;
  fill.load(p.table + static_cast<int64_t>(block.part) * p.table_bytes, p.pair_table);
  if (p.ranks_log2 > 0) {
    if (thread == 0) {
      barrier_init(base + p.cluster_barriers, (1 << p.ranks_log2) - 1);
      barrier_init(base + p.cluster_barriers + 8, 1);
      barrier_init_fence();
    }
    cluster_arrive();
  }
  wait_for_previous_launch();
  allow_next_launch();
  if (brings_x) x.start();
#pragma unroll 1
  for (int i = p.early; i < p.stages; i++) ring.request(p.records, i);
  fill.store(table, p.pair_table);
  __syncthreads();  // barriers of x, and the table

  const Decoder<Shape::kBits> decoder(table, lane);
  Products<Shape> products;
  T* y = static_cast<T*>(p.y) + static_cast<int64_t>(column0) * p.n + first_row;
  const int columns = min(Shape::kColumns, p.m - column0);
  // Nobody else has a share in its sums, or needs them.
  const bool alone = p.ranks_log2 == 0 && p.k_groups_log2 == 0;
  for (int round = 0; round < rounds && rows > 0; round++) {
    if (round == rows) {  // the other warpgroups still share x with this one
      for (int i = 0; i < k_tiles; i++) x.release(x.take(), lane, brings_x);
      break;
    }
    // Rows past the block's last tile multiply whatever lies there; nobody reads them.
    products.clear();
    auto free_slot = [&] { ring.free(p.records); };
#pragma unroll 1
    for (int step = 0; Shape::kDepth * step < k_tiles; step++) {
      const int x0 = x.take();
      if (Shape::kDepth == 2 && 2 * step + 1 < k_tiles) {  // else one k tile
        const uint32_t slot = ring.take();
        products.load(slot, lane);
        products.template tile<0, -1>(
            x.descriptor(x0), decoder, [] {}, [&] { products.load(slot + Shape::kRecord, lane); });
        const int x1 = x.take();
        products.template tile<1, 0>(
            x.descriptor(x1), decoder, [&] { x.release(x0, lane, brings_x); }, free_slot);
        products.template settle<1>();
        x.release(x1, lane, brings_x);
      } else {
        products.load(ring.take(), lane);
        products.template tile<0, -1>(x.descriptor(x0), decoder, [] {}, free_slot);
        products.template settle<0>();
        x.release(x0, lane, brings_x);
      }
    }
    if (alone) {
      const int tile = (round * row_groups + row_group) * 4 + quarter;
      write_sums(products.sums, y + tile * kTileRows, p.n, block.rows - tile * kTileRows, columns,
                 ((p.n | first_row | block.rows) & 1) == 0, lane);
    }
  }
  p.ahead.ask(blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y, warp,
              4 * Shape::kWarpgroups, lane);
  if (alone) return;

  // Sums of all warps. All of shared memory is free but for the barriers: PTX lets an mbarrier's
  // place be used otherwise only once it has been invalidated. Sums that lay there were NaN at
  // times while other processes used the GPU (NOTES.md).
  constexpr int kPartialBytes = sm90_partial_bytes(Shape::kColumns);
  const uint32_t has_room = base + p.cluster_barriers;
  const uint32_t partials = base + sm90_barrier_bytes(Shape::kWarpgroups);
  auto partial = [&](int w) { return partials + w * kPartialBytes; };
  const int ranks = 1 << p.ranks_log2, rank = cluster_rank();
  __syncthreads();
  if (ranks > 1) {
    cluster_wait();  // the others have begun
    if (thread < ranks && thread != rank) cluster_barrier_arrive(cluster_address(has_room, thread));
  }
  if (row_group < whole) products.template store<kPartialPad>(partial(warp), lane);
  __syncthreads();

  // Sum i: four rows of a column, of all k groups. Then of the cluster's blocks, gate's before
  // up's.
  const ClusterSums<float4, Shape::kThreads> cluster{
      has_room + 8, partials + 4 * Shape::kWarpgroups * kPartialBytes,
      columns * p.row_tiles * (kTileRows / 4), p.ranks_log2, rank};
  auto column_of = [&](int i) { return divide(i / 4, p.row_tiles_inverse); };
  auto sum_of = [&](int i, int column) {
    const int tile = i / 4 - column * p.row_tiles;
    const uint32_t at = partial((tile / 4 << p.k_groups_log2) * 4 + tile % 4) +
                        (column * (kTileRows + kPartialPad) + i % 4 * 4) * 4;
    float4 sum = load_shared_float4(at);
#pragma unroll 1
    for (int j = 1; j < k_groups; j++) add(sum, load_shared_float4(at + j * 4 * kPartialBytes));
    return sum;
  };
  const bool aligned = ((p.n | first_row) & 3) == 0;
  auto write_y = [&](int column, int row, float4 sum) {
    T* to = y + static_cast<int64_t>(column) * p.n + row;
    if (aligned && row + 4 <= block.rows) {
      *reinterpret_cast<uint2*>(to) =
          make_uint2(narrow_pair<T>(sum.x, sum.y), narrow_pair<T>(sum.z, sum.w));
      return;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    for (int j = 0; j < 4 && row + j < block.rows; j++) to[j] = narrow<T>(values[j]);
  };
  // With this way of its own the compiler finds a shorter main loop for 16 columns, a longer one
  // for 128.
  if (Shape::kColumns < 128 && ranks == 1) {
#pragma unroll 1
    for (int i = thread; i < cluster.count; i += Shape::kThreads) {
      const int column = column_of(i), row = i * 4 - column * p.row_tiles * kTileRows;
      if (row < block.rows) write_y(column, row, sum_of(i, column));
    }
    return;
  }
  if (ranks > 1) {
    barrier_wait_cluster(has_room, 0);
    cluster.send([&](int i) { return sum_of(i, column_of(i)); });
  }
  cluster.finish([&](int i, auto part) {
    const int column = column_of(i), row = i * 4 - column * p.row_tiles * kTileRows;
    if (row >= block.rows) return;
    const float4 own = sum_of(i, column);
    float4 sum = own, gate = {};
    cluster.wait();
#pragma unroll 1
    for (int from = 0; from < ranks && ranks > 1; from++) {
      const float4 other = from == rank ? own : part(from);
      if (from == splits) gate = sum;
      if (from == 0 || from == splits)
        sum = other;
      else
        add(sum, other);
    }
    if (p.activation) {
      sum.x = activate(p.activation, gate.x, sum.x), sum.y = activate(p.activation, gate.y, sum.y);
      sum.z = activate(p.activation, gate.z, sum.z), sum.w = activate(p.activation, gate.w, sum.w);
    }
    write_y(column, row, sum);
  });
#endif
}

}  // namespace flute
