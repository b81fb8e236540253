// Plain C++ for every machine, and for pair tables on all of them: a unit of 32 weights is decoded
// to fp32, then multiplied with 16 independent sums, which compilers turn into vectors.
#include "half.h"
#include "kernels.h"

namespace flute::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kRowsOfX = 4;

// Every table entry times one scale, rounded as the format says. Pairs have up to 512 values.
struct ScaledTable {
  float values[2 << (2 * kMaxBits)];

  void fill(const float* table, int size, float scale, Dtype round) {
    for (int i = 0; i < size; ++i) values[i] = round_to(table[i] * scale, round);
  }
};

struct TableSize {
  int entries;
  explicit TableSize(const Layer& layer)
      : entries(layer.pair ? 2 << (2 * layer.bits) : 1 << layer.bits) {}
};

void widen_table(const Layer& layer, float* table) {
  const int entries = TableSize(layer).entries;
  for (int i = 0; i < entries; ++i) table[i] = widen(layer.table[i], layer.dtype);
}

void decode_unit(const Layer& layer, const uint32_t* words, const float* values, float* out) {
  const int bits = layer.bits;
  const uint32_t mask = (1u << bits) - 1;
  uint8_t codes[kUnit];
  for (int i = 0; i < kUnit; ++i) {
    const int bit = bits * i, word = bit / 32, shift = bit % 32;
    uint32_t field = words[word] >> shift;
    if (shift + bits > 32) field |= words[word + 1] << (32 - shift);
    codes[i] = uint8_t(field & mask);
  }
  if (!layer.pair) {
    for (int i = 0; i < kUnit; ++i) out[i] = values[codes[i]];
    return;
  }
  for (int i = 0; i < kUnit; i += 2) {
    const int index = codes[i] << bits | codes[i + 1];
    out[i] = values[2 * index];
    out[i + 1] = values[2 * index + 1];
  }
}

// Pair tables are large against a group of 32: scaling only what is used costs less.
struct RowDecoder {
  const Layer& layer;
  Dtype round;
  float table[2 << (2 * kMaxBits)];
  ScaledTable scaled;
  bool scale_ahead;

  RowDecoder(const Layer& l, Dtype r)
      : layer(l), round(r), scale_ahead(l.group >= 4 * TableSize(l).entries) {
    widen_table(l, table);
  }

  void start_group(float scale) {
    if (scale_ahead) scaled.fill(table, TableSize(layer).entries, scale, round);
  }

  void decode(const uint32_t* words, float scale, float* out) const {
    decode_unit(layer, words, scale_ahead ? scaled.values : table, out);
    if (scale_ahead) return;
    for (int i = 0; i < kUnit; ++i) out[i] = round_to(out[i] * scale, round);
  }
};

bool computes_bf16(const Layer&, Dtype) {
  return false;
}

void pack(const Layer& layer, const Job& job, int64_t m, void* packed) {
  float* out = static_cast<float*>(packed) + m * layer.k;
  for (int64_t k = 0; k < layer.k; ++k) out[k] = load_value(job.x, job.dtype, m * layer.k + k);
}

void multiply_row(RowDecoder& decoder, const Job& job, int64_t m0, int count, int64_t row) {
  const Layer& layer = decoder.layer;
  const float* x = static_cast<const float*>(job.packed) + m0 * layer.k;
  float sums[kRowsOfX][kLanes] = {};
  float weights[kUnit];
  for (int64_t group = 0; group < layer.groups; ++group) {
    const float scale = widen(layer.row_scales(row)[group], layer.dtype);
    decoder.start_group(scale);
    for (int64_t k = group * layer.group; k < (group + 1) * layer.group; k += kUnit) {
      decoder.decode(layer.row_codes(row) + k / kUnit * layer.bits, scale, weights);
      for (int m = 0; m < count; ++m) {
        const float* values = x + m * layer.k + k;
        for (int half = 0; half < kUnit; half += kLanes)
          for (int lane = 0; lane < kLanes; ++lane)
            sums[m][lane] += values[half + lane] * weights[half + lane];
      }
    }
  }
  for (int m = 0; m < count; ++m) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sums[m][lane];
    store_value(job.y, job.dtype, (m0 + m) * job.ldy + row, total);
  }
}

void gemm(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  RowDecoder decoder(layer, layer.dtype);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t m = 0; m < job.m; m += kRowsOfX)
      multiply_row(decoder, job, m, job.m - m < kRowsOfX ? int(job.m - m) : kRowsOfX, row);
}

void dequantize(const Layer& layer, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                void* out) {
  RowDecoder decoder(layer, round);
  float weights[kUnit];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < layer.groups; ++group) {
      const float scale = widen(layer.row_scales(row)[group], layer.dtype);
      decoder.start_group(scale);
      for (int64_t k = group * layer.group; k < (group + 1) * layer.group; k += kUnit) {
        decoder.decode(layer.row_codes(row) + k / kUnit * layer.bits, scale, weights);
        const int64_t at = (row - begin) * layer.k + k;
        for (int i = 0; i < kUnit; ++i) store_value(out, out_dtype, at + i, weights[i]);
      }
    }
  }
}

}  // namespace

const Kernels& portable_kernels() {
  static const Kernels table = {"portable", computes_bf16, pack, gemm, dequantize};
  return table;
}

}  // namespace flute::cpu
