// y[m, n] = x[m, k] * w[n, k]^T on Hopper for hundreds of rows of x and more, w in the internal
// layout.
//
// Here the tensor cores are the limit, and shared memory next to it: x is written there once for
// each tile of y and read again for each 64 rows of w. So nothing else is kept there but the codes
// on their way: the table lies in registers (register_lut.cuh). Two warpgroups decode and multiply,
// a third brings weights and x ahead of them. A block computes one tile of y after another, so that
// the loads of the next run while the sums of the last are written, and the two warpgroups may
// drift apart by the x that is there: one multiplies while the other decodes or writes. Weights are
// rounded to 16 bits after scaling, as dequantize does.
#pragma once

#include <type_traits>

#include "register_lut.cuh"
#include "sm90_prefill_sums.cuh"
#include "sm90_prefill_work.cuh"
#include "sm90_products.cuh"

namespace flute {

constexpr int kPrefillThreads = (kPrefillGroups + 1) * 128;
constexpr int kPrefillBarrierBytes = 1024;  // x, which follows, is aligned to as much

template <int Bits_, typename T_, int Columns_, int Groups_>
struct PrefillShape {
  using T = T_;
  static constexpr int kBits = Bits_;
  static constexpr int kColumns = Columns_;
  static constexpr int kGroups = Groups_;
  static constexpr int kDepth = 2;  // k tiles of a request of weights
  static constexpr int kStep = 4;   // k tiles of a turn of the main loop
  static constexpr int kRecord = record_bytes(Bits_, Groups_);
  static constexpr int kRequest = kDepth * kRecord;
  static constexpr int kSlot = 4 * kRequest;
  static constexpr int kXStage = Columns_ * kSwizzleRowBytes;  // 64 columns of k
};

#if FLUTE_HAS_WGMMA
// A ring of slots in shared memory: the next one, and the phase of its barriers.
struct RingPlace {
  int slots, slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ explicit RingPlace(int count) : slots(count) {}
  __device__ __forceinline__ void advance() {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

// Barriers of the rings: filled and emptied, of each warpgroup's weights, then of x.
struct PrefillBarriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t filled(int group, int slot) const {
    return base + (group * 2 * kPrefillStages + slot) * 8;
  }
  __device__ __forceinline__ uint32_t emptied(int group, int slot) const {
    return filled(group, slot) + kPrefillStages * 8;
  }
  static constexpr int kX = kPrefillGroups;  // instead of a warpgroup
  __device__ __forceinline__ PairBarriers pair() const {
    constexpr int kAt = (kPrefillGroups + 1) * 2 * kPrefillStages * 8;
    static_assert(kAt + PairBarriers::kBytes <= kPrefillBarrierBytes);
    return {base + kAt};
  }
};

// All threads of a cluster wait, once, for its other block to have begun, none for what another
// thread does after that: then all tools can follow (cluster.cuh). Those that bring data do when
// their first requests are under way.
struct ClusterStart {
  bool pending;
  __device__ __forceinline__ void wait() {
    if (pending) cluster_wait();
    pending = false;
  }
};

// One warp brings all x of this block. Where the last tile is shared with the other block of a
// cluster, that one's sums then find room in the stages that are needed no more.
template <typename Shape>
__device__ __forceinline__ void bring_x(const PrefillParams& p, const CUtensorMap* map,
                                        PrefillBarriers barriers, uint32_t x_at) {
  RingPlace at(p.x_stages);
  ClusterStart start{p.splits_log2 > 0};
  bool shares = false;
  for (int round = 0;; round++) {
    const Work work(p, round, Shape::kColumns);
    if (!work.exists) break;
    shares = work.shared;
#pragma unroll 1
    for (int i = 2 * work.begin; i < 2 * work.end; i++, at.advance()) {
      if (at.phase) start.wait();
      const uint32_t filled = barriers.filled(barriers.kX, at.slot);
      barrier_wait(barriers.emptied(barriers.kX, at.slot), at.phase ^ 1);
      if (elect_one()) {
        barrier_expect(filled, Shape::kXStage);
        tensor_copy(x_at + at.slot * Shape::kXStage, map, i * kSwizzleColumns, work.column0,
                    filled);
      }
    }
  }
  start.wait();
  if (!shares) return;
  for (int group = 0; group < kPrefillGroups; group++, at.advance())
    barrier_wait(barriers.emptied(barriers.kX, at.slot), at.phase ^ 1);
  if (elect_one())
    cluster_barrier_arrive(cluster_address(barriers.pair().room(), cluster_rank() ^ 1));
}

// One warp brings all weights of one warpgroup: two k tiles of each of its row tiles, then the next
// two. Row tiles behind the last one are left out.
template <typename Shape>
__device__ __forceinline__ void bring_weights(const PrefillParams& p, PrefillBarriers barriers,
                                              uint32_t slots_at, int group) {
  RingPlace at(p.slots);
  ClusterStart start{p.splits_log2 > 0};
  const uint64_t policy = evict_first_policy();
  for (int round = 0;; round++) {
    const Work work(p, round, Shape::kColumns);
    if (!work.exists) break;
    const BlockRows block(p, work.block);
    const int tiles = min(4, max(0, block.tiles - group * 4));
    const uint8_t* tile =
        p.records + static_cast<int64_t>(block.first_tile + group * 4) * p.k_tiles * Shape::kRecord;
#pragma unroll 1
    for (int k_tile = work.begin; k_tile < work.end; k_tile += Shape::kDepth, at.advance()) {
      if (at.phase) start.wait();
      const int bytes = min(Shape::kDepth, work.end - k_tile) * Shape::kRecord;
      const uint32_t filled = barriers.filled(group, at.slot);
      barrier_wait(barriers.emptied(group, at.slot), at.phase ^ 1);
      if (elect_one()) {
        barrier_expect(filled, tiles * bytes);
        const uint8_t* from = tile + k_tile * Shape::kRecord;
        for (int i = 0; i < tiles; i++, from += p.k_tiles * Shape::kRecord)
          bulk_copy_expected(slots_at + at.slot * Shape::kSlot + i * Shape::kRequest, from, bytes,
                             filled, policy);
      }
    }
  }
  start.wait();
}

// What a warpgroup computes: 64 rows of w by kColumns rows of x.
template <typename Shape>
struct WideProducts {
  using T = typename Shape::T;
  float sums[Shape::kColumns / 2];
  uint32_t a[2][4][4];            // decoded halves of a k tile: this one and the one before
  uint32_t word[Shape::kGroups];  // scales
  RegisterTable<Shape::kBits> table;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; i++) sums[i] = 0;
  }

