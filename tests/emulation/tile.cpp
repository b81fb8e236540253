// Runs kernels/cuda/tile.cuh on the CPU, instruction by instruction, against plain loops.
//
//   tile SEED CASES    exits with 0 when every case agrees
//
// Each case is random: bits, groups, dtype, table, parts, sizes, launch, order of threads. Shared
// memory and y are filled with NaN first.
#include <cuda_runtime.h>

#include "fibers.h"

struct Index {
  operator dim3() const;
  struct {
    operator unsigned() const { return flute::current_fiber().index; }
  } x;
};
inline Index threadIdx_emulated;
inline dim3 blockIdx_emulated;
#define threadIdx threadIdx_emulated
#define blockIdx blockIdx_emulated
#define __syncthreads flute::block_barrier
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#include "tile.cuh"

namespace flute {

uint8_t shared[256 * 1024];

namespace {

std::mt19937 rng;
int pick(std::initializer_list<int> values) {
  return values.begin()[rng() % values.size()];
}

template <typename Shape>
bool run(const FluteMatrix& matrix, int m) {
  using T = typename Shape::T;
  const int n = matrix.n, k = matrix.k, bits = Shape::kBits, groups = Shape::kGroups;
  const int k_tiles = ceil_div(k, kTileK), codes = 1 << bits;
  const Parts parts(matrix);

  // A layer, canonical and in records.
  auto value = [](float low, float high) {
    return T(low + (high - low) * static_cast<float>(rng() % 4096) / 4096);
  };
  auto raw = [](T v) {
    uint16_t word;
    memcpy(&word, &v, 2);
    return word;
  };
  const int entries = matrix.pair_table ? 2 * codes * codes : codes;
  std::vector<T> table(entries * matrix.parts), x(static_cast<size_t>(m) * k + 8);
  for (T& v : table) v = value(-2, 2);
  T* x_at = x.data();
  while (reinterpret_cast<uintptr_t>(x_at) % 16) x_at++;
  for (int i = 0; i < m * k; i++) x_at[i] = value(-1, 1);
  std::vector<uint8_t> record_store(static_cast<size_t>(parts.tiles()) * k_tiles * Shape::kRecord +
                                    16);
  uint8_t* records = record_store.data();
  while (reinterpret_cast<uintptr_t>(records) % 16) records++;
  std::vector<float> weights(static_cast<size_t>(n) * k);
  const int group = matrix.group_size > 0 ? matrix.group_size : k;
  std::vector<T> scales(static_cast<size_t>(n) * ceil_div(k, group));
  for (T& v : scales) v = value(0.01f, 0.03f);
  for (int tile = 0; tile < parts.tiles(); tile++)
    for (int k_tile = 0; k_tile < k_tiles; k_tile++) {
      int part = 0;
      while (tile >= parts.tile[part + 1]) part++;
      const int first_row = parts.row[part] + (tile - parts.tile[part]) * kTileRows;
      uint8_t* record = records + (static_cast<size_t>(tile) * k_tiles + k_tile) * Shape::kRecord;
      for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < kFragments * 8; i += 2) {
          const int fragment = i / 8, n = i % 8;
          const int row = first_row + code_row(lane, n);
          const int column = k_tile * kTileK + code_column(lane, fragment, n);
          if (row >= parts.row[part + 1] || column >= k) continue;
          int code[2];
          for (int e = 0; e < 2; e++) {
            code[e] = rng() % codes;
            for (int b = 0; b < bits; b++) {
              const int bit = code_bit(bits, lane, fragment, n + e, b);
              record[bit / 8] |= (code[e] >> b & 1) << (bit % 8);
            }
          }
          const T* entry = table.data() + part * entries;
          const float scale =
              scales[static_cast<size_t>(row) * ceil_div(k, group) + column / group];
          for (int e = 0; e < 2; e++) {
            const int at = matrix.pair_table ? 2 * (code[0] * codes + code[1]) + e : code[e];
            weights[static_cast<size_t>(row) * k + column + e] =
                static_cast<float>(T(static_cast<float>(entry[at]) * scale));
          }
        }
      uint16_t* to = reinterpret_cast<uint16_t*>(record + code_bytes(bits));
      for (int row = 0; row < kTileRows; row++)
        for (int i = 0; i < groups; i++) {
          const int column = k_tile * kTileK + i * kTileK / groups;
          if (first_row + row >= parts.row[part + 1] || column >= k) continue;
          to[scale_index(groups, row, i)] = raw(
              scales[static_cast<size_t>(first_row + row) * ceil_div(k, group) + column / group]);
        }
    }

