// AVX2 with FMA and F16C: fp32 lanes of eight, for any mix of dtypes.
//
// Eight weights in natural order are a quarter unit: one byte shuffle and one shift bring each
// code to its 32-bit lane. vpermps knows eight entries, so four bits take two look-ups and a blend
// by the code's top bit; two and three bits take one.
//
// Compiled with -mavx2 -mfma -mf16c: see half.h about functions in headers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "tiles.h"

namespace flute::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kQuarters = kUnit / kLanes;

template <int Bits>
struct Layout {
  alignas(32) uint8_t bytes[kQuarters][32];
  alignas(32) uint32_t shifts[kQuarters][kLanes];

  constexpr Layout() : bytes(), shifts() {
    for (int i = 0; i < kUnit; ++i) {
      const int quarter = i / kLanes, lane = i % kLanes, bit = Bits * i;
      shifts[quarter][lane] = bit % 8;
      const bool spills = bit % 8 + Bits > 8;
      for (int b = 0; b < 4; ++b)
        bytes[quarter][4 * lane + b] = b == 0 || (b == 1 && spills) ? bit / 8 + b : 0x80;
    }
  }
};

template <int Bits>
inline constexpr Layout<Bits> kLayout{};

// The 4 * Bits bytes of a unit in both halves; nothing beyond them is read.
template <int Bits>
__m256i load_unit(const uint32_t* p) {
  if constexpr (Bits == 4)
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if constexpr (Bits == 2) return _mm256_broadcastq_epi64(low);
  return _mm256_broadcastsi128_si256(_mm_insert_epi32(low, int(p[Bits - 1]), Bits - 1));
}

struct Table {
  __m256 low, high;  // entries 0..7 and 8..15; up to three bits only `low` is used
};

template <int Bits>
__m256 decode_quarter(__m256i unit, int quarter, const Table& table) {
  const __m256i fields = _mm256_shuffle_epi8(
      unit, _mm256_load_si256(reinterpret_cast<const __m256i*>(kLayout<Bits>.bytes[quarter])));
  const __m256i index = _mm256_srlv_epi32(
      fields, _mm256_load_si256(reinterpret_cast<const __m256i*>(kLayout<Bits>.shifts[quarter])));
  const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
  if constexpr (Bits < 4) return low;
  const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

template <int Bits>
Table load_table(const Layer& layer) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = widen(layer.table[i % (1 << Bits)], layer.dtype);
  return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}

__m256i bf16_bits(__m256 v) {  // rounded to nearest even, in the low half of each lane
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(sum, nan, is_nan), 16);
}

__m256 round_lanes(__m256 v, Dtype round) {
  if (round == Dtype::kBFloat16)
    return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(v), 16));
  if (round == Dtype::kFloat16)
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return v;
}

template <int Bits>
Table scale_table(const Table& table, uint16_t scale, Dtype dtype, Dtype round) {
  const __m256 factor = _mm256_set1_ps(dtype == Dtype::kBFloat16
                                           ? bf16_to_float(scale)
                                           : _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(scale))));
  const __m256 low = round_lanes(_mm256_mul_ps(table.low, factor), round);
  if constexpr (Bits < 4) return {low, low};
  return {low, round_lanes(_mm256_mul_ps(table.high, factor), round)};
}