  // KTiles k tiles, half by half: while one multiplies, the next is decoded. `record(i)` waits for
  // the codes of k tile i and says where they are, `decoded` gives a request of them back; `take`
  // waits for the x of the next half and returns its address, `release(i)` gives that of half i
  // back.
  template <int KTiles, typename Record, typename Decoded, typename Take, typename Release>
  __device__ __forceinline__ void step(int lane, Record record, Decoded decoded, Take take,
                                       Release release) {
    uint32_t from = 0;
    for_constants<2 * KTiles>([&](auto constant) {
      constexpr int unit = decltype(constant)::value, half = unit % 2;
      if constexpr (half == 0) {
        from = record(unit / 2);
        const uint32_t at = from + code_bytes(Shape::kBits) + (lane / 4) * Shape::kGroups * 4;
#pragma unroll
        for (int i = 0; i < Shape::kGroups; i++) word[i] = load_shared(at + i * 4);
      }
      Codes<Shape::kBits> codes;
      codes.load_half(from, half, lane);
      wgmma_wait<1>();  // all products are done but the last one
      if constexpr (unit >= 2) release(unit - 2);
      const Nibbles<Shape::kBits> nibbles(codes, half);
#pragma unroll
      for (int f = 0; f < 4; f++) table.decode(a[half][f], nibbles.word[f]);
      apply_scales<T>(a[half], word, 4 * half);
      if constexpr (half == 1 &&
                    (unit / 2 % Shape::kDepth == Shape::kDepth - 1 || unit == 2 * KTiles - 1))
        decoded();
      multiply_box<T, Shape::kColumns>(sums, a[half], x_descriptor(take()), true);
    });
    // Products may not be under way across a turn of the loop: ptxas then lets none overlap.
    wgmma_wait<0>();
    pin(sums);
    release(2 * KTiles - 2);
    release(2 * KTiles - 1);
  }
};
#endif