  // A launch, as tile_launch.cuh.
  const int splits = 1 + rng() % std::min(k_tiles, 3), x_slots = 2 + rng() % 4;
  const int record_slots = 1 + ceil_div(x_slots - 1, Shape::kSteps) + rng() % 2;
  const int offset = rng() % 3;  // y need not be aligned
  std::vector<T> y_store(static_cast<size_t>(m) * n + 4, T(NAN));
  T* y = y_store.data() + offset;
  std::vector<float> workspace(static_cast<size_t>(splits) * m * n + 4, NAN);
  float* shares = workspace.data();
  while (reinterpret_cast<uintptr_t>(shares) % 16) shares++;
  TileParams p{records,
               reinterpret_cast<const uint8_t*>(table.data()),
               reinterpret_cast<const uint8_t*>(x_at),
               y,
               shares,
               m,
               n,
               k,
               k_tiles,
               entries * 2,
               matrix.pair_table != 0,
               0,
               ceil_div(m, Shape::kTokens),
               splits,
               x_slots,
               record_slots,
               {},
               parts};
  for (int i = 0; i < matrix.parts; i++)
    p.first_block[i + 1] = p.first_block[i] + ceil_div(matrix.part_rows[i], Shape::kRows);
  p.row_blocks = p.first_block[matrix.parts];
  shared_size = kTileTableBytes + p.x_slots * Shape::kXSlot + p.record_slots * Shape::kRecordSlot;
  shared_size = std::max<size_t>(shared_size, Shape::kKWarps / 2 * kSumBytes<Shape>);
  copies_land_late = rng() % 2;
  block_state.random.seed(rng());
  for (int split = 0; split < p.splits; split++)
    for (int i = 0; i < p.row_blocks * p.token_blocks; i++) {
      memset(shared, 0xff, sizeof(shared));
      blockIdx_emulated = dim3(i, split);
      run_block(Shape::kThreads, [&] { tile_kernel<Shape>(p); });
    }

  double worst = 0;
  for (int token = 0; token < m; token++)
    for (int row = 0; row < n; row++) {
      double exact = 0, size = 0;
      for (int i = 0; i < k; i++) {
        const double term = static_cast<double>(weights[static_cast<size_t>(row) * k + i]) *
                            static_cast<float>(x_at[static_cast<size_t>(token) * k + i]);
        exact += term, size += std::abs(term);
      }
      const size_t at = static_cast<size_t>(token) * n + row;
      float got = static_cast<float>(y[at]);
      if (p.splits > 1) {
        got = 0;
        for (int s = 0; s < p.splits; s++) got += shares[static_cast<size_t>(s) * m * n + at];
      }
      const double error = std::abs(got - exact) / (1e-2 * std::abs(exact) + 1e-4 * size);
      worst = error >= 0 ? std::max(worst, error) : INFINITY;
    }
  for (int i = 0; i < offset; i++) worst = raw(y_store[i]) == raw(T(NAN)) ? worst : INFINITY;
  printf(
      "w%d tokens %d groups %d n %d k %d m %d pair %d parts %d splits %d slots %d %d late %d: %g\n",
      bits, Shape::kTokens, groups, n, k, m, matrix.pair_table, matrix.parts, p.splits, p.x_slots,
      p.record_slots, copies_land_late, worst);
  return worst < 1;
}

template <int Bits, typename T, int Tokens>
bool run_groups(const FluteMatrix& matrix, int m) {
  switch (groups_in_tile(matrix.group_size)) {
    case 1:
      return run<TileShape<Bits, T, Tokens, 1>>(matrix, m);
    case 2:
      return run<TileShape<Bits, T, Tokens, 2>>(matrix, m);
  }
  return run<TileShape<Bits, T, Tokens, 4>>(matrix, m);
}
template <int Bits, typename T>
bool run_tokens(const FluteMatrix& matrix, int m) {
  return rng() % 2 ? run_groups<Bits, T, 64>(matrix, m) : run_groups<Bits, T, 128>(matrix, m);
}
template <int Bits>
bool run_bits(const FluteMatrix& matrix, int m) {
  return matrix.dtype == FLUTE_FLOAT16 ? run_tokens<Bits, __half>(matrix, m)
                                       : run_tokens<Bits, __nv_bfloat16>(matrix, m);
}

bool random_case() {
  FluteMatrix matrix{};
  matrix.bits = pick({4, 3, 2});
  matrix.group_size = pick({32, 64, 128, -1});
  matrix.dtype = rng() % 2;
  matrix.pair_table = rng() % 2;
  const int unit = matrix.group_size > 0 ? matrix.group_size : 32;
  matrix.k = unit * (1 + rng() % (600 / unit));
  matrix.parts = pick({1, 1, 2});
  for (int i = 0; i < matrix.parts; i++) {
    matrix.part_rows[i] = pick({1, 16, 37, 63, 128, 150});
    matrix.n += matrix.part_rows[i];
  }
  const int m = pick({1, 33, 48, 64, 65, 100, 128, 129});
  return matrix.bits == 4   ? run_bits<4>(matrix, m)
         : matrix.bits == 3 ? run_bits<3>(matrix, m)
                            : run_bits<2>(matrix, m);
}

}  // namespace
}  // namespace flute

int main(int count, char** arguments) {
  flute::rng.seed(count > 1 ? atoi(arguments[1]) : 0);
  int failures = 0;
  for (int i = 0; i < (count > 2 ? atoi(arguments[2]) : 20); i++) failures += !flute::random_case();
  return failures != 0;
}
