// AVX2 with FMA and F16C: fp32 lanes of eight, for any mix of dtypes.
//
// Eight weights in natural order are a quarter unit: one byte shuffle and one shift bring each
// code to its 32-bit lane. vpermps knows eight entries: two and three bits take one look-up, four
// bits two and a blend by the code's top bit (dequantize), or byte tables (gemm).
//
// Compiled with -mavx2 -mfma -mf16c: see half.h about functions in headers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

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

// Rounded to nearest even, in the low half of each lane. Without kKeepNan, NaN is kept only if its
// low 16 bits are zero: true of products of bf16 values.
template <bool kKeepNan>
__m256i bf16_bits(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  if constexpr (!kKeepNan) return _mm256_srli_epi32(sum, 16);
  const __m256i nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(sum, nan, is_nan), 16);
}

__m256 round_lanes(__m256 v, Dtype round) {
  if (round == Dtype::kBFloat16)
    return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits<true>(v), 16));
  if (round == Dtype::kFloat16)
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return v;
}

__m256 scale_factor(uint16_t scale, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return _mm256_set1_ps(bf16_to_float(scale));
  return _mm256_cvtph_ps(_mm_set1_epi16(short(scale)));
}

template <int Bits>
Table scale_table(const Table& table, uint16_t scale, Dtype dtype, Dtype round) {
  const __m256 factor = scale_factor(scale, dtype);
  const __m256 low = round_lanes(_mm256_mul_ps(table.low, factor), round);
  if constexpr (Bits < 4) return {low, low};
  return {low, round_lanes(_mm256_mul_ps(table.high, factor), round)};
}

float sum_lanes(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Four bits take another way in gemm: a table of 16-bit values is two tables of bytes, and pshufb
// looks up 32 nibbles in each at once. 15 instructions for 32 weights instead of 30. The weights
// come out in the order kOrder, which `pack` gives x as well.
struct ByteTables {
  __m256i low, high;  // bytes of the 16 scaled entries, in both halves
};

template <Dtype Scale>
ByteTables scale_bytes(const Table& table, uint16_t scale) {
  const __m256 factor = scale_factor(scale, Scale);
  const __m256 a = _mm256_mul_ps(table.low, factor), b = _mm256_mul_ps(table.high, factor);
  __m256i words;
  if constexpr (Scale == Dtype::kBFloat16) {
    words = _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_bits<false>(a), bf16_bits<false>(b)),
                                     0xD8);
  } else {
    words = _mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xFF));
  const __m256i bytes = _mm256_packus_epi16(low, _mm256_srli_epi16(words, 8));
  // Per half: eight low bytes, eight high bytes. Gather the quadwords to whole tables.
  return {_mm256_permute4x64_epi64(bytes, 0x88), _mm256_permute4x64_epi64(bytes, 0xDD)};
}

template <Dtype Scale>
void decode_nibbles(const uint32_t* p, const ByteTables& tables, __m256 (&out)[kQuarters]) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  // Even codes in the low half, odd codes in the high half.
  const __m256i index =
      _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), _mm256_set1_epi8(0xF));
  const __m256i low = _mm256_shuffle_epi8(tables.low, index);
  const __m256i high = _mm256_shuffle_epi8(tables.high, index);
  const __m256i words[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
  for (int i = 0; i < 2; ++i) {
    if constexpr (Scale == Dtype::kBFloat16) {
      const __m256i top = _mm256_set1_epi32(int(0xFFFF0000u));
      out[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(words[i], 16));
      out[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(words[i], top));
    } else {
      out[2 * i] = _mm256_cvtph_ps(_mm256_castsi256_si128(words[i]));
      out[2 * i + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words[i], 1));
    }
  }
}

constexpr int kOrder[2][kUnit / 2] = {
    {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15},  // bf16: even words, odd words
    {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15},  // fp16: low half, high half
};

template <int Bits, Dtype Scale>
struct Tile {
  static constexpr int kWidth = 8, kElementBytes = 4;

  // Sixteen registers: eight sums for M = 8, and two tables for each row at four bits.
  template <int M>
  static constexpr int rows() {
    return M == 8 ? 1 : 2;
  }

