// How an ISA's tile function covers all rows: shared by the vector kernels, one copy in each
// translation unit (anonymous namespace, see half.h).
#pragma once

#include "half.h"
#include "kernels.h"

namespace flute::cpu {
namespace {

// Rows of the weight that stay in the first two levels of cache while every tile of x passes over
// them: 24 rows of 4096 4-bit codes are 48 KiB.
constexpr int64_t kRowChunk = 24;

// Tile::run<R, M>(layer, job, m, row, sums) computes R rows of the weight times M rows of x.
template <class Tile, int R, int M>
void run_tile(const Layer& layer, const Job& job, int64_t m, int64_t row) {
  float sums[R * M];
  Tile::template run<R, M>(layer, job, m, row, sums);
  for (int j = 0; j < M; ++j)
    for (int r = 0; r < R; ++r)
      store_value(job.y, job.dtype, (m + j) * job.ldy + row + r, sums[r * M + j]);
}

template <class Tile, int M>
void sweep_rows(const Layer& layer, const Job& job, int64_t m, int64_t begin, int64_t end) {
  constexpr int R = Tile::template rows<M>();
  int64_t row = begin;
  for (; row + R <= end; row += R) run_tile<Tile, R, M>(layer, job, m, row);
  for (; row < end; ++row) run_tile<Tile, 1, M>(layer, job, m, row);
}

template <class Tile>
void sweep(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kRowChunk) {
    const int64_t stop = row + kRowChunk < end ? row + kRowChunk : end;
    int64_t m = 0;
    for (; job.m - m >= 8; m += 8) sweep_rows<Tile, 8>(layer, job, m, row, stop);
    if (job.m - m >= 4) sweep_rows<Tile, 4>(layer, job, m, row, stop), m += 4;
    if (job.m - m >= 2) sweep_rows<Tile, 2>(layer, job, m, row, stop), m += 2;
    if (job.m - m >= 1) sweep_rows<Tile, 1>(layer, job, m, row, stop);
  }
}

}  // namespace
}  // namespace flute::cpu