template <typename Shape>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    sm90_prefill_kernel(const __grid_constant__ PrefillParams p,
                        const __grid_constant__ CUtensorMap x_map) {
#if FLUTE_HAS_WGMMA
  using T = typename Shape::T;
  extern __shared__ uint8_t shared[];
  const int lane = threadIdx.x % 32;
  const int warp = same_for_all(threadIdx.x / 32);
  const int group = warp / 4;

  // Shared memory: barriers | x | sums on their way out | weights of each warpgroup.
  const uint32_t base = shared_address(shared), x_at = base + kPrefillBarrierBytes;
  const PrefillBarriers barriers{base};
  auto slots_of = [&](int g) { return base + p.slots_at + g * p.slots * Shape::kSlot; };

  if (threadIdx.x < kPrefillStages) {
    for (int g = 0; g < kPrefillGroups; g++) {
      barrier_init(barriers.filled(g, threadIdx.x), 1);
      barrier_init(barriers.emptied(g, threadIdx.x), 4 * 32);
    }
    barrier_init(barriers.filled(barriers.kX, threadIdx.x), 1);
    barrier_init(barriers.emptied(barriers.kX, threadIdx.x), kPrefillGroups * 4);
    if (threadIdx.x == 0) barriers.pair().init(Shape::kColumns);
    barrier_init_fence();
  }
  __syncthreads();
  if (p.splits_log2 > 0) cluster_arrive();

  if (group == kPrefillGroups) {
    give_registers<24>();
    const int job = warp % 4;
    if (job < kPrefillGroups) {  // weights do not depend on the previous kernel
      bring_weights<Shape>(p, barriers, slots_of(job), job);
    } else if (job == kPrefillGroups) {
      tensor_map_prefetch(&x_map);
      wait_for_previous_launch();
      allow_next_launch();
      bring_x<Shape>(p, &x_map, barriers, x_at);
    } else {
      ClusterStart{p.splits_log2 > 0}.wait();
    }
    return;
  }

  take_registers<240>();
  ClusterStart{p.splits_log2 > 0}.wait();
  WideProducts<Shape> products;
  RingPlace slot(p.slots), stage(p.x_stages);
  int part = -1;
  for (int round = 0;; round++) {
    const Work work(p, round, Shape::kColumns);
    if (!work.exists) break;
    const BlockRows block(p, work.block);
    if (block.part != part) {
      part = block.part;
      products.table.load(p.table + static_cast<int64_t>(part) * p.table_bytes);
    }
    products.clear();
    int k_left = work.end - work.begin;
    uint32_t codes_at = 0, halves[2 * Shape::kStep];
    int taken = 0;
    auto record = [&](int i) {
      if (i % Shape::kDepth == 0) barrier_wait(barriers.filled(group, slot.slot), slot.phase);
      codes_at = slots_of(group) + slot.slot * Shape::kSlot + warp % 4 * Shape::kRequest;
      return codes_at + i % Shape::kDepth * Shape::kRecord;
    };
    // Every lane for itself: racecheck takes an arrival for that of its own lane's reads only. One
    // lane's, after __syncwarp, would do and is no faster (NOTES.md).
    auto decoded = [&] {
      barrier_arrive(barriers.emptied(group, slot.slot));
      slot.advance();
    };
    auto take = [&] {
      barrier_wait(barriers.filled(barriers.kX, stage.slot), stage.phase);
      const uint32_t x = x_at + stage.slot * Shape::kXStage;
      halves[taken++] = barriers.emptied(barriers.kX, stage.slot);
      stage.advance();
      return x;
    };
    auto release = [&](int half) {
      if (lane == 0) barrier_arrive(halves[half]);
    };
    auto step = [&](auto k_tiles) {
      taken = 0;
      products.template step<decltype(k_tiles)::value>(lane, record, decoded, take, release);
      k_left -= k_tiles;
    };
#pragma unroll 1
    while (k_left >= Shape::kStep) step(std::integral_constant<int, Shape::kStep>());
#pragma unroll 1
    while (k_left >= 2) step(std::integral_constant<int, 2>());
    if (k_left == 1) step(std::integral_constant<int, 1>());

    T* y = static_cast<T*>(p.y) + static_cast<int64_t>(work.column0) * p.n + block.first_row;
    const int columns = min(Shape::kColumns, p.m - work.column0);
    const uint32_t staged = base + p.staged_at + group * kStagedBytes;
    const bool aligned = ((p.n | block.first_row) & 7) == 0;
    auto write = [&](auto& sums, int first, auto arrived) {
      write_tile<T>(sums, y + group * 64 + static_cast<int64_t>(first) * p.n, p.n,
                    block.rows - group * 64, columns - first, aligned, staged, group, arrived);
    };
    if (work.spread) {
      const SpreadSums spread{p, work, group, Shape::kColumns * 64};
      if (work.begin > 0) {
        give_sums(products.sums, spread.sums(work.place), spread.flag(work.place), 1 + group);
        continue;
      }
      spread.for_each_other([&](int place) {
        add_sums(products.sums, spread.sums(place), spread.flag(place), 1 + group);
      });
    }
    if (!work.shared) {
      write(products.sums, 0, [](int) {});
      continue;
    }
    // Behind the last stage of each block: where one of them had a k tile more, two further.
    auto room = [&](int stages_on) {
      int at = stage.slot + group + stages_on;
      at += at < 0 ? p.x_stages : at >= p.x_stages ? -p.x_stages : 0;
      return x_at + at * Shape::kXStage;
    };
    const int more = p.k_tiles - 2 * (work.end - work.begin);  // k tiles, of the other block
    exchange_sums(products.sums, room(0), room(2 * more), barriers.pair(), group, write);
  }
#endif
}

}  // namespace flute