float total(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <int Bits, Dtype Scale>
struct Tile {
  // Sixteen registers: eight sums for M = 4 and 8, and two tables for each row at four bits.
  template <int M>
  static constexpr int rows() {
    return M == 8 ? 1 : 2;
  }

  template <int R, int M>
  static void run(const Layer& layer, const Job& job, int64_t m, int64_t row, float* out) {
    const Table table = load_table<Bits>(layer);
    const float* x = static_cast<const float*>(job.packed) + m * layer.k;
    __m256 sums[R][M];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < M; ++j) sums[r][j] = _mm256_setzero_ps();
    int64_t k = 0;
    for (int64_t group = 0; group < layer.groups; ++group) {
      Table scaled[R];
      for (int r = 0; r < R; ++r)
        scaled[r] = scale_table<Bits>(table, layer.row_scales(row + r)[group], Scale, Scale);
      for (const int64_t stop = k + layer.group; k < stop; k += kUnit) {
        __m256i units[R];
        for (int r = 0; r < R; ++r)
          units[r] = load_unit<Bits>(layer.row_codes(row + r) + k / kUnit * Bits);
#pragma GCC unroll 4
        for (int quarter = 0; quarter < kQuarters; ++quarter) {
          __m256 weights[R];
          for (int r = 0; r < R; ++r)
            weights[r] = decode_quarter<Bits>(units[r], quarter, scaled[r]);
#pragma GCC unroll 8
          for (int j = 0; j < M; ++j) {
            const __m256 values = _mm256_loadu_ps(x + j * layer.k + k + quarter * kLanes);
            for (int r = 0; r < R; ++r)
              sums[r][j] = _mm256_fmadd_ps(weights[r], values, sums[r][j]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < M; ++j) out[r * M + j] = total(sums[r][j]);
  }
};

bool computes_bf16(const Layer&, Dtype) { return false; }

void pack(const Layer& layer, const Job& job, int64_t m, void* packed) {
  float* out = static_cast<float*>(packed) + m * layer.k;
  const int64_t first = m * layer.k;
  for (int64_t k = 0; k < layer.k; k += kLanes) {
    if (job.dtype == Dtype::kFloat32) {
      const float* p = static_cast<const float*>(job.x) + first + k;
      _mm256_storeu_ps(out + k, _mm256_loadu_ps(p));
      continue;
    }
    const uint16_t* p = static_cast<const uint16_t*>(job.x) + first + k;
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
    _mm256_storeu_ps(out + k, job.dtype == Dtype::kFloat16 ? _mm256_cvtph_ps(h)
                                                           : _mm256_castsi256_ps(wide));
  }
}

template <int Bits>
void gemm_bits(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  if (layer.dtype == Dtype::kBFloat16)
    sweep<Tile<Bits, Dtype::kBFloat16>>(layer, job, begin, end);
  else
    sweep<Tile<Bits, Dtype::kFloat16>>(layer, job, begin, end);
}

void gemm(const Layer& layer, const Job& job, int64_t begin, int64_t end) {
  if (layer.pair) return portable_kernels().gemm(layer, job, begin, end);
  switch (layer.bits) {
    case 2:
      return gemm_bits<2>(layer, job, begin, end);
    case 3:
      return gemm_bits<3>(layer, job, begin, end);
    default:
      return gemm_bits<4>(layer, job, begin, end);
  }
}

void store_weights(void* out, Dtype dtype, int64_t index, __m256 v) {
  if (dtype == Dtype::kFloat32) return _mm256_storeu_ps(static_cast<float*>(out) + index, v);
  __m128i h;
  if (dtype == Dtype::kFloat16) {
    h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m256i wide = bf16_bits(v);
    h = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + index), h);
}

template <int Bits>
void dequantize_rows(const Layer& layer, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                     void* out) {
  const Table table = load_table<Bits>(layer);
  int64_t at = 0;
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t* codes = layer.row_codes(row);
    for (int64_t group = 0; group < layer.groups; ++group) {
      const Table scaled =
          scale_table<Bits>(table, layer.row_scales(row)[group], layer.dtype, round);
      for (int64_t k = 0; k < layer.group; k += kUnit, codes += Bits, at += kUnit) {
        const __m256i unit = load_unit<Bits>(codes);
        for (int quarter = 0; quarter < kQuarters; ++quarter)
          store_weights(out, out_dtype, at + quarter * kLanes,
                        decode_quarter<Bits>(unit, quarter, scaled));
      }
    }
  }
}

void dequantize(const Layer& layer, int64_t begin, int64_t end, Dtype round, Dtype out_dtype,
                void* out) {
  if (layer.pair)
    return portable_kernels().dequantize(layer, begin, end, round, out_dtype, out);
  switch (layer.bits) {
    case 2:
      return dequantize_rows<2>(layer, begin, end, round, out_dtype, out);
    case 3:
      return dequantize_rows<3>(layer, begin, end, round, out_dtype, out);
    default:
      return dequantize_rows<4>(layer, begin, end, round, out_dtype, out);
  }
}

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels table = {"avx2", computes_bf16, pack, gemm, dequantize};
  return table;
}

}  // namespace flute::cpu
#endif