  using Scaled = std::conditional_t<Bits == 4, ByteTables, Table>;

  static Scaled scale(const Table& table, uint16_t value) {
    if constexpr (Bits == 4)
      return scale_bytes<Scale>(table, value);
    else
      return scale_table<Bits>(table, value, Scale, Scale);
  }

  static void decode(const uint32_t* p, const Scaled& scaled, __m256 (&out)[kQuarters]) {
    if constexpr (Bits == 4) {
      decode_nibbles<Scale>(p, scaled, out);
    } else {
      const __m256i unit = load_unit<Bits>(p);
      for (int quarter = 0; quarter < kQuarters; ++quarter)
        out[quarter] = decode_quarter<Bits>(unit, quarter, scaled);
    }
  }

  template <int R, int M>
  static void run(const Layer& layer, const Job& job, int64_t m, int64_t row, Span span,
                  float* partial) {
    const Table table = load_table<Bits>(layer);
    const float* x = static_cast<const float*>(job.packed) + m * layer.k;
    __m256 sums[R][M];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < M; ++j)
        sums[r][j] =
            span.begin == 0 ? _mm256_setzero_ps() : _mm256_load_ps(partial + (r * M + j) * kWidth);
    const int64_t ahead = rows_ahead(layer);
    int64_t k = span.begin;
    for (int64_t group = k / layer.group; k < span.end; ++group) {
      Scaled scaled[R];
      for (int r = 0; r < R; ++r) scaled[r] = scale(table, layer.row_scales(row + r)[group]);
      const int64_t stop = smaller((group + 1) * layer.group, span.end);
      for (; k < stop; k += kUnit) {
        for (int r = 0; r < R; ++r) {
          __m256 weights[kQuarters];
          const uint32_t* codes = layer.row_codes(row + r) + k / kUnit * Bits;
          _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T1);
          decode(codes, scaled[r], weights);
#pragma GCC unroll 8
          for (int j = 0; j < M; ++j) {
            const float* values = x + k * M + j * kLanes;
#pragma GCC unroll 4
            for (int quarter = 0; quarter < kQuarters; ++quarter)
              sums[r][j] = _mm256_fmadd_ps(
                  weights[quarter], _mm256_load_ps(values + quarter * M * kLanes), sums[r][j]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < M; ++j) _mm256_store_ps(partial + (r * M + j) * kWidth, sums[r][j]);
  }

  static float total(const float* partial) { return sum_lanes(_mm256_load_ps(partial)); }
};

bool computes_bf16(const Layer&, Dtype) {
  return false;
}

__m256 load_float(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(data) + index);
  const uint16_t* p = static_cast<const uint16_t*>(data) + index;
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (dtype == Dtype::kFloat16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

void pack(const Layer& layer, const Job& job, int64_t m, void* packed) {
  if (layer.pair) return portable_kernels().pack(layer, job, m, packed);
  const Place place = place_of(job.m, m);
  const int64_t first = m * layer.k;
  float* out = static_cast<float*>(packed);
  const bool reorders = layer.bits == 4;
  const int (&order)[kUnit / 2] = kOrder[layer.dtype == Dtype::kFloat16];
  for (int64_t k = 0; k < layer.k; k += kUnit / 2) {
    alignas(32) float values[kUnit / 2], ordered[kUnit / 2];
    _mm256_store_ps(values, load_float(job.x, job.dtype, first + k));
    _mm256_store_ps(values + kLanes, load_float(job.x, job.dtype, first + k + kLanes));
    for (int i = 0; i < kUnit / 2; ++i) ordered[i] = values[reorders ? order[i] : i];
    for (int half = 0; half < 2; ++half)
      _mm256_store_ps(out + place.vector(layer.k, k / kLanes + half, kLanes),
                      _mm256_load_ps(ordered + half * kLanes));
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
    const __m256i wide = bf16_bits<true>(v);
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
  if (layer.pair) return portable_kernels().dequantize(layer, begin, end, round, out_dtype, out);
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
