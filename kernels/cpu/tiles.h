// How an ISA's tile function covers all rows: shared by the vector kernels, one copy in each
// translation unit (anonymous namespace, see half.h).
#pragma once

#include "half.h"
#include "kernels.h"

namespace flute::cpu {
namespace {

// std::min would be a weak symbol of a translation unit that older machines must not run.
int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Rows of the weight that are worked on together, so that a part of x read from the second level
// of cache serves all of them from the first.
constexpr int64_t kRowChunk = 24;

// Bytes of x that stay in the first level of cache while the rows of a chunk pass over them. The
// sums of a chunk (up to 12 KiB) wait beside them in between.
constexpr int64_t kXBytes = 16 << 10;

// Where a row of x lies in packed form. The rows of one tile alternate vector by vector: rows that
// lie a power of two apart, as in x, would compete for the same few sets of the cache.
struct Place {
  int64_t first;  // first row of the tile
  int64_t rows;   // rows of the tile
  int64_t index;  // of this row among them

  // Element of `packed` where vector v (of `lanes` elements) of the row begins.
  int64_t vector(int64_t k, int64_t v, int64_t lanes) const {
    return first * k + (v * rows + index) * lanes;
  }
};

// The tiles of `sweep`: as many eights as fit, then at most one each of four, two and one.
Place place_of(int64_t total, int64_t m) {
  int64_t first = total / 8 * 8;
  if (m < first) return {m / 8 * 8, 8, m % 8};
  for (int64_t rows = 4;; rows /= 2) {
    if ((total & rows) == 0) continue;
    if (m < first + rows) return {first, rows, m - first};
    first += rows;
  }
}

// Columns of the weight: all of them, or a part that holds whole groups (or lies in one group).
struct Span {
  int64_t begin, end;
};

// Words from codes to those of the next chunk, which the tiles prefetch: the processor does not
// foresee the jumps between rows, and with them memory and arithmetic take turns. A prefetch past
// the last row does nothing.
int64_t rows_ahead(const Layer& layer) {
  return kRowChunk * (layer.k / kUnit * layer.bits);
}

// Longest span of columns for M rows of x. A multiple of 256, hence of every group size.
template <class Tile, int M>
int64_t span_length(const Layer& layer) {
  const int64_t fitting = kXBytes / (M * Tile::kElementBytes) / 256 * 256;
  return M <= 2 ? layer.k : fitting < 256 ? 256 : fitting;
}

// y[m.., begin..end) for M rows of x. Tile::run<R, M>(layer, job, m, row, span, sums) adds the
// columns of `span` to sums[R][M] of kWidth partial sums each, or starts them at column 0.
template <class Tile, int M>
void sweep_rows(const Layer& layer, const Job& job, int64_t m, int64_t begin, int64_t end) {
  constexpr int R = Tile::template rows<M>();
  constexpr int64_t kRowSums = M * Tile::kWidth;
  alignas(64) float sums[kRowChunk * kRowSums];
  const int64_t length = span_length<Tile, M>(layer);
  for (int64_t k = 0; k < layer.k; k += length) {
    const Span span = {k, smaller(k + length, layer.k)};
    int64_t row = begin;
    for (; row + R <= end; row += R)
      Tile::template run<R, M>(layer, job, m, row, span, sums + (row - begin) * kRowSums);
    for (; row < end; ++row)
      Tile::template run<1, M>(layer, job, m, row, span, sums + (row - begin) * kRowSums);
  }
  for (int j = 0; j < M; ++j)
    for (int64_t row = begin; row < end; ++row)
      store_value(job.y, job.dtype, (m + j) * job.ldy + row,
                  Tile::total(sums + (row - begin) * kRowSums + j * Tile::kWidth));
}

template <class Tile>
void sweep(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kRowChunk) {
    const int64_t stop = smaller(row + kRowChunk, end);
    int64_t m = 0;
    for (; job.m - m >= 8; m += 8) sweep_rows<Tile, 8>(layer, job, m, row, stop);
    if (job.m - m >= 4) sweep_rows<Tile, 4>(layer, job, m, row, stop), m += 4;
    if (job.m - m >= 2) sweep_rows<Tile, 2>(layer, job, m, row, stop), m += 2;
    if (job.m - m >= 1) sweep_rows<Tile, 1>(layer, job, m, row, stop);
  }
}

}  // namespace
}  // namespace flute::cpu
